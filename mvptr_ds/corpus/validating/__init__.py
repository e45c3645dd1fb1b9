"""Checks every byte of shards and sidecars, and rescues what is sound, for tools/validate_shards.py."""
