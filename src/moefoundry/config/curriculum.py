"""The stages of a run: a function of the recipe and the number of a batch, and of nothing else.

A border in tokens counts positions, batch size times sequence length, room at the end of rows included. So the stage of
a batch is known before any data are read, and is the same on any number of ranks and after any stop. A stage ends with
the first batch that reaches its border.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moefoundry.config.schema import Recipe
from moefoundry.config.schema_curriculum import StageConfig, StageStreamConfig

KEY = "curriculum"


@dataclass(frozen=True)
class Stage:
    """Consecutive batches of one kind.

    Attributes:
        name: Its name; "" in a run without a curriculum.
        first: Number of its first batch, from 0.
        end: Number of the batch behind its last; None if it does not end.
        batch_size: Sequences of a global batch.
        seq_len: Tokens of a sequence.
        microbatch_size: Sequences of a forward pass of one rank.
        proportions: Relative shares of streams in its rows, by name; None takes them as the dataset's streams say.
    """

    name: str
    first: int
    end: int | None
    batch_size: int
    seq_len: int
    microbatch_size: int
    proportions: tuple[tuple[str, float], ...] | None = None

    @property
    def tokens_per_batch(self) -> int:
        """Positions of a global batch."""
        return self.batch_size * self.seq_len

    def describe(self) -> str:
        """Sum the stage up in a line."""
        place = f"from batch {self.first + 1} on" if self.end is None else f"batches {self.first + 1} to {self.end}"
        mixture = "".join(f", {name} {share:g}" for name, share in self.proportions or ())
        return f"stage {self.name}: {place}, {self.batch_size} x {self.seq_len} tokens{mixture}"


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """List the stages of a run in order; one where there is no curriculum."""
    sizes = (recipe.global_train_batch_size, recipe.max_seq_len, recipe.device_train_microbatch_size)
    return _resolved(recipe.curriculum, *sizes)


def stages_of_flat(flat: Mapping[str, Any]) -> tuple[Stage, ...]:
    """List the stages of a flat recipe, as a checkpoint holds it."""
    found: dict[str, StageConfig] = {}
    for key, value in flat.items():
        above, _, rest = key.partition(".")
        if above != KEY or not rest:
            continue
        name, _, leaf = rest.partition(".")
        stage = found.setdefault(name, StageConfig())
        below, _, stream_key = leaf.partition(".")
        if not stream_key:
            setattr(stage, leaf, value)
        else:
            streams = stage.streams or {}
            stage.streams = streams | {stream_key.partition(".")[0]: StageStreamConfig(value)}
            assert below == "streams", leaf
    sizes = ("global_train_batch_size", "max_seq_len", "device_train_microbatch_size")
    return _resolved(found, *(flat[key] for key in sizes))


def _resolved(
    curriculum: Mapping[str, StageConfig] | None, batch_size: int, seq_len: int, microbatch_size: int
) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    first, tokens = 0, 0
    for name, cfg in (curriculum or {"": StageConfig()}).items():
        stage = Stage(
            name,
            first,
            None,
            cfg.global_train_batch_size or batch_size,
            cfg.max_seq_len or seq_len,
            cfg.device_train_microbatch_size or microbatch_size,
            None if cfg.streams is None else tuple((n, each.proportion) for n, each in sorted(cfg.streams.items())),
        )
        if cfg.until is None:
            return (*stages, stage)
        number, unit = int(cfg.until.rstrip("abkot")), cfg.until.lstrip("0123456789")
        end = number if unit == "ba" else first - (tokens - number) // stage.tokens_per_batch
        tokens += (end - first) * stage.tokens_per_batch
        first = end
        stages.append(replace(stage, end=end))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], batch: int) -> Stage:
    """Find the stage of a batch, which counts from 0."""
    return stages[max(0, bisect_right([stage.first for stage in stages], batch) - 1)]


def rows_of_a_batch(stages: Sequence[Stage], seq_len: int) -> int:
    """Count the rows of ``seq_len`` tokens that the largest batch fills."""
    return max(-(-stage.tokens_per_batch // seq_len) for stage in stages)


def batches_until(stages: Sequence[Stage], duration: str) -> list[int] | None:
    """Count the batches of each stage in a run of this length; None if that is in epochs."""
    left, unit = int(duration.rstrip("abekopst")), duration.lstrip("0123456789")
    counts = []
    for stage in stages:
        of_a_batch = {"ba": 1, "sp": stage.batch_size, "tok": stage.tokens_per_batch}.get(unit)
        if of_a_batch is None:
            return None
        batches = -(-left // of_a_batch)
        counts.append(batches if stage.end is None else min(stage.end - stage.first, batches))
        left = max(0, left - counts[-1] * of_a_batch)
    return counts


def described_stages(recipe: Recipe) -> list[str]:
    """Sum each stage of a curriculum up in a line, as far as the run goes; nothing where there is none."""
    stages = stages_of(recipe) if recipe.curriculum else ()
    counts = batches_until(stages, recipe.max_duration)
    if counts is None:  # in epochs, which a curriculum is not measured in
        return []
    return [
        replace(stage, end=stage.end and stage.first + count).describe()
        if count
        else f"stage {stage.name}: not reached; it would begin with batch {stage.first + 1}, and the run ends before"
        for stage, count in zip(stages, counts, strict=True)
    ]


def past_of(stages: Sequence[Stage], batches: int) -> list[Stage]:
    """List what has decided the first ``batches`` batches of a run; equal lists mean equal batches."""
    return [
        replace(stage, name="", microbatch_size=0, end=batches if stage.end is None else min(stage.end, batches))
        for stage in stages
        if stage.first < batches
    ]


def of_stage(recipe: Recipe, stage: Stage) -> Recipe:
    """Give the recipe of a run whose batches are all as in one of its stages."""
    return replace(
        recipe,
        curriculum=None,
        max_seq_len=stage.seq_len,
        global_train_batch_size=stage.batch_size,
        device_train_microbatch_size=stage.microbatch_size,
    )
