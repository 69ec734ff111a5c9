"""``device_train_microbatch_size: auto``: where memory ends, all ranks repeat the batch with a smaller size together.

Memory is made to end, on some ranks, in a forward or backward pass of more than so many sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.config import LocalError, Recipe, UserError, load_recipe
from moefoundry.retry import can_forget
from tests.train.runs import Run, finished, run_recipe

Tiny = Callable[..., Recipe]
KEY = "device_train_microbatch_size"
AUTO = f"{KEY}=auto"
STEPS = ("max_duration=2ba", "eval_loader=null", "model.moe.balance.bias_update_rate=0.01")
EXPERTS = "mesh={replicate: 1, shard: 2, expert: 2}"
SHARDS = "mesh={replicate: 1, shard: 2}"
COPIES = "mesh={replicate: 2, shard: 1}"
JITTER = "model.moe.router.input_jitter=0.1"
repeats = pytest.mark.skipif(
    not can_forget(), reason=f"torch {torch.__version__} cannot bring FSDP back from the middle of a step"
)


def little_memory(limit: int, ranks: tuple[int, ...], place: str, first_batch: int = 1) -> None:
    """Let ``torch.OutOfMemoryError`` rise in MoE layers, from batch ``first_batch`` on."""
    from composer.core import Callback
    from composer.utils import dist

    from moefoundry.moe.layer import MoELayer
    from tests.train.test_health import add_callback

    forward, batches = MoELayer.forward, [0]

    class Count(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            batches[0] = state.timestamp.batch.value + 1

    def end(_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    def limited(self: MoELayer, x_BSD: Tensor, *rest: Any) -> Any:
        ends = self.training and len(x_BSD) > limit and dist.get_global_rank() in ranks and batches[0] >= first_batch
        if ends and place == "backward":
            x_BSD.register_hook(end)
        output = forward(self, x_BSD, *rest)
        if ends and place == "forward":
            end(None)
        return output

    MoELayer.forward = limited  # type: ignore[method-assign]
    add_callback(Count())


@pytest.fixture(scope="module")
def fixed_size(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``fixed_size(*changes)``: the run with 2 sequences from the beginning, on 2 ranks."""
    steps = (*STEPS, f"{KEY}=2")
    return cache(lambda *changes: run_recipe(tiny_recipe(tmp_path_factory.mktemp("2"), *steps, *changes), 2))


@repeats
@pytest.mark.parametrize(
    ("changes", "ranks", "place"),
    [
        ((EXPERTS, JITTER), (1,), "forward"),
        pytest.param((EXPERTS, JITTER), (0,), "backward", marks=pytest.mark.slow),
        pytest.param((SHARDS, "activation_checkpointing=full"), (0, 1), "backward", marks=pytest.mark.slow),
        pytest.param((COPIES,), (1,), "backward", marks=pytest.mark.slow),
    ],
    ids=["experts-forward", "experts-backward", "shards-both-ranks", "copies"],
)
def test_all_ranks_halve_together_and_train_as_with_that_size(
    tiny_recipe: Tiny,
    fixed_size: Callable[..., Run],
    tmp_path: Path,
    changes: tuple[str, ...],
    ranks: tuple[int, ...],
    place: str,
) -> None:
    fixed = fixed_size(*changes)
    own = tiny_recipe(tmp_path, *STEPS, *changes, AUTO, "dist_timeout=20")
    run = run_recipe(own, 2, partial(little_memory, 2, ranks, place))
    assert run.exact() == fixed.exact()
    for key in ("moe/max_violation", "moe/load/layer1", "moe/expert_bias_max_abs"):
        assert run.column(key) == fixed.column(key)
    assert "device_train_microbatch_size: auto is 4\n" in run.err
    on = "ranks 0, 1" if len(ranks) > 1 else f"rank {ranks[0]}"
    assert f"warning: batch 1: memory ended on {on}; it is repeated with {KEY} = 2, and was 4\n" in run.err
    assert set(run.column(KEY).values()) == {2.0}
    assert load_recipe(run.run_dir / "config.yaml", stored=True).device_train_microbatch_size == 2


@repeats
def test_it_halves_until_memory_lasts_and_a_resumed_run_keeps_the_size(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe(tmp_path, *STEPS, EXPERTS, AUTO), 2, partial(little_memory, 1, (0,), "backward"))
    assert run.err.count("memory ended") == 2
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, EXPERTS, AUTO, "autoresume=true", "max_duration=3ba"), 2)
    assert resumed.column(KEY) == {1: 1.0, 2: 1.0, 3: 1.0}
    assert "device_train_microbatch_size: auto is 1\n" in resumed.err


@pytest.mark.slow
def test_after_the_trial_the_run_ends_and_the_next_start_takes_half(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Memory ends in the fifth batch, on one of two ranks."""
    recipe = tiny_recipe(tmp_path, *STEPS, "max_duration=5ba", "save_interval=4ba", EXPERTS, AUTO, "autoresume=true")
    with pytest.raises(LocalError) as caught:
        run_recipe(recipe, 2, partial(little_memory, 2, (1,), "forward", 5))
    lines = str(caught.value).splitlines()
    assert lines[0] == "batch 5: memory ended on rank 1: Tried to allocate 2.00 GiB"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["parameters", "gradients", "optimizer state"]
    assert "smallest change that fits: device_train_microbatch_size=2" in lines
    assert set(finished(tmp_path).column(KEY).values()) == {4.0}
    run = run_recipe(recipe, 2, partial(little_memory, 2, (1,), "forward"))
    assert "device_train_microbatch_size: auto is 2\n" in run.err
    assert "memory ended" not in run.err
    assert run.column(KEY) == {**dict.fromkeys(range(1, 5), 4.0), 5: 2.0}


@repeats
def test_one_rank_repeats_any_batch_and_earlier_ones_stay(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Batches 1 to 4 are trained with 8 sequences, the others with 4."""
    steps = (*STEPS, "max_duration=5ba", "save_interval=4ba", JITTER)
    run = run_recipe(tiny_recipe(tmp_path, *steps, AUTO), 1, partial(little_memory, 4, (0,), "forward", 5))
    assert run.column(KEY) == {**dict.fromkeys(range(1, 5), 8.0), 5: 4.0}
    load = f"load_path={tmp_path / 'checkpoints/ba4'}"
    assert run_recipe(tiny_recipe(tmp_path / "rest", *steps, load, f"{KEY}=4")).exact(5) == run.exact(5)


@pytest.mark.slow
def test_each_stage_has_its_size(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The first stage has its own, and memory ends in the second."""
    stages = f"curriculum={{first: {{until: 2ba, {KEY}: 1}}, second: {{until: 4ba, {KEY}: auto}}, third: {{}}}}"
    recipe = tiny_recipe(tmp_path, *STEPS, "max_duration=5ba", EXPERTS, AUTO, stages)
    run = run_recipe(recipe, 2, partial(little_memory, 2, (1,), "forward", 3))
    assert run.column(KEY) == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
    assert f"memory ended on rank 1; it is repeated with {KEY} = 2 of stage second, and was 4\n" in run.err
    kept = load_recipe(run.run_dir / "config.yaml", stored=True).curriculum
    assert kept is not None
    assert [stage.device_train_microbatch_size for stage in kept.values()] == [1, 2, 2]


@pytest.mark.slow
def test_without_room_for_one_sequence_the_run_ends(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^batch 1: memory ended on rank 1"):
        run_recipe(tiny_recipe(tmp_path, *STEPS, EXPERTS, AUTO), 2, partial(little_memory, 0, (1,), "forward"))
