"""Reads annotation formats for tools/build_shards.py: each reader yields `rows.Row` and counts what it cannot read."""
