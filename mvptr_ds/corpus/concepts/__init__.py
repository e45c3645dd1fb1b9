"""Finds the phrases of captions for `mvptr phrases`: text, tokens, tags, dependency tree, phrases with spans.

tools/dev/parser/ trains the models that it loads.
"""
