"""Training steps in a bare loop over the model, its parallel transform and AdamW: no trainer, no data.

MFU counts 6 operations a token and active parameter (without the embedding, which is a look-up), and causal attention's
6 L D S a token; recomputation counts nothing. ``mfu`` is of the BF16 product that this run measured, ``mfu_of_989`` of
an H100's data sheet. The router is a real one with random weights on random tokens.

A part is named by what is trained and by what a recipe changes for it; ``auto`` is no backend here, as what it takes
depends on what was measured. A model that the device has no memory for loses layers, and its name says how many it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW

from benchmarks.gpu import machine
from benchmarks.gpu.figures import Figures, Part
from benchmarks.gpu.gpu_tests import QUICKSTART
from benchmarks.gpu.layer import kernels_chosen
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import host_syncs, largest_kernels, peak_bytes, timed
from moefoundry.config import ModelConfig, Recipe, load_recipe
from moefoundry.mesh import by_mesh
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import moe_layers, parallelize
from moefoundry.planning.micro_batch import HEADROOM
from moefoundry.planning.plan import make_plan

DATA_SHEET_TFLOPS = 989
CONTEXT_BYTES = 1.5e9
"""CUDA's context and the workspaces of its libraries, about."""


class Model(NamedTuple):
    """What is trained.

    Attributes:
        overrides: Changes to the quickstart's recipe.
        layers, sequences: Blocks, and sequences of a step.
    """

    overrides: tuple[str, ...]
    layers: int
    sequences: int


OLMOE = (
    "max_seq_len=4096",
    "model.vocab_size=50304",
    "model.d_model=2048",
    "model.n_dense_layers=0",
    "model.init.std=0.02",
    "model.attention={n_heads: 16, n_kv_heads: 16, qk_norm: full}",
    "model.moe={num_experts: 64, top_k: 8, expert_hidden_size: 1024, num_shared_experts: 0}",
)
SMALL = (
    "max_seq_len=4096",
    "model.vocab_size=50304",
    "model.d_model=1536",
    "model.n_dense_layers=0",
    "model.init.std=0.02",
    "model.attention={n_heads: 12, n_kv_heads: 12}",
    "model.moe={num_experts: 64, top_k: 8, expert_hidden_size: 512, num_shared_experts: 0}",
)
TINY = (
    "max_seq_len=64",
    "model.vocab_size=512",
    "model.d_model=64",
    "model.n_dense_layers=0",
    "model.attention={n_heads: 4, n_kv_heads: 4}",
    "model.moe={num_experts: 8, top_k: 2, expert_hidden_size: 32, num_shared_experts: 0}",
)
MODELS = {
    "OLMoE": Model(OLMOE, 4, 4),
    "3B-A0.6B": Model(SMALL, 18, 4),
    "deep OLMoE": Model(OLMOE, 16, 2),
    "tiny": Model(TINY, 2, 2),
}
CHANGES = {
    "grouped_mm": "model.moe.backend=grouped_mm",
    "triton": "model.moe.backend=triton",
    "fused kernels": "fused_kernels=true",
    "compiled": "compile=true",
    "fp8": "precision.fp8.recipe=deepseek_v3",
}
BF16 = (
    ("OLMoE", "grouped_mm"),
    ("OLMoE", "triton", "fused kernels"),
    ("3B-A0.6B", "grouped_mm"),
    ("3B-A0.6B", "triton", "fused kernels"),
    ("OLMoE", "triton"),
    ("OLMoE", "grouped_mm", "fused kernels"),
    ("deep OLMoE", "triton", "fused kernels"),
    ("OLMoE", "grouped_mm", "compiled"),
    ("OLMoE", "triton", "compiled"),
)
"""A model and what is changed: what would be missed most comes first, what compiles for longest last."""
FP8 = (("OLMoE", "fp8", "fused kernels"), ("3B-A0.6B", "fp8", "fused kernels"))
"""FP8 has products of its own, whatever the backend."""


def run_bf16(figures: Figures, options: Options) -> None:
    """Each backend with PyTorch's operators, as the recipes have them, and with fused kernels; some compiled."""
    run(figures, (("tiny", "grouped_mm"), ("tiny", "grouped_mm", "fused kernels")) if options.tiny else BF16, options)


def run_fp8(figures: Figures, options: Options) -> None:
    """FP8 in tiles and blocks; beside it what ``run_bf16`` measured."""
    run(figures, (("tiny", "fp8"),) if options.tiny else FP8, options)


def run(figures: Figures, variants: Sequence[tuple[str, ...]], options: Options) -> None:
    """Train models, each as deep in all its variants as the device has memory for."""
    free = free_bytes(options)
    deepest = {
        name: min(layers_that_fit(MODELS[name], changes, free) for other, *changes in variants if other == name)
        for name, *_ in variants
    }
    for name, *changes in variants:
        model = MODELS[name]._replace(layers=deepest[name])
        kind = ", ".join(changes)
        figures.run(f"{name}, {depth(MODELS[name], model)}, {kind}", measure, model, changes, options, kind=kind)


def depth(whole: Model, model: Model) -> str:
    """Say how many layers are trained."""
    return (
        f"{model.layers} layers" if model.layers == whole.layers else f"cut to {model.layers} of {whole.layers} layers"
    )


def free_bytes(options: Options) -> float:
    """What models may have of the device; the same whenever it is asked."""
    return torch.cuda.get_device_properties(0).total_memory - CONTEXT_BYTES if options.device == "cuda" else math.inf


