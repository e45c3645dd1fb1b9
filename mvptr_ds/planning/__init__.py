"""Estimates what a run needs before it starts (`mvptr plan`). Its files are cost, lengths, memory and plan."""
