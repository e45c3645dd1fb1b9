"""Writes sidecars of phrases for `mvptr phrases`, and counts phrases for `mvptr vocab`.

The parser that finds the phrases is in corpus/concepts/.
"""
