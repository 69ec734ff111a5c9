"""FP8 weights quantized once a step: the bits of quantizing them in every pass, and never those of older weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moefoundry.callbacks.ema import ParameterAverage
from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    Compute,
    Fp8Config,
    Fp8Recipe,
    LoraConfig,
    MeshConfig,
    PrecisionConfig,
)
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.experts import GroupedExperts
from moefoundry.ops.fp8 import KeptBlocks, Tile, dequantize, quantize, weights
from moefoundry.parallel import materialize, parallelize
from moefoundry.precision import Fp8Experts
from tests.distributed import run_distributed
from tests.model.tiny import batch, tiny_config

LINEARS, EXPERTS = 2 * 4 + 2 * 3, 3
"""Quantized weights of the model: attention, dense and shared networks; experts."""


class Case(NamedTuple):
    """How a model is trained."""

    compute: Compute = Compute.bf16
    mode: str = "none"
    lora: LoraConfig | None = None
    transposed: bool = False
    chunks: int = 1


def build(case: Case, mesh: MeshConfig | None = None, ranks: int = 1) -> MoETransformer:
    from moefoundry.adapters import apply_lora
    from moefoundry.mesh import build_meshes, resolve_degrees

    torch.manual_seed(0)
    cfg = tiny_config(n_layers=2)
    cfg.moe.dispatch_chunks = case.chunks
    model = meta_model(cfg)
    if case.lora is not None:
        apply_lora(model, case.lora)
    precision = PrecisionConfig(case.compute, fp8=Fp8Config(Fp8Recipe.deepseek_v3))
    meshes = None if mesh is None else build_meshes(resolve_degrees(mesh, ranks), "cpu")
    parallelize(model, meshes, precision, ActivationCheckpointing(case.mode))
    materialize(model, "cpu", 0)
    return model


@contextmanager
def counted(transposed: bool = False) -> Iterator[Counter[str]]:
    """Count quantizations of weights, by how they are stored; ``transposed`` as kernels need them."""
    counts: Counter[str] = Counter()

    def counting(name: str):
        function = getattr(weights, name)

        def call(x: Tensor, *args: object, **options: object) -> object:
            counts[name] += 1
            return function(x, *args, **options)

        return patch.object(weights, name, call)

    with (
        counting("quantize"),
        counting("quantize_transposed"),
        patch.object(weights, "transposes", lambda *_: transposed),
    ):
        yield counts


def train(model: MoETransformer) -> dict[str, Tensor]:
    """A step of two micro-batches by a fused optimizer: every loss, gradient and parameter; then an evaluation."""
    from moefoundry.optim import build_adamw

    optimizer, found = build_adamw(model, AdamWConfig(lr=1e-2)), {}
    for micro in range(2):
        loss = model(batch(seed=micro), batch(seed=micro)).total
        loss.backward()
        found[f"loss {micro}"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = whole(parameter.grad).clone()
    optimizer.step()
    optimizer.zero_grad()
    found["evaluation"] = evaluate(model)
    return found | {name: whole(value) for name, value in model.state_dict().items()}


def evaluate(model: MoETransformer) -> Tensor:
    with torch.inference_mode():
        return model(batch(), batch()).lm.clone()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def keep_nothing(model: MoETransformer) -> MoETransformer:
    for module in model.modules():
        if hasattr(module, "blocks") and isinstance(module.blocks, KeptBlocks):
            module.blocks = None
    return model


def kept(model: MoETransformer) -> dict[str, KeptBlocks]:
    blocks = {name: getattr(module, "blocks", None) for name, module in model.named_modules()}
    return {name: found for name, found in blocks.items() if isinstance(found, KeptBlocks) and found.found}


def check_bits(case: Case, mesh: MeshConfig | None = None, ranks: int = 1) -> tuple[Counter[str], Counter[str]]:
    """Train with kept blocks and without; gives the quantizations of both."""
    with counted(case.transposed) as ours:
        found = train(build(case, mesh, ranks))
    with counted(case.transposed) as theirs:
        expected = train(keep_nothing(build(case, mesh, ranks)))
    assert found.keys() == expected.keys()
    assert any(name.startswith("gradient") for name in found)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    return ours, theirs


LORA = LoraConfig(rank=8, targets=["attention", "experts"])


CASES = {
    "as kernels": Case(transposed=True, mode="full"),
    "adapters": Case(lora=LORA),
    "bf16": Case(),
    "emulated": Case(Compute.bf16_emulated),
    "emulated adapters": Case(Compute.bf16_emulated, lora=LORA),
}
FAST = ("as kernels",)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in FAST)) for name, case in CASES.items()]
)
def test_a_step_quantizes_each_weight_once_with_the_same_bits(case: Case) -> None:
    ours, theirs = check_bits(case)
    number = LINEARS + EXPERTS
    assert ours["quantize"] == number * (1 if case.lora else 2), "the step, and after it the evaluation"
    if case.transposed:
        assert ours["quantize_transposed"] == number
    assert theirs["quantize"] > 3 * number


def on_a_mesh(mesh: MeshConfig, ranks: int, case: Case) -> tuple[Counter[str], Counter[str], set[str]]:
    counts = check_bits(case, mesh, ranks)
    model = build(case, mesh, ranks)
    model(batch(), batch()).total.backward()
    return *counts, set(kept(model))


@pytest.mark.slow
def test_units_that_one_rank_has_are_kept_by_fsdp() -> None:
    ours, theirs, modules = run_distributed(on_a_mesh, 1, MeshConfig(), 1, Case())[0]
    assert ours["quantize"] == 2 * (LINEARS + EXPERTS)
    assert theirs["quantize"] == (2 * 2 + 1) * (LINEARS + EXPERTS), "forward and backward of each micro-batch"
    assert {"layers.1.ffn.experts", "layers.0.attention.q_proj"} <= modules


def test_experts_divided_among_all_ranks_are_kept_and_what_fsdp_gathers_is_not() -> None:
    ours, theirs, modules = run_distributed(on_a_mesh, 2, MeshConfig(1, 2, 2), 2, Case(mode="full"))[0]
    assert modules == {"layers.1.ffn.experts"}
    recomputed = 2 * 3 * EXPERTS - 2  # three passes of two micro-batches, of which the second takes no down
    assert theirs["quantize"] - ours["quantize"] == recomputed + EXPERTS - 2 * EXPERTS


def sharing_chunks(share: bool) -> tuple[Counter[str], dict[str, Tensor], bool]:
    with pytest.MonkeyPatch.context() as patches:
        if not share:
            patches.setattr(Fp8Experts, "in_chunks", GroupedExperts.in_chunks)
        model = build(Case(chunks=2), MeshConfig(1, 4, 2), 4)
        with counted() as counts:
            found = train(model)
    return counts, found, any("experts" in name for name in kept(model))


@pytest.mark.slow
def test_chunks_share_the_blocks_of_gathered_experts() -> None:
    ours, found, left = run_distributed(sharing_chunks, 4, True)[0]
    theirs, expected, _ = run_distributed(sharing_chunks, 4, False)[0]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not left
    assert theirs["quantize"] - ours["quantize"] == (2 * 2 + 1) * EXPERTS, "the second chunk's of every pass"


def changed_by_load(model: MoETransformer) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def changed_by_average(model: MoETransformer) -> None:
    parameters = [parameter.detach() for parameter in model.parameters()]
    ParameterAverage([2 * parameter for parameter in parameters], 0.5).exchange(parameters)


class Doubling(torch.optim.Optimizer):
    """Doubles the parameters, and nothing counts it, as fused optimizers do."""

    def __init__(self, model: MoETransformer) -> None:
        super().__init__(model.parameters(), {})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(2)


def changed_by_a_step(model: MoETransformer) -> None:
    versions = [parameter._version for parameter in model.parameters()]
    Doubling(model).step()
    assert versions == [parameter._version for parameter in model.parameters()]


def changed_by_new_tensors(model: MoETransformer) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(2 * parameter.detach()))


CHANGES = [changed_by_load, changed_by_average, changed_by_a_step, changed_by_new_tensors]


@pytest.mark.parametrize("compute", [Compute.bf16, pytest.param(Compute.fp32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_no_pass_sees_the_blocks_of_older_weights(change, compute: Compute) -> None:
    model = build(Case(compute))
    before = evaluate(model)
    model(batch(), batch()).total.backward()
    model.zero_grad()
    change(model)
    after = evaluate(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, evaluate(keep_nothing(model)))


def test_a_model_that_moves_or_goes_takes_its_blocks_along() -> None:
    model = build(Case(Compute.fp32))
    evaluate(model)
    blocks = kept(model)["layers.0.attention.q_proj"]
    first = blocks.found["weight", False]
    weight = model.layers[0].attention.q_proj.weight
    assert torch.equal(dequantize(first), dequantize(quantize(weight.detach(), Tile.BLOCK)))
    evaluate(model)
    assert blocks.found["weight", False] is first
    model.to(torch.bfloat16)
    evaluate(model)
    assert blocks.found["weight", False] is not first


def test_other_recipes_keep_nothing() -> None:
    model = meta_model(tiny_config())
    parallelize(model, None, PrecisionConfig(fp8=Fp8Config(Fp8Recipe.rowwise)))
    materialize(model, "cpu", 0)
    evaluate(model)
    assert not kept(model)
