"""What other people measure of a model: zero-shot classification, and CLIP_benchmark's data, interface and results."""
