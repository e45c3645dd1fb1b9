"""The user's commands, a module with a `main` for each: `mvptr.py` chooses one, and `tools/` starts the same ones."""
