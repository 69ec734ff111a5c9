"""Repeat a step that was not finite, from the state that the run has saved before it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from composer.utils import dist

from moefoundry.build import build_trainer
from moefoundry.callbacks.health import named_collectives
from moefoundry.callbacks.nonfinite import NonFiniteSearch, ReplayedError
from moefoundry.checkpoint.nonfinite import newest_saved
from moefoundry.checkpoint.run_dir import CONFIG_FILE
from moefoundry.config import LoggersConfig, Recipe, UserError, load_recipe

SCRATCH = ".replay"


def replay(run_dir: Path, overrides: Sequence[str] = ()) -> str:
    """Repeat the newest step that was saved; every rank calls it.

    Args:
        run_dir: The run.
        overrides: Values of other keys, ``key=value``.

    Returns:
        The batch, and the first tensor that is not finite.

    Raises:
        UserError: The run has saved no such step, or its data or mesh are not what they were.
    """
    store, batch = newest_saved(run_dir)
    recipe = load_recipe(run_dir / CONFIG_FILE, overrides, stored=True)
    scratch = store.root / SCRATCH
    try:
        return f"batch {batch + 1}: {_replayed(_for_replay(recipe, store.path(batch), scratch))}"
    finally:
        if dist.get_global_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _for_replay(recipe: Recipe, checkpoint: Path, scratch: Path) -> Recipe:
    return replace(
        recipe,
        run_dir=str(scratch),
        load_path=str(checkpoint),
        load_weights_only=False,
        autoresume=False,
        save_remote=None,
        callbacks=replace(recipe.callbacks, report=None),
        loggers=LoggersConfig(),
        log_to_console=False,
        progress_bar=False,
    )


def _replayed(recipe: Recipe) -> str:
    with named_collectives(recipe.dist_timeout):
        trainer = build_trainer(recipe)
        (search,) = (each for each in trainer.state.callbacks if isinstance(each, NonFiniteSearch))
        search.replays = True
        try:
            trainer.fit()
        except ReplayedError as replayed:
            return str(replayed)
        finally:
            trainer.close()
    raise UserError("the run has no batch left to replay")
