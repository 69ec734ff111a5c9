"""Rules *between* the keys of a recipe. Each rule names its keys and is a plain function of the recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator

import moefoundry.config.model_checks  # noqa: F401  # whose rules come first
from moefoundry.config.build import Builder
from moefoundry.config.curriculum_rules import curriculum_problems
from moefoundry.config.errors import Problem
from moefoundry.config.field import MAX_SEED
from moefoundry.config.lora_rules import lora_problems
from moefoundry.config.making import chosen_parts
from moefoundry.config.mesh_rules import degree_problems, expert_problems
from moefoundry.config.preference_rules import preference_problems
from moefoundry.config.rule import RULES, rule
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_data import StreamConfig
from moefoundry.config.schema_model import ModelConfig
from moefoundry.config.schema_parts import (
    AdamWConfig,
    DatasetConfig,
    Moments,
    WarmupConfig,
)
from moefoundry.config.spec import plain, show_leaf
from moefoundry.config.tasks import problems_of, read_gauntlet, read_tasks
from moefoundry.config.urls import path_problem, url_problem

HELD_OUT_LOSS = "metrics/eval/LanguageCrossEntropy"


def check_recipe(recipe: Recipe, world_size: int | None = None, skip: Collection[str] = ()) -> list[Problem]:
    """List every broken relation between keys.

    Args:
        recipe: A recipe whose values each fit the schema.
        world_size: Number of ranks, where it is known; without it, only what the recipe itself fixes is checked.
        skip: Paths about which nothing can be said; rules that read them, or keys below them, are left out.
    """
    problems: list[Problem] = []
    for entry in RULES:
        if not any(_overlap(path, name) for path in skip for name in entry.keys):
            problems += entry.check(recipe, world_size)
    return problems


def check_model(model: ModelConfig) -> list[Problem]:
    """List every value of a model that no recipe may have, and every broken relation between its keys.

    Args:
        model: A model of another source than a recipe.
    """
    builder = Builder()
    recipe = Recipe(model=builder.build(ModelConfig, plain(model), "model"))
    own = {key for entry in RULES for key in entry.keys if not key.startswith("model.")}
    return [*builder.problems, *check_recipe(recipe, skip={*builder.unsound, *own})]


def _overlap(a: str, b: str) -> bool:
    """Tell whether two paths are equal, or one lies below the other."""
    shorter, longer = sorted((a, b), key=len)
    return longer == shorter or longer.startswith((f"{shorter}.", f"{shorter}["))


# ------------------------------------------------------------------------------------------------------ mesh and batch


@rule("mesh.replicate", "mesh.shard")
def _degrees(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    yield from degree_problems(recipe.mesh, world_size)


@rule("mesh", "model.moe.num_experts")
def _expert_degree(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    num_experts = recipe.model.moe.num_experts
    yield from expert_problems(recipe.mesh, world_size, {f"model.moe.num_experts, {num_experts}": num_experts})


@rule("mesh.replicate", "mesh.shard", "global_train_batch_size")
def _batch(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    """Every rank has its own samples; a last micro-batch that is smaller, or larger than the share, is fine."""
    batch = recipe.global_train_batch_size
    known = max(1, recipe.mesh.replicate) * max(1, recipe.mesh.shard)
    ranks = world_size or known
    if batch % ranks:
        what = "the world size" if world_size else "mesh.replicate * mesh.shard"
        message = f"{batch} sequences are not divisible by {what}, {ranks}"
        yield Problem("global_train_batch_size", message, allowed=f"multiples of {ranks}")


# ---------------------------------------------------------------------------------------------------- data and schedule


@rule("load_path", "save_remote", "train_loader", "eval_loader")
def _places(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Check what may be a URL by the rule that readers follow."""
    places = {"load_path": recipe.load_path, "save_remote": recipe.save_remote}
    remotes = {f"{path}.remote": source.remote for path, source in _sources(recipe)}
    for path, place in {**places, **remotes}.items():
        if place is not None and (problem := url_problem(place, for_data=path in remotes)):
            yield Problem(path, f"{show_leaf(place)}: {problem}")


