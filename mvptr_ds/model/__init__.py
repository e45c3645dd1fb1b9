"""The model of MVPTR: encoders, heads, regions, and conversion to and from other checkpoints.

The files import each other relatively, and nothing else of the package: an exported model carries copies of them, with
which transformers loads it where this package is not installed (exporting/, docs/export.md).
"""
