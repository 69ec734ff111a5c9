"""``verify`` passes what is right, and finds what is not: faults are planted in the ranks, which are forked from here.

A test starts one process with the libraries imported; it plants the fault, if there is one, and runs the check. The
ranks that the check forks inherit the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moefoundry.config import Recipe, load_recipe
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed

BIASED = (
    "model.moe.router.score_function=sigmoid",
    "model.moe.num_shared_experts=1",
    "model.n_dense_layers=1",
    "model.attention={kind: mla, n_heads: 4, q_lora_rank: 24, kv_lora_rank: 24, qk_nope_head_dim: 8, "
    "qk_rope_head_dim: 8, v_head_dim: 8}",
)
"""A recipe of the family deepseek_v3, whose routers have a bias."""


def run_checks(recipe: Recipe, names: list[str], room: Path, plant: Callable[[], None] | None) -> list[Any]:
    from moefoundry.verify.checks import run
    from moefoundry.verify.twin import make_twin

    if plant is not None:
        plant()
    return list(run(make_twin(recipe, room, ranks=2), names))


def results_of(
    room: Path, name: str, *changes: str, plant: Callable[[], None] | None = None
) -> dict[str, tuple[bool | None, str]]:
    """Claim -> verdict and detail of a check."""
    recipe = load_recipe(QUICKSTART, changes)
    (answer,) = run_distributed(run_checks, 1, recipe, [name], room, plant, timeout=150.0)[0]
    return {result.claim: (result.passed, result.detail) for result in answer.results}


def failed(results: dict[str, tuple[bool | None, str]]) -> dict[str, str]:
    return {claim: detail for claim, (passed, detail) in results.items() if passed is False}


# ----------------------------------------------------------------------------------------------------- planted faults


def unsummed_copies() -> None:
    """Gradients are not summed over ``replicate``."""
    from torch.distributed.fsdp import FSDPModule

    wanted = FSDPModule.set_requires_all_reduce
    FSDPModule.set_requires_all_reduce = lambda self, _wanted, recurse=True: wanted(self, False, recurse=recurse)


def unscaled_experts() -> None:
    """Gradients of experts that ranks share are sums over the ranks' tokens, where all others are means."""
    from moefoundry import parallel

    parallel._divide = lambda gradients, number: None


def dropped_bias() -> None:
    """The family knows nothing of the experts' biases."""
    from moefoundry.conversion.families.deepseek_moe import DeepseekMoe

    pieces = DeepseekMoe.pieces
    DeepseekMoe.pieces = lambda self, cfg: (p for p in pieces(self, cfg) if not p.name.endswith("expert_bias"))


def zeroed_bias() -> None:
    """The biases are there, and their values are lost on the way out."""
    from moefoundry.conversion.tensor_map import TensorMap

    blocks = TensorMap.their_blocks

    def zeroed(self: Any, name: str, ours: Any, spec: Any) -> Iterator[torch.Tensor]:
        for values in blocks(self, name, ours, spec):
            yield torch.zeros_like(values) if name.endswith("e_score_correction_bias") else values

    TensorMap.their_blocks = zeroed


def counted_twice() -> None:
    """Every layer's balance loss is added twice, whatever is recomputed."""
    from moefoundry.model.transformer import MoETransformer

    losses = MoETransformer._balance_losses
    MoETransformer._balance_losses = lambda self, stats, counts: [*losses(self, stats, counts)] * 2


def counted_again_when_recomputed() -> None:
    """As where losses are kept in a list that a recomputed forward pass appends to."""
    from moefoundry import parallel

    checkpoint = parallel._checkpoint_activations

    def checkpointed(model: Any, mode: Any) -> None:
        checkpoint(model, mode)
        model._balance_losses = lambda stats, counts: [2 * each.balance_loss for each in stats]

    parallel._checkpoint_activations = checkpointed


def repeated_batch() -> None:
    """The loader gives its third batch twice."""
    from moefoundry.data.loader import TokenDataLoader

    iterate = TokenDataLoader.__iter__

    def repeating(self: Any) -> Iterator[Any]:
        for number, batch in enumerate(iterate(self), start=1):
            yield from [batch] * (2 if number == 3 else 1)

    TokenDataLoader.__iter__ = repeating


def repeated_in_place_of_another() -> None:
    """The loader gives its third batch in place of the fourth, so that the epoch is as long as it should be."""
    from moefoundry.data.loader import TokenDataLoader

    iterate = TokenDataLoader.__iter__

    def repeating(self: Any) -> Iterator[Any]:
        kept = None
        for number, batch in enumerate(iterate(self), start=1):
            yield kept if number == 4 else batch
            kept = batch

    TokenDataLoader.__iter__ = repeating


def other_bits_after_a_resume() -> None:
    """The moments of the optimizer begin anew."""
    from moefoundry.checkpoint import state

    state.optimizer_tensors = lambda model, optimizer: {}


# ---------------------------------------------------------------------------------------------------------- the tests


