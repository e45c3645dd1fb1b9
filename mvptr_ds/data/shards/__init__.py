"""From bytes to records: tars and their index, local or behind a URL, and the sidecars that are joined with them.

`writer.py` and `tar_writer.py` write shards, `index_builder.py` indexes them. `index.py` and `sidecar_join.py` find the
record of a sample, `tar_reader.py` reads it through `storage.py` or `remote.py`.
"""
