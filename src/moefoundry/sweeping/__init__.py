"""Sweeps: the runs of a recipe over values of its keys, one after the other or side by side, and their table."""
