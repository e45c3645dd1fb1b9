"""Concept-aware vision-language pre-training (MVPTR) on WebDataset shards and DeepSpeed.

Two commands use this package: `deepspeed mvptr_ds/train.py` trains and `python mvptr_ds/eval.py` evaluates. Data flows
one way, from `data` (shards to batches) through `tasks` (model and objectives of a stage) to `trainer` and `engine`.
README.md names the ten files to read first.
"""
