"""What makes, checks and shows shards and sidecars: the package behind `tools/`. Training imports nothing of it."""