def test_meshes(tmp_path: Path) -> None:
    results = results_of(tmp_path, "meshes")
    assert failed(results) == {}
    assert results["gradients are those of one rank"] == (True, "38 tensors, 3 meshes")


@pytest.mark.parametrize(
    ("plant", "mesh", "first"),
    [
        (unscaled_experts, "replicate 1 x shard 2, expert 2", "layers.2.ffn.experts.down_proj (block 2)"),
        pytest.param(unsummed_copies, "replicate 2 x shard 1, expert 1", "lm_head.weight", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_gradient_scale_on_one_axis(tmp_path: Path, plant: Callable[[], None], mesh: str, first: str) -> None:
    found = failed(results_of(tmp_path, "meshes", plant=plant))
    assert found["gradients are those of one rank"].startswith(f"{mesh}: first in {first}, by ")
    assert "losses are those of one rank" not in found


@pytest.mark.slow
def test_balance(tmp_path: Path) -> None:
    results = results_of(tmp_path, "balance")
    assert failed(results) == {}
    assert all(passed for passed, _ in results.values())


@pytest.mark.slow
def test_what_depends_on_micro_batches_is_not_said_to_be_tried(tmp_path: Path) -> None:
    results = results_of(tmp_path, "balance", "model.moe.balance.aux_loss_scope=global_batch")
    assert failed(results) == {}
    assert "losses do not depend on recomputation" in results
    passed, detail = results["neither depends on micro-batches"]
    assert passed is None
    assert detail == "not tried: aux_loss_scope global_batch depends on the micro-batch by definition"


@pytest.mark.parametrize(
    ("plant", "claim"),
    [
        pytest.param(counted_twice, "balance and z-loss are what they are defined to be", marks=pytest.mark.slow),
        (counted_again_when_recomputed, "losses do not depend on micro-batches or recomputation"),
    ],
)
def test_a_balance_loss_counted_twice(tmp_path: Path, plant: Callable[[], None], claim: str) -> None:
    found = failed(results_of(tmp_path, "balance", plant=plant))
    assert "loss balance" in found[claim]
    assert ("the total has them once" in found) == (plant is counted_twice)


def test_round_trip(tmp_path: Path) -> None:
    results = results_of(tmp_path, "round_trip", *BIASED, "model.document_masking=true")
    assert failed(results) == {}
    assert "16 experts, 2 biases" in results["every expert and bias has its Hugging Face tensor"][1]
    assert results["transformers computes the same logits"][0]


@pytest.mark.parametrize("plant", [dropped_bias, pytest.param(zeroed_bias, marks=pytest.mark.slow)])
def test_an_expert_bias_dropped_in_conversion(tmp_path: Path, plant: Callable[[], None]) -> None:
    found = failed(results_of(tmp_path, "round_trip", *BIASED, plant=plant))
    claim = "every expert and bias has its Hugging Face tensor" if plant is dropped_bias else "every tensor comes back"
    assert "layers.1.ffn.router.expert_bias (block 1)" in found[claim]


def test_the_round_trip_of_a_model_that_another_is_exported_for(tmp_path: Path) -> None:
    results = results_of(tmp_path, "round_trip")
    assert failed(results) == {}
    assert "qwen2_moe" in (found := results["every expert and bias has its Hugging Face tensor"][1])
    assert "computes the same with moe.shared_expert_gate that is always 1/2" in found
    assert results["transformers computes the same logits"][0]


def test_no_family(tmp_path: Path) -> None:
    ((_, (passed, detail)),) = results_of(tmp_path, "round_trip", "model.moe.router.gate_bias=true").items()
    assert passed is None
    assert detail.startswith("no Hugging Face family: model.")


@pytest.mark.slow
def test_order(tmp_path: Path) -> None:
    assert failed(results_of(tmp_path, "order")) == {}


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        pytest.param(repeated_batch, "7 batches, and the loader has 6", marks=pytest.mark.slow),
        (repeated_in_place_of_another, "batch 4 is batch 3 again"),
    ],
)
def test_a_loader_that_repeats_a_batch(tmp_path: Path, plant: Callable[[], None], words: str) -> None:
    found = failed(results_of(tmp_path, "order", plant=plant))
    assert words in found.pop("no batch comes twice, and none is left out")
    assert found == {}, "every way to read the data repeats it"


@pytest.mark.slow
def test_resume(tmp_path: Path) -> None:
    assert failed(results_of(tmp_path, "resume")) == {}


@pytest.mark.slow
def test_a_resume_without_moments(tmp_path: Path) -> None:
    found = failed(results_of(tmp_path, "resume", plant=other_bits_after_a_resume))
    assert found["after SIGKILL every later batch has the same bits"].startswith("batch 4: ")


@pytest.mark.slow
def test_faults(tmp_path: Path) -> None:
    results = results_of(tmp_path, "faults")
    assert failed(results) == {}
    assert {"recovery seconds after a killed rank", "batches lost from a damaged checkpoint"} <= results.keys()
