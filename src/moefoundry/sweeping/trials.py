"""Trials of a sweep: a point, the recipe that it gives, and the directory of its run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.config import ConfigError, Problem, Recipe, load_recipe
from moefoundry.config.errors import UserError
from moefoundry.sweeping.axes import Point

if TYPE_CHECKING:
    from moefoundry.data.options import Part

SWEEP_FILE, RUNS = "sweep.json", "runs"
NAME_LENGTH = 60


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
        point: Text of each swept key.
        run_dir: Directory of its run.
        overrides: All overrides of the run's command.
        problem: Reason why it cannot be trained; empty if it can.
    """

    point: Point
    run_dir: Path
    overrides: tuple[str, ...]
    problem: str = ""

    @property
    def label(self) -> str:
        """Values by the last names of their keys."""
        return " ".join(f"{key.rpartition('.')[2]}={text}" for key, text in self.point.items())


@dataclass(frozen=True)
class Budget:
    """Length of every trial: as many tokens, or as many as some FLOPs pay for; neither leaves ``max_duration``."""

    tokens: int | None = None
    flops: float | None = None

    def duration(self, recipe: Recipe) -> str | None:
        """Give ``max_duration`` in batches, the last of which reaches the budget; None leaves it as it is."""
        tokens = self.tokens
        if recipe.curriculum is not None and (tokens or self.flops):
            raise ConfigError(
                [Problem("curriculum", "its borders do not move with --tokens and --flops", allowed="null")]
            )
        if self.flops is not None:
            from moefoundry.planning.work import flops_per_token

            tokens = math.ceil(self.flops / flops_per_token(recipe.model, recipe.max_seq_len))
        if tokens is None:
            return None
        return f"{max(1, math.ceil(tokens / (recipe.global_train_batch_size * recipe.max_seq_len)))}ba"


@dataclass(frozen=True)
class Sweep:
    """Recipe and directory of a sweep.

    Attributes:
        directory: Directory of the sweep; its runs lie in ``runs/``.
        recipe: File of the recipe; None for none.
        same: Overrides of all runs.
        budget: Length of each run.
        ranks: Ranks of each run.
    """

    directory: Path
    recipe: str | None
    same: tuple[str, ...]
    budget: Budget
    ranks: int

    def trials(self, points: Iterable[Point]) -> list[Trial]:
        """Make a trial of each point; equal ones once."""
        return [self._trial(point) for point in _distinct(points)]

    def _trial(self, point: Point) -> Trial:
        own = [f"{key}={text}" for key, text in point.items()]
        run_dir = self.directory / RUNS / _name(point)
        given = [*self.same, *own]
        fixed = [f"run_name={_plain(self.directory.name)}-{run_dir.name}", f"run_dir={run_dir}", "autoresume=true"]
        try:
            recipe = load_recipe(self.recipe, [*given, *fixed], world_size=self.ranks)
            if (duration := self.budget.duration(recipe)) is not None:
                given.append(f"max_duration={duration}")
                load_recipe(self.recipe, [*given, *fixed], world_size=self.ranks)
        except ConfigError as error:
            return Trial(point, run_dir, (*given, *fixed), "; ".join(str(problem) for problem in error.problems))
        return Trial(point, run_dir, (*given, *fixed))

    def remember(self) -> None:
        """Write down what all runs have in common, or compare it with what is there.

        Raises:
            UserError: A sweep of another recipe, or with other overrides, lies in the directory.
        """
        file = self.directory / SWEEP_FILE
        found = {
            "recipe": hashlib.sha256(Path(self.recipe).read_bytes()).hexdigest() if self.recipe else None,
            "overrides": list(self.same),
            "tokens": self.budget.tokens,
            "flops": self.budget.flops,
            "ranks": self.ranks,
        }
        if file.exists():
            before = _remembered(file)
            if changed := [key for key in found if found[key] != before.get(key)]:
                raise UserError(
                    f"{self.directory}: a sweep with other {' and '.join(changed)} lies there; give another --output"
                )
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found, indent=2))


def _remembered(file: Path) -> dict[str, Any]:
    """Read what all runs have in common.

    Raises:
        UserError: The file is damaged.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged; give another --output, or delete it if its runs are of this sweep")
    return found


def part_of(trials: Sequence[Trial], part: Part) -> list[Trial]:
    """Choose the trials of a part, for array jobs of a scheduler; neighbors, which are alike, go to different ones."""
    return list(trials[part.number - 1 :: part.count])


def _distinct(points: Iterable[Point]) -> list[Point]:
    return list({json.dumps(point, sort_keys=True): point for point in points}.values())


def _name(point: Point) -> str:
    """Name a run's directory by its values; a digest tells long or odd ones apart."""
    words = "-".join(f"{key.rpartition('.')[2]}_{text}" for key, text in point.items())
    plain = _plain(words)[:NAME_LENGTH]
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:6]
    return f"{plain}-{digest}" if plain else digest


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
