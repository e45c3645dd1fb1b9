"""Comparison with recorded numbers of the published code, for pre-training and for the downstream tasks."""
