"""Writes sidecars of phrases for tools/extract_phrases.py, and counts phrases for tools/build_vocab.py.

The parser that finds the phrases is in corpus/concepts/.
"""
