"""Makes, checks and shows shards and sidecars: the code behind `commands`, a folder for each.

Training imports none of it. resumable_jobs.py runs the units of such work in processes, so that an interruption loses
no finished unit.
"""
