"""Runs with Muon: they learn, resume bit for bit, and go on elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.load import read_index
from moefoundry.config import Recipe, UserError
from tests.distributed import run_distributed
from tests.train.runs import LOSSES, Run, run_recipe

Tiny = Callable[..., Recipe]
STEPS = ("optimizer.name=muon", "max_duration=6ba", "save_interval=3ba")
EXPERTS = "mesh.expert=2"
LOSS = "loss/train/lm"


@pytest.fixture(scope="module")
def shared(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("shared"), *STEPS, EXPERTS, "ema.decay=0.9"), 2)


def from_batch_3(run: Run) -> str:
    return f"load_path={run.run_dir / 'checkpoints/ba3'}"


def test_the_loss_falls(shared: Run) -> None:
    assert shared.column(LOSS)[6] < 0.98 * shared.column(LOSS)[1]


def test_checkpoints_hold_momenta_of_matrices_and_moments_of_others(shared: Run) -> None:
    entries = read_index(shared.run_dir / "checkpoints/ba3").tensors
    slots: dict[str, set[str]] = {}
    for name in entries:
        if name.startswith("optimizer/"):
            _, parameter, slot = name.split("/")
            slots.setdefault(parameter, set()).add(slot)
    by_adamw = {name for name, found in slots.items() if found == {"exp_avg", "exp_avg_sq", "step"}}
    assert {name for name, found in slots.items() if found == {"momentum_buffer"}} == slots.keys() - by_adamw
    assert {"model.embed_tokens.weight", "model.lm_head.weight", "model.norm.weight"} <= by_adamw
    for name in ("ffn.experts.gate_proj", "ffn.router.gate.weight", "attention.q_proj.weight"):
        entry = entries[f"optimizer/model.layers.1.{name}/momentum_buffer"]
        weight = entries[f"model/model.layers.1.{name}"]
        assert (entry.spec.dtype, entry.spec.shape) == (torch.float32, weight.spec.shape)


def test_resumes_bit_for_bit(tiny_recipe: Tiny, tmp_path: Path, shared: Run) -> None:
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, EXPERTS, "ema.decay=0.9", from_batch_3(shared)), 2)
    assert resumed.exact() == shared.exact(4)


def test_resumes_on_another_mesh(tiny_recipe: Tiny, tmp_path: Path, shared: Run) -> None:
    """To what rounding to BF16 makes of sums in another order; measured 1e-7."""
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, "ema.decay=0.9", from_batch_3(shared)))
    for key in LOSSES[:2]:
        expected = {batch: value for batch, value in shared.column(key).items() if batch > 3}
        assert resumed.column(key) == pytest.approx(expected, rel=1e-5), key


def whole_state(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the optimizer when ``recipe`` has been built, with the state that it begins with."""
    from torch.distributed.tensor import DTensor

    from moefoundry import build as parts
    from moefoundry.checkpoint.state import optimizer_tensors

    state = parts.build_trainer(recipe).state
    tensors = optimizer_tensors(state.model, state.optimizers[0])
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@pytest.mark.slow
def test_state_goes_to_a_mesh_that_has_parts_of_experts(tiny_recipe: Tiny, tmp_path: Path, shared: Run) -> None:
    """And the same to one rank."""
    few = ("model.moe.num_experts=2", "mesh={replicate: 1, shard: 4, expert: 2}", "device_train_microbatch_size=1")
    saved = run_recipe(tiny_recipe(tmp_path / "saved", *STEPS, *few), 4)
    one = ("model.moe.num_experts=2", f"load_path={saved.run_dir / 'checkpoints/ba6'}", "max_duration=9ba")
    of_four = run_distributed(whole_state, 4, tiny_recipe(tmp_path / "four", *STEPS, *few, *one[1:]))[0]
    of_one = run_distributed(whole_state, 1, tiny_recipe(tmp_path / "one", *STEPS, *one))[0]
    assert of_four.keys() == of_one.keys()
    assert any(tensor.any() for name, tensor in of_one.items() if name.endswith("experts.up_proj/momentum_buffer"))
    assert all(torch.equal(of_four[name], tensor) for name, tensor in of_one.items())


