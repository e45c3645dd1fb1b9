"""Writes sidecars of boxes, tags and region features, for tools/extract_regions.py and tools/import_vinvl.py."""
