"""Reads annotation formats for `mvptr shards`: each reader yields `rows.Row` and counts what it cannot read."""
