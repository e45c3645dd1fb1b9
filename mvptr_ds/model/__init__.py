"""The model of MVPTR: encoders, heads, regions, and conversion to and from other checkpoints."""
