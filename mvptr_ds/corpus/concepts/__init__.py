"""Finds the phrases of captions for tools/extract_phrases.py: text, tokens, tags, dependency tree, phrases with spans.

tools/dev/parser/ trains the models that it loads.
"""
