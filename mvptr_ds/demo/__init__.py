"""Draws small scenes with captions, regions and phrases, for `mvptr demo-shards` and the demo configurations."""