FP8 = ("precision={compute: bf16, fp8: {recipe: deepseek_v3, fsdp_all_gather: true}}", EXPERTS)
CLIPPED = "algorithms.gradient_clipping.clipping_threshold=0.1"
NARROW_COPIES = pytest.param(1, ("precision.compute=bf16",), marks=pytest.mark.slow, id="narrow-copies")


@pytest.mark.parametrize(("ranks", "keys"), [pytest.param(2, (*FP8, CLIPPED), id="fp8-clipped"), NARROW_COPIES])
def test_it_changes_weights_of_which_there_are_copies(
    tiny_recipe: Tiny, tmp_path: Path, ranks: int, keys: tuple[str, ...]
) -> None:
    losses = run_recipe(tiny_recipe(tmp_path, *STEPS, *keys), ranks).column(LOSS)
    assert losses[6] < 0.98 * losses[1]


def test_it_trains_adapters(tiny_recipe: Tiny, tmp_path: Path, shared: Run) -> None:
    """Their gradients become small, more than the losses of so few batches differ."""
    lora = ("lora={rank: 4, targets: [attention, experts]}", from_batch_3(shared), EXPERTS)
    norms = run_recipe(tiny_recipe(tmp_path, *STEPS, *lora), 2).column("grad_norm")
    assert norms[6] < 0.5 * norms[1]


def test_a_step_that_is_not_finite_leaves_momenta_alone(tiny_recipe: Tiny, tmp_path: Path) -> None:
    found = run_distributed(state_around_a_skipped_step, 2, tiny_recipe(tmp_path, *STEPS, "nonfinite=skip"))
    assert found == [(True, 1)] * 2


def state_around_a_skipped_step(recipe: Recipe) -> tuple[bool, int]:
    """Whether the step with a gradient that is not finite changed nothing; and how many were skipped."""
    from composer.core import Callback, State

    from moefoundry import build as parts
    from moefoundry.checkpoint.state import optimizer_tensors
    from moefoundry.trainer import train

    kept: dict[int, dict[str, torch.Tensor]] = {}
    skipped: list[int] = []

    class Spoil(Callback):
        def after_backward(self, state: State, logger: object) -> None:
            if state.timestamp.batch == 2:
                next(p.grad for p in state.model.parameters() if p.grad is not None).to_local().fill_(torch.nan)

        def batch_start(self, state: State, logger: object) -> None:
            if state.timestamp.batch in (2, 3):
                tensors = optimizer_tensors(state.model, state.optimizers[0])
                kept[state.timestamp.batch.value] = {n: t.to_local().clone() for n, t in tensors.items() if "/mom" in n}

        def batch_end(self, state: State, logger: object) -> None:
            skipped.extend([1] * all(p.grad is None for p in state.model.parameters()) * (state.timestamp.batch == 3))

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Spoil()]
    train(recipe)
    before, after = kept[2], kept[3]
    return all(torch.equal(after[name], tensor) for name, tensor in before.items()), len(skipped)


def test_a_checkpoint_of_adamw_gives_its_weights_alone(tiny_recipe: Tiny, tmp_path: Path, shared: Run) -> None:
    adamw = run_recipe(tiny_recipe(tmp_path / "adamw", "max_duration=2ba", "save_interval=2ba"))
    load_path = f"load_path={adamw.run_dir / 'checkpoints/ba2'}"
    with pytest.raises(
        UserError, match=r"^optimizer.name: muon, and .*ba2 has the state of adamw; .*weights_only=true"
    ):
        run_recipe(tiny_recipe(tmp_path / "muon", *STEPS, load_path))
    with pytest.raises(UserError, match=r"^optimizer.name: adamw, and .*ba3 has the state of muon"):
        run_recipe(tiny_recipe(tmp_path / "back", "max_duration=6ba", from_batch_3(shared)))
    weights = run_recipe(tiny_recipe(tmp_path / "begun", *STEPS, load_path, "load_weights_only=true"))
    assert list(weights.column(LOSS)) == [1, 2, 3, 4, 5, 6]
