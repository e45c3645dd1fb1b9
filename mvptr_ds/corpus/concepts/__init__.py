"""Phrase concepts of captions: tokens -> tags -> dependency tree -> phrases with the character spans of their words."""
