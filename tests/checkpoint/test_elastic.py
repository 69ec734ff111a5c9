"""A run goes on with other ranks on another mesh: the same samples, and the losses of the run that was never
interrupted.

fp32, a balance loss over sequences, and a fixed global batch: what is left is the order in which sums are rounded.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.state import derived_rng_tensors, rng_tensors
from moefoundry.config import Recipe
from tests.checkpoint.meshes import MESHES, Mesh, named
from tests.distributed import run_distributed
from tests.train.runs import LOSSES, Run, run_recipe

Tiny = Callable[..., Recipe]
ALL = [mesh for size in (1, 2, 4) for mesh in MESHES[size]]
SAVED_AT, LAST = 4, 9  # the epoch ends with batch 6
STEPS = (f"max_duration={LAST}ba", f"save_interval={SAVED_AT}ba", "save_num_checkpoints_to_keep=-1")
SAMPLE = [((1, 4, 2), (2, 1, 1))]


def on(mesh: Mesh) -> str:
    replicate, shard, expert = mesh
    return f"mesh={{replicate: {replicate}, shard: {shard}, expert: {expert}}}"


@pytest.fixture(scope="module")
def whole(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mesh], Run]:
    """The run on one mesh that is never interrupted."""
    runs: dict[Mesh, Run] = {}

    def run(mesh: Mesh) -> Run:
        if mesh not in runs:
            root = tmp_path_factory.mktemp(named(mesh))
            runs[mesh] = run_recipe(tiny_recipe(root, *STEPS, "device_train_microbatch_size=1", on(mesh)), size(mesh))
        return runs[mesh]

    return run


def size(mesh: Mesh) -> int:
    return mesh[0] * mesh[1]


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        pytest.param(a, b, id=f"{named(a)} to {named(b)}", marks=() if (a, b) in SAMPLE else pytest.mark.slow)
        for a in ALL
        for b in ALL
        if a != b
    ],
)
@pytest.mark.slow
def test_row3_the_next_losses_are_those_of_the_uninterrupted_run(
    tiny_recipe: Tiny, tmp_path: Path, whole: Callable[[Mesh], Run], saved_on: Mesh, resumed_on: Mesh
) -> None:
    load_path = f"load_path={whole(saved_on).run_dir / 'checkpoints' / f'ba{SAVED_AT}'}"
    changes = (*STEPS, "device_train_microbatch_size=1", on(resumed_on), load_path, "save_interval=1000ba")
    resumed = run_recipe(tiny_recipe(tmp_path, *changes), size(resumed_on))
    for key in (*LOSSES, "lr"):
        expected = {batch: value for batch, value in whole(saved_on).column(key).items() if batch > SAVED_AT}
        assert list(expected) == list(range(SAVED_AT + 1, LAST + 1))
        assert resumed.column(key) == pytest.approx(expected, rel=1e-6), key


def samples_of(recipe: Recipe) -> list[list[int]]:
    """What this rank reads in each batch: a hash of every sequence."""
    from composer.core import Callback

    from moefoundry import build as parts
    from moefoundry.trainer import train

    batches: list[list[int]] = []

    class Watch(Callback):
        def after_dataloader(self, state, logger) -> None:  # type: ignore[no-untyped-def]
            batches.append([hash(tuple(row)) for row in state.batch["input_ids"].tolist()])

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Watch()]
    train(recipe)
    return batches


@pytest.mark.slow  # the data alone are read so in tests/data, by every row
def test_row4_mid_epoch_other_ranks_read_the_same_samples_in_each_global_batch(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Up to the end of the next epoch. 3 ranks do not divide 8 sequences, but 12."""
    steps = ("max_duration=8ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", "global_train_batch_size=12")
    steps = (*steps, "device_train_microbatch_size=12")

    def read(ranks: int, *changes: str) -> list[list[int]]:
        recipe = tiny_recipe(tmp_path / f"{ranks}-{len(changes)}", *steps, "mesh={shard: -1}", *changes)
        return [sorted(chain(*batch)) for batch in zip(*run_distributed(samples_of, ranks, recipe), strict=True)]

    expected = read(2)
    assert len({tuple(batch) for batch in expected}) == len(expected) == 8
    for ranks in (1, 3, 4):
        assert read(ranks, f"load_path={tmp_path / '2-0' / 'checkpoints' / 'ba2'}") == expected[2:], ranks


@pytest.mark.slow
def test_row27_a_resume_of_a_resume_and_a_second_resume_are_the_same_run(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Bit for bit, with experts that two ranks share."""
    steps = ("max_duration=8ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", on((1, 2, 2)))

    def run(name: str, start: Run | None = None, batch: int = 0) -> Run:
        load_path = [] if start is None else [f"load_path={start.run_dir / 'checkpoints' / f'ba{batch}'}"]
        return run_recipe(tiny_recipe(tmp_path / name, *steps, *load_path), 2)

    uninterrupted = run("whole")
    first = run("first", uninterrupted, 2)
    assert first.exact() == uninterrupted.exact(3)
    assert run("again", uninterrupted, 2).exact() == uninterrupted.exact(3)
    assert run("resume of a resume", first, 6).exact() == uninterrupted.exact(7)


def test_further_ranks_have_generators_of_their_own() -> None:
    """The same for the same seed, batch and rank; making them leaves the present generators alone."""
    before = rng_tensors(5)
    derived = derived_rng_tensors(5, seed=17, batch=4)
    assert all(torch.equal(state, before[name]) for name, state in rng_tensors(5).items())
    again = derived_rng_tensors(5, seed=17, batch=4)
    assert all(torch.equal(state, again[name]) for name, state in derived.items())
    for other in ((6, 17, 4), (5, 18, 4), (5, 17, 5)):
        states = derived_rng_tensors(*other).values()
        differing = {
            name.rpartition("/")[2]
            for (name, state), another in zip(derived.items(), states, strict=True)
            if not torch.equal(state, another)
        }
        assert differing == {"torch", "python", "numpy"}, "no normal number is kept back"


def draws_of(recipe: Recipe) -> list[float]:
    """What this rank's generator gives at the start of each batch."""
    from composer.core import Callback

    from moefoundry import build as parts
    from moefoundry.trainer import train

    draws: list[float] = []

    class Draw(Callback):
        def batch_start(self, state, logger) -> None:  # type: ignore[no-untyped-def]
            draws.append(torch.rand(()).item())

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Draw()]
    train(recipe)
    return draws


@pytest.mark.slow
def test_ranks_that_the_checkpoint_knows_go_on_with_their_generators(tiny_recipe: Tiny, tmp_path: Path) -> None:
    steps = ("max_duration=4ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1")
    saved = run_distributed(draws_of, 2, tiny_recipe(tmp_path / "saved", *steps))
    load_path = f"load_path={tmp_path / 'saved' / 'checkpoints' / 'ba2'}"
    more = run_distributed(draws_of, 4, tiny_recipe(tmp_path / "more", *steps, load_path))
    assert more[:2] == [draws[2:] for draws in saved]
    assert len({tuple(draws) for draws in more}) == 4
    fewer = run_distributed(draws_of, 1, tiny_recipe(tmp_path / "fewer", *steps, load_path))
    assert fewer == [saved[0][2:]]
