"""A trained model for others: a folder that transformers loads without this package, or the published code's names."""
