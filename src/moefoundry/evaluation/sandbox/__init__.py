"""A sandbox for programs that a model has written; ``run.py`` is its door."""
