"""Checks a run before its first step: configuration, ranks, records, memory and disk (docs/preflight.md)."""
