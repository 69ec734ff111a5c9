"""Sharded checkpoints: ``store.py`` says which exist, ``state.py`` what is in one, ``io.py`` writes and reads it."""