@rule("run_dir", "tokenizer", "train_loader", "eval_loader", "loggers.tensorboard", "loggers.file_logger")
def _local_places(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Check what is read and written as files of this machine."""
    paths = {"run_dir": recipe.run_dir, "tokenizer.name": recipe.tokenizer.name}
    paths |= {f"{path}.local": source.local for path, source in _sources(recipe)}
    if recipe.loggers.tensorboard is not None:
        paths["loggers.tensorboard.log_dir"] = recipe.loggers.tensorboard.log_dir
    if recipe.loggers.file_logger is not None:
        paths["loggers.file_logger.filename"] = recipe.loggers.file_logger.filename
    for path, value in paths.items():
        if problem := path_problem(value):
            cure = "; checkpoints are uploaded with save_remote" if path == "run_dir" else ""
            yield Problem(path, f"{show_leaf(value)}: {problem}{cure}")


@rule("max_seq_len", "train_loader.dataset.max_seq_len", "eval_loader.dataset.max_seq_len")
def _sequence_length(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    for path, dataset in _datasets(recipe):
        if dataset.max_seq_len != recipe.max_seq_len:
            message = f"{dataset.max_seq_len} is not the recipe's max_seq_len"
            yield Problem(f"{path}.max_seq_len", message, allowed=str(recipe.max_seq_len))


@rule("train_loader.dataset", "eval_loader.dataset")
def _weights_of_streams(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Rows of a stream are counted in one way, and shares of an epoch leave no other counts beside them."""
    for path, dataset in _datasets(recipe):
        streams = dataset.streams or {}
        weights = {name: (each.proportion, each.repeat, each.choose) for name, each in streams.items()}
        for name, given in weights.items():
            if sum(weight is not None for weight in given) > 1:
                yield Problem(f"{path}.streams.{name}", "has more than one of proportion, repeat and choose")
        if len({given[0] is None for given in weights.values()}) > 1:
            lacking = [name for name, given in weights.items() if given[0] is None]
            message = f"proportion is of all streams or of none, and {', '.join(lacking)} has none"
            yield Problem(f"{path}.streams", message)
        if streams and dataset.remote is not None:
            yield Problem(f"{path}.remote", "where there are streams, each has its own", allowed="null")


def _sources(recipe: Recipe) -> Iterator[tuple[str, StreamConfig]]:
    """Yield each loader's streams, or else what it reads, with the path of its keys."""
    for path, dataset in _datasets(recipe):
        for name, source in dataset.sources.items():
            yield f"{path}.streams.{name}" if name else path, source


def _datasets(recipe: Recipe) -> Iterator[tuple[str, DatasetConfig]]:
    """Yield each loader's dataset, with its path."""
    yield "train_loader.dataset", recipe.train_loader.dataset
    if recipe.eval_loader is not None:
        yield "eval_loader.dataset", recipe.eval_loader.dataset


@rule(
    "curriculum",
    "max_seq_len",
    "global_train_batch_size",
    "max_duration",
    "scheduler",
    "mesh",
    "train_loader",
    "model.mtp",
)
def _curriculum(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    yield from curriculum_problems(recipe, world_size)


@rule("eval_subset_num_batches")
def _evaluated_batches(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    if not recipe.eval_subset_num_batches:
        yield Problem("eval_subset_num_batches", "0 evaluates nothing", allowed="-1, or at least 1")


@rule("ema", "eval_loader")
def _evaluated_average(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    if recipe.ema is not None and recipe.ema.evaluate and recipe.eval_loader is None:
        yield Problem("ema.evaluate", "true, but eval_loader is null", allowed="false")


@rule("dpo", "model.document_masking", "model.mtp.depth", "train_loader", "eval_loader")
def _preferences(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from preference_problems(recipe)


@rule("save_keep_best", "eval_loader", "model.mtp.depth", "losses", "dpo")
def _metric_of_the_best(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Accept only metrics that the run measures and that are better when they are lower."""
    optional = ["mtp"] * (recipe.model.mtp.depth > 0) + ["dpo"] * (recipe.dpo is not None)
    names = ["total", "lm", "balance", "z", *optional]
    names += [name for name, _ in chosen_parts("losses", recipe.losses)]
    measured = [HELD_OUT_LOSS] * (recipe.eval_loader is not None) + [f"loss/train/{name}" for name in names]
    wanted = recipe.save_keep_best
    if wanted is not None and wanted not in measured:
        near = "".join(difflib.get_close_matches(wanted, measured, 1))
        message = f"{wanted!r} is no loss that this run measures"
        yield Problem("save_keep_best", message, allowed=", ".join(measured), suggestion=near)


@rule("icl_tasks", "eval_gauntlet")
def _tasks(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    if recipe.icl_tasks is not None:
        yield from problems_of(recipe.icl_tasks, read_tasks)
    if recipe.eval_gauntlet is not None:
        found = [*problems_of(recipe.eval_gauntlet, read_gauntlet)]
        yield from found
        if recipe.icl_tasks is None and not found:
            yield Problem("eval_gauntlet", "averages tasks, but icl_tasks is null", allowed="null")


@rule("save_num_checkpoints_to_keep")
def _kept_checkpoints(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Keep the newest checkpoint in any case."""
    if recipe.save_num_checkpoints_to_keep == 0:
        yield Problem("save_num_checkpoints_to_keep", "got 0", allowed="a positive integer, or -1 to keep all")


@rule("lora", "load_path", "model.moe.backend", "precision.compute")
def _adapters(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from lora_problems(recipe)


@rule("load_weights_only", "load_path")
def _weights_of_something(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    if recipe.load_weights_only and recipe.load_path is None:
        yield Problem("load_weights_only", "true, but load_path is null", allowed="false, or load_path=CHECKPOINT")


@rule("precision.optimizer_moments", "optimizer")
def _moments_can_fall(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Without a gradient, a moment loses 1 - beta of itself a step; to be rounded down it may have to lose 2**-8."""
    largest, moments = 1 - 2**-8, recipe.precision.optimizer_moments
    if moments != Moments.fp32 and not isinstance(recipe.optimizer, AdamWConfig):
        message = f"{moments}, but only adamw has such moments, and optimizer.name is {recipe.optimizer.name}"
        yield Problem("precision.optimizer_moments", message, allowed="fp32")
    betas = recipe.optimizer.betas if isinstance(recipe.optimizer, AdamWConfig) else ()
    for index, beta in enumerate(betas):
        if moments == Moments.bf16 and beta > largest:
            message = f"with {beta}, moments that precision.optimizer_moments=bf16 rounds to the nearest may never fall"
            suggestion = "precision.optimizer_moments=bf16_stochastic"
            yield Problem(f"optimizer.betas[{index}]", message, allowed=f"at most {largest}", suggestion=suggestion)


@rule("scheduler.t_warmup", "max_duration")
def _warmup(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Refuse two units that a schedule cannot compare: it knows the batches of an epoch, not the tokens of a batch."""
    if not isinstance(recipe.scheduler, WarmupConfig):
        return
    warmup, unit = _duration(recipe.scheduler.t_warmup)
    limit = "1dur" if unit == "dur" else recipe.max_duration
    total, total_unit = _duration(limit)
    if unit == total_unit:
        if warmup > total:
            message = f"{recipe.scheduler.t_warmup} of warm-up is longer than max_duration, {recipe.max_duration}"
            yield Problem("scheduler.t_warmup", message, allowed=f"at most {limit}")
    elif {unit, total_unit} != {"ba", "ep"}:
        units = "ba or ep" if total_unit in ("ba", "ep") else total_unit
        message = f"{recipe.scheduler.t_warmup} cannot be compared with max_duration, {recipe.max_duration}"
        yield Problem("scheduler.t_warmup", message, allowed=f"in {units}, or a part of the run such as 0.05dur")


def _duration(text: str) -> tuple[float, str]:
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", text).groups()  # type: ignore[union-attr]  # the schema's pattern
    return float(number), unit


@rule("seed", "mesh.replicate", "mesh.shard")
def _seeds_of_ranks(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    """Each rank seeds its generators with the recipe's seed plus its number."""
    ranks = world_size or max(1, recipe.mesh.replicate) * max(1, recipe.mesh.shard)
    if recipe.seed > MAX_SEED + 1 - ranks:
        message = f"{recipe.seed} leaves no seeds above it for {ranks} ranks"
        yield Problem("seed", message, allowed=f"at most {MAX_SEED + 1 - ranks}")
