"""Data: corpus preparation (text to token shards) and the streaming loaders that read the shards.

``files``, ``reading``, ``records`` (bytes to texts) -> ``corpus`` (documents) -> ``splits`` -> ``tokenizer`` ->
``packing`` (fixed-length samples) -> ``prepare`` (shards on disk) -> ``loader`` (batches). Only ``loader`` imports
torch; the others stay cheap to import.
"""
