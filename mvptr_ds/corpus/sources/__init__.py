"""Readers of annotation formats: each yields rows (`rows.Row`), whatever the format, and counts what it cannot read."""
