"""What ``validate`` lets pass trains: a thousand changes of a recipe are refused with their key, or train one batch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Callback, State, Time, Timestamp
from composer.loggers import Logger
from hypothesis import HealthCheck, Phase, given, settings

from moefoundry.config import Recipe, UserError, advice, dump_recipe, load_recipe
from moefoundry.config.layers import Layers, leaves_of
from moefoundry.config.loader import recipe_of
from moefoundry.config.spec import plain
from moefoundry.config.versions import FORMAT_VERSION
from tests.config.mutations import Mutation, mutations
from tests.distributed import run_distributed

COUNT, FEWER = 1_000, 120
NUMBERS = count()
SMALL = ("callbacks.report={max_new_tokens: 2, prompt: def}", "ema={evaluate: true}", "global_train_batch_size=4")
MORE = ("model.n_layers=2", "precision.compute=bf16_emulated", "loggers.tensorboard={}", "save_keep_every=2ba")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [FEWER, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_mutations_are_refused_with_their_key_or_compute(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, number: int
) -> None:
    """Every part but Composer's loop: the model's forward and backward pass, and all that is made of the recipe."""
    tree = plain(tiny_recipe(tmp_path / "run", *SMALL, *MORE))
    (outcomes,) = run_distributed(mutate, 1, tree, tmp_path, compute, number, timeout=580)
    assert sum(outcomes.values()) == number
    assert min(outcomes["refused"], outcomes["accepted"]) > number / 5, "one side is hardly tested"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_mutations_are_refused_with_their_key_or_train_a_batch(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    tree = plain(tiny_recipe(tmp_path / "run", *SMALL, *MORE))
    (outcomes,) = run_distributed(mutate, 1, tree, tmp_path, train_one_batch, COUNT, timeout=3500)
    assert sum(outcomes.values()) == COUNT


def mutate(tree: dict[str, Any], directory: Path, use: Callable[[Recipe, Path], None], number: int) -> Counter[str]:
    """Mutate ``tree`` so many times; how many were refused, and accepted and used."""
    from moefoundry.cli.validate import check_files

    os.chdir(directory)
    os.environ["HOME"] = str(directory)
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutation=mutations(tree))
    def one(mutation: Mutation) -> None:
        try:
            layers = Layers("recipe")
            layers.add(leaves_of(mutation.tree), "recipe")
            recipe = recipe_of(layers, world_size=1)
            check_files(recipe, 1)
        except UserError as error:
            if not names_the_key(error, mutation.keys):
                raise AssertionError(f"{mutation.keys} are not named") from error
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
            recipe.compile = False  # has tests of its own, and takes seconds
            if recipe.model.moe.backend == "triton":  # what devices can do is for training to find out
                recipe.model.moe.backend = "auto"
            use(recipe, directory)

    one()
    return outcomes


def names_the_key(error: UserError, keys: tuple[str, ...]) -> bool:
    """Whether a problem's path is that of a changed key, lies above or below it, or its message names the key."""
    paths = [problem.path.partition("[")[0] for problem in getattr(error, "problems", [])]
    for key in keys:
        nested = any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for path in paths)
        if nested or key.rpartition(".")[2] in str(error):
            return True
    return False


def compute(recipe: Recipe, directory: Path) -> None:
    """What training makes of a recipe, but for Composer's loop, and what ``validate`` says of it."""
    import torch
    from composer.utils import get_device

    from moefoundry import build as parts
    from moefoundry.callbacks.learning_rate import build_schedule
    from moefoundry.callbacks.metrics_file import MetricsFile
    from moefoundry.conversion.families import exports_as
    from moefoundry.optim import build_adamw

    if next(NUMBERS) % 10 == 0:  # to read YAML takes longer than all below
        file = directory / "written.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        recipe.format_version = FORMAT_VERSION  # an earlier one is read as that
        assert load_recipe(file) == recipe, "what a run keeps is what it was given"
    assert exports_as(recipe.model)
    assert all(problem.suggestion for problem in advice(recipe))

    model = parts.build_model(recipe, parts.setup_meshes(recipe, get_device("cpu")), get_device("cpu"))
    parts.materialize(model, "cpu", recipe.seed)
    parts.build_callbacks(recipe, model, MetricsFile(directory), {}, None)
    parts.build_console(recipe, model)
    optimizer = build_adamw(model, recipe.optimizer, recipe.precision.optimizer_moments, recipe.seed)
    schedule = build_schedule(recipe.scheduler)
    for batch in (0, 3):
        now = Timestamp(epoch=0, batch=batch, sample=batch * 4, token=batch * 256)
        duration = Time.from_timestring(recipe.max_duration)
        schedule(SimpleNamespace(timestamp=now, max_duration=duration, dataloader_len=Time(10, "ba")))
    ids = torch.randint(recipe.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = model(ids, ids, sequence_id=torch.zeros_like(ids))
    losses.total.backward()
    assert losses.total.isfinite(), "the first loss"
    optimizer.step()


class StopAfterOneBatch(Callback):
    def batch_end(self, state: State, logger: Logger) -> None:
        state.stop_training()


def train_one_batch(recipe: Recipe, directory: Path) -> None:
    """Train as the command does, in a run_dir of its own, to the report; trackers of other services are left out."""
    from moefoundry import build as parts
    from moefoundry.trainer import train
    from tests.train.runs import finished

    if "://" in f"{recipe.load_path}{recipe.save_remote}{recipe.train_loader.dataset.remote}":
        return  # what another machine has, no rule knows
    recipe.run_dir = str(directory / "runs" / str(next(NUMBERS)) / recipe.run_dir.lstrip("/"))
    recipe.loggers.wandb = recipe.loggers.mlflow = None
    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), StopAfterOneBatch()]
    try:
        train(recipe)
    finally:
        parts.build_callbacks = build_callbacks
    assert len(finished(Path(recipe.run_dir)).metrics) == 1
