"""Estimates what a run needs before it starts (`tools/plan_run.py`). Its files are cost, lengths, memory and plan."""
