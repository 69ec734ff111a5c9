"""Composer callbacks and loggers; one purpose a file. ``metrics_file.py`` names every metric that a run writes."""
