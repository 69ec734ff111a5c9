"""From and to Hugging Face: ``convert.py`` imports, exports and consolidates, ``upcycle.py`` makes experts.

Both work in blocks that ``tensor_map.py`` cuts as a model family (``families/``) says; ``parity.py`` compares
the result with transformers.
"""
