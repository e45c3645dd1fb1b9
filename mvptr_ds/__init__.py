"""Concept-aware vision-language pre-training (MVPTR) on WebDataset shards and DeepSpeed.

Two commands use this package: `deepspeed mvptr_ds/train.py` trains and `python mvptr_ds/eval.py` evaluates. Installed,
it has these and the tools under one name, `mvptr`. Data flows one way, from `data` (shards to batches) through `tasks`
(model and objectives of a stage) to `trainer` and `engine`. README.md names the ten files to read first.
"""

__version__ = "0.1.0"  # its one home: setup.py reads it here
