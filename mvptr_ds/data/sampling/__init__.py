"""The order of a run: pure functions of (seed, position), which need numpy and no data.

`batches.py` or `buckets.py` gives the positions of a step, `mixture.py` the source at each, `plan.py` its sample.
"""