def layers_that_fit(model: Model, changes: Sequence[str], free: float) -> int:
    """Plan the memory of a step with fewer and fewer layers, until it fits."""
    batch = [f"{key}={model.sequences}" for key in ("global_train_batch_size", "device_train_microbatch_size")]
    for layers in range(model.layers, 1, -1):
        recipe = recipe_of(model._replace(layers=layers), changes, *batch)
        if make_plan(recipe, 1).memory.total <= free * (1 - HEADROOM):
            return layers
    return 1


def measure(part: Part, model: Model, changes: Sequence[str], options: Options) -> None:
    """Train with the kernels that the recipe has."""
    recipe = recipe_of(model, changes)
    with kernels_chosen(recipe.fused_kernels):
        measure_steps(part, model, recipe, options)


def measure_steps(part: Part, model: Model, recipe: Recipe, options: Options) -> None:
    """Time, throughput and memory of steps; then their phases, host syncs and kernels."""
    network = build(recipe, options)
    groups = [{"params": group} for group in by_mesh(network.parameters())]
    optimizer = AdamW(groups, lr=1e-4, fused=True)
    shape = (model.sequences, recipe.max_seq_len)
    batches = [torch.randint(recipe.model.vocab_size, shape, device=options.device) for _ in range(2)]

    def step(ids_BS: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        network(ids_BS, ids_BS).total.backward()
        optimizer.step()

    part.put(peak_bytes=peak_bytes(lambda: step(batches[0]), options.device))
    part.put(peak_bytes_later=peak_bytes(lambda: step(batches[1]), options.device))
    time = timed([lambda ids=ids: step(ids) for ids in batches], options.device, seconds=1.5)
    part.put(**throughput(network, shape, time["ms"], options), **time)
    part.put(phases_ms=phases(network, optimizer, batches[0], options))
    part.put(busiest_over_mean=imbalance(network, batches[0]))
    part.put(syncs=host_syncs(lambda: step(batches[0]), options.device))
    part.put(kernels_us=largest_kernels(lambda: step(batches[0]), options.device, 40))


def recipe_of(model: Model, changes: Sequence[str], *overrides: str) -> Recipe:
    """The quickstart's recipe with the model's changes, those of :data:`CHANGES`, and BF16."""
    changed = [CHANGES[change] for change in changes]
    layers = f"model.n_layers={model.layers}"
    return load_recipe(QUICKSTART, [*model.overrides, layers, "precision.compute=bf16", *changed, *overrides])


def build(recipe: Recipe, options: Options) -> MoETransformer:
    """The model as a run on one device builds it; but that draws weights on the host, for minutes."""
    network = meta_model(recipe.model)
    parallelize(network, None, recipe.precision, recipe.activation_checkpointing, recipe.compile)
    network.to_empty(device=options.device)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, recipe.model.init.std)
        for buffer in network.buffers():
            buffer.zero_()
    return network.train()


def throughput(
    network: MoETransformer, shape: tuple[int, int], milliseconds: float, options: Options
) -> dict[str, Any]:
    """Tokens and operations a second."""
    total, active = count_parameters(network)
    tokens = shape[0] * shape[1]
    operations = operations_a_token(network.cfg, active, shape[1]) * tokens
    rate = operations / milliseconds / 1e9
    peak = machine.measured_peak(options)
    return {
        "tokens": tokens,
        "parameters": total,
        "active_parameters": active,
        "tokens_per_second": round(1e3 * tokens / milliseconds),
        "tflops": round(rate, 3),
        "mfu": round(rate / peak, 4) if peak else None,
        "mfu_of_989": round(rate / DATA_SHEET_TFLOPS, 4),
    }


def count_parameters(network: MoETransformer) -> tuple[int, int]:
    """All, and those that a token meets, without the embedding."""
    total = sum(parameter.numel() for parameter in network.parameters())
    moe = network.cfg.moe
    routed = sum(p.numel() for layer in moe_layers(network) for p in layer.experts.parameters())
    active = total - routed + routed * moe.top_k // moe.num_experts - network.embed_tokens.weight.numel()
    return total, active


def operations_a_token(cfg: ModelConfig, active: int, sequence: int) -> int:
    """Forward and backward of one token."""
    return 6 * active + 6 * cfg.n_layers * cfg.d_model * sequence


def phases(
    network: MoETransformer, optimizer: AdamW, ids_BS: torch.Tensor, options: Options
) -> dict[str, float] | None:
    """Milliseconds of the forward pass, the backward pass and the optimizer, in one step."""
    if options.device != "cuda":
        return None
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    marks[0].record()
    total = network(ids_BS, ids_BS).total
    marks[1].record()
    total.backward()
    marks[2].record()
    optimizer.step()
    marks[3].record()
    torch.cuda.synchronize()
    names = ("forward", "backward", "optimizer")
    return {name: round(marks[at].elapsed_time(marks[at + 1]), 3) for at, name in enumerate(names)}


def imbalance(network: MoETransformer, ids_BS: torch.Tensor) -> list[float]:
    """By layer, tokens of the busiest expert over the mean."""
    with torch.no_grad():
        counts_LE = network(ids_BS, ids_BS).tokens_per_expert.double()
    return [round(value, 2) for value in (counts_LE.max(1).values / counts_LE.mean(1)).tolist()]
