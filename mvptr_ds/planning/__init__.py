"""What a run would need, before it is started: bytes, time, and every assumption by name."""
