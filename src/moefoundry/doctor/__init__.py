"""Checks of a machine before anything is trained on it."""
