"""Writes an HTML page of records and their statistics, for `mvptr preview`."""
