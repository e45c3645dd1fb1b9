"""Evaluates a model on a split: retrieval, grounding, matching and recovery, with the report, curves and pictures."""
