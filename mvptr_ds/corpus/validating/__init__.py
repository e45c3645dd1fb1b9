"""Checks every byte of shards and sidecars, and rescues what is sound, for `mvptr validate`."""
