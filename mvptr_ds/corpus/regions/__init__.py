"""Writes sidecars of boxes, tags and region features, for `mvptr regions` and `mvptr import-vinvl`."""
