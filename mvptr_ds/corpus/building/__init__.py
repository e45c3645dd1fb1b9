"""Groups the captions of an image into records and writes them as shards, for `mvptr shards`."""
