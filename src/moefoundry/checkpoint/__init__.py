"""Sharded checkpoints: ``store.py`` says which exist, ``state.py`` what is in one, ``io.py`` writes and reads it.

``convert.py`` makes them from Hugging Face directories and back, and ``upcycle.py`` from dense models, both in blocks
(``blocks.py``) that ``tensor_map.py`` cuts as a model family says.
"""
