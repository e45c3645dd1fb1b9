"""Draws small scenes with captions, regions and phrases, for tools/make_demo_shards.py and the demo configurations."""
