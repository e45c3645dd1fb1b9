"""Writes an HTML page of records and their statistics, for tools/preview_shards.py."""
