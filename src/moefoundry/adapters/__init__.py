"""Low-rank adapters (LoRA, arXiv 2106.09685) as a transform of a built model.

A frozen weight W [O, I] acts as ``W + scale * B A`` with A [R, I] and B [O, R], rank R. An adapter is a submodule
``lora`` beside the weight, whose parameters are ``a`` and ``b``; names of the frozen weights do not change:

    layers.0.attention.q_proj.weight           [O, I]       layers.0.attention.q_proj.lora.a         [R, I]
    layers.1.ffn.experts.gate_proj             [E, F, D]    layers.1.ffn.experts.lora.gate_proj.a    [E, R, D]

The transform comes before precision and parallelism: adapters are computed in the compute dtype beside base products of
any precision, FP8 included, and are sharded as their base is.

    adapter.py    the modules, and the functions that compute with them
    lora.py       puts them into a model, and gives them initial values
    merge.py      adds them to their weights, and takes them out again
"""

from moefoundry.adapters.adapter import AdaptedExperts, Adapter, ExpertAdapter, LinearAdapter, Magnitude
from moefoundry.adapters.lora import (
    adapter_names,
    apply_lora,
    has_adapter,
    init_adapters,
    start_magnitudes,
    trained_names,
)
from moefoundry.adapters.merge import adapted, merge, unloaded, unmerge

__all__ = [
    "AdaptedExperts",
    "Adapter",
    "ExpertAdapter",
    "LinearAdapter",
    "Magnitude",
    "adapted",
    "adapter_names",
    "apply_lora",
    "has_adapter",
    "init_adapters",
    "merge",
    "start_magnitudes",
    "trained_names",
    "unloaded",
    "unmerge",
]
