"""The single-device transformer. It knows neither meshes nor FP8: see ``parallel.py`` and ``precision.py``."""
