"""Rules for a curriculum."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.curriculum import KEY, Stage, stages_of
from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_curriculum import StageConfig
from moefoundry.config.schema_data import PackingMethod
from moefoundry.config.schema_parts import WarmupConfig


def curriculum_problems(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    """List what is wrong with the stages of a run, each by itself and one after another."""
    if recipe.curriculum is None:
        return
    borders = [*_border_problems(recipe.curriculum)]
    yield from borders or _order_problems(stages_of(recipe))
    ranks = world_size or max(1, recipe.mesh.replicate) * max(1, recipe.mesh.shard)
    for name, stage in recipe.curriculum.items():
        yield from _size_problems(recipe, stage, f"{KEY}.{name}", ranks)
        yield from _stream_problems(recipe, stage, f"{KEY}.{name}.streams")
    yield from _companion_problems(recipe)


def _border_problems(curriculum: dict[str, StageConfig]) -> Iterator[Problem]:
    *before, (last, final) = curriculum.items()
    for name, stage in before:
        if stage.until is None:
            yield Problem(f"{KEY}.{name}.until", "null, and another stage follows", "a border such as 1000000tok")
    if final.until is not None:
        message = f"{final.until}, but the last stage goes on to the end of training"
        yield Problem(f"{KEY}.{last}.until", message, allowed="null")


def _order_problems(stages: tuple[Stage, ...]) -> Iterator[Problem]:
    for stage in stages:
        if stage.end is not None and stage.end <= stage.first:
            message = f"the stage before it ends at batch {stage.first}, and this one at batch {stage.end}"
            yield Problem(f"{KEY}.{stage.name}.until", message, allowed="stages in the order in which they end")
            return


def _size_problems(recipe: Recipe, stage: StageConfig, path: str, ranks: int) -> Iterator[Problem]:
    length, batch = stage.max_seq_len, stage.global_train_batch_size
    if length is not None and length > recipe.max_seq_len:
        message = f"{length} is above the recipe's max_seq_len"
        yield Problem(f"{path}.max_seq_len", message, allowed=f"at most {recipe.max_seq_len}")
    if length is not None and recipe.model.mtp.depth > length - 2:
        message = f"model.mtp.depth {recipe.model.mtp.depth} predicts that many tokens further, in rows of {length}"
        yield Problem(f"{path}.max_seq_len", message, allowed=f"at least {recipe.model.mtp.depth + 2}")
    if batch is not None and batch % ranks:
        message = f"{batch} sequences are not divisible by the number of ranks, {ranks}"
        yield Problem(f"{path}.global_train_batch_size", message, allowed=f"multiples of {ranks}")


def _stream_problems(recipe: Recipe, stage: StageConfig, path: str) -> Iterator[Problem]:
    known = recipe.train_loader.dataset.streams
    for name in stage.streams or {}:
        if known is None:
            yield Problem(path, "the training data have no streams: train_loader.dataset.streams is null", "null")
            return
        if name not in known:
            yield Problem(f"{path}.{name}", "no stream of train_loader.dataset.streams", ", ".join(known))


def _companion_problems(recipe: Recipe) -> Iterator[Problem]:
    """List the keys elsewhere that a curriculum cannot go with."""
    durations = {"max_duration": recipe.max_duration}
    if isinstance(recipe.scheduler, WarmupConfig):
        durations["scheduler.t_warmup"] = recipe.scheduler.t_warmup
    for key, value in durations.items():
        if value.endswith("ep"):
            yield Problem(
                key, f"{value}, and the epochs of a curriculum are not all as long", allowed="in tok, ba or sp"
            )
    if recipe.train_loader.dataset.packing.method == PackingMethod.pairs:
        yield Problem(KEY, "pairs of preferences are read in epochs, all alike", allowed="null")
