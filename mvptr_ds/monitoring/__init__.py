"""Measures and logs a run: metrics, time and FLOPs of steps, replaced samples, versions and Weights & Biases."""
