"""``moefoundry validate``: find what can be wrong with a recipe, on any machine, in under a second.

Nothing heavy is imported, save torch for an attention kind of another package, whose modules must be built to be known,
and for ``icl_tasks``, whose examples are tokenized.

The rules are those by which training refuses a recipe: ``config/`` for the recipe, ``data/fit.py`` for its data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, json_option, num_ranks, recipe_arguments

if TYPE_CHECKING:
    from moefoundry.config import Recipe
    from moefoundry.config.errors import Problem
    from moefoundry.llm_foundry.recipe import FoundryRecipe


@click.command("validate", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--world-size", type=num_ranks, metavar="N", help="Also check mesh and batch against N ranks.")
@click.option("--show", is_flag=True, help="Print the resolved recipe, and where each value comes from.")
@click.option("--print", "as_yaml", is_flag=True, help="Print the resolved recipe as YAML.")
@json_option
def command(arguments: list[str], world_size: int | None, show: bool, as_yaml: bool, as_json: bool) -> None:
    """Check a recipe and its overrides, and list every problem at once (exit status 2).

    Local data are checked too; where they are not on this machine, a note says so, and how to make them. Otherwise the
    machine plays no part: a recipe for GPUs is checked on any other computer, and what the devices must be able to do
    is checked when training starts. Also tells what the model can be exported as.

    --show prints every key and whether it comes from a file (which), an override or the defaults. --json gives the
    same as an object: `recipe` by dotted keys, `origins`, `export`, and `notes` (which also go to standard error).

    Of a recipe of LLM Foundry the top-level keys are checked, as LLM Foundry does; the notes tell what changes on any
    machine, and --show prints the changed recipe.
    """
    from moefoundry.config import advice, annotated, dump_recipe, load_layers, recipe_of, split_arguments
    from moefoundry.llm_foundry.recipe import read_foundry_recipe

    if as_yaml and (show or as_json):
        raise click.UsageError("--print goes with neither --show nor --json")
    path, overrides = split_arguments(arguments)
    if (foundry := read_foundry_recipe(path, overrides)) is not None:
        _validate_foundry(foundry, world_size, show or as_yaml, as_json)
        return
    layers = load_layers(path, overrides)
    recipe = recipe_of(layers, world_size)
    check_names(recipe)
    notes = [f"warning: {problem}" for problem in advice(recipe)]
    notes += [f"note: {problem}" for problem in check_files(recipe, world_size or 1)]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    from moefoundry.config.curriculum import described_stages
    from moefoundry.conversion.families import exports_as

    if as_json:
        from moefoundry.config.dump import flatten, origins

        found = {"recipe": flatten(recipe), "origins": origins(recipe, layers)}
        print(json.dumps(found | {"export": exports_as(recipe.model), "notes": notes}, indent=2))
    elif show or as_yaml:
        print(annotated(recipe, layers) if show else dump_recipe(recipe), end="")
    else:
        print("\n".join([describe(recipe), *described_stages(recipe), f"export: {exports_as(recipe.model)}"]))


def _validate_foundry(recipe: FoundryRecipe, world_size: int | None, as_yaml: bool, as_json: bool) -> None:
    """Check a recipe of LLM Foundry, and describe or print it."""
    import yaml

    from moefoundry.llm_foundry.fit import Machine, fitted
    from moefoundry.llm_foundry.recipe import check_foundry_recipe, without_secrets

    check_foundry_recipe(recipe, world_size, allow_code=True)  # nothing of it is run
    tree, notes = fitted(recipe, Machine(cuda=True, flash_attn=True))
    if code := recipe.tree.get("code_paths"):
        notes.insert(0, f"code_paths: training runs {', '.join(map(str, code))} with --allow-code-paths")
    notes = [f"note: {note}" for note in notes]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    tree = without_secrets(tree)
    if as_json:
        print(json.dumps({"llm_foundry": True, "recipe": tree, "notes": notes}, indent=2))
    elif as_yaml:
        print(yaml.safe_dump(tree, sort_keys=False), end="")
    else:
        print(f"OK {recipe.describe()}")


def describe(recipe: Recipe) -> str:
    """Sum a sound recipe up in a line."""
    model, moe, precision = recipe.model, recipe.model.moe, recipe.precision
    fp8 = f", fp8 {precision.fp8.recipe}" if precision.fp8.recipe else ""
    return (
        f"OK {recipe.run_name}: {model.name}, {model.n_layers} layers ({model.n_dense_layers} dense), "
        f"d_model {model.d_model}, {moe.num_experts} experts top-{moe.top_k} + {moe.num_shared_experts} shared, "
        f"vocabulary {model.vocab_size}; {recipe.max_duration} of {recipe.global_train_batch_size} x "
        f"{recipe.max_seq_len} tokens, {precision.compute}{fp8}"
    )


def check_files(recipe: Recipe, world_size: int) -> list[Problem]:
    """Refuse data, tasks, and a local ``load_path``, that do not fit, as training does.

    Returns:
        A problem for each part of the data that is not on this machine, where none of them is.
    """
    from moefoundry.config.errors import Problem
    from moefoundry.config.urls import is_url, resolved
    from moefoundry.data.fit import all_absent, check_data

    absent = all_absent(recipe)
    if not absent:
        check_data(recipe, world_size)
        _check_tasks(recipe)
    if recipe.load_path is None or is_url(path := resolved(recipe.load_path)) or _goes_on(recipe):
        return absent
    if absent and not Path(path).exists():
        return [*absent, Problem("load_path", f"{path}: no such directory")]

    from moefoundry.checkpoint.start import check_start, known_digests
    from moefoundry.checkpoint.store import find_checkpoint

    check_start(find_checkpoint(path, "load_path"), False, recipe, known_digests(recipe))
    return absent


def _check_tasks(recipe: Recipe) -> None:
    """Check the recipe's tasks with their examples, those behind URLs aside, and its averages."""
    from moefoundry.config.dump import flatten
    from moefoundry.config.tasks import read_gauntlet, read_tasks

    if recipe.eval_gauntlet is not None:
        read_gauntlet(recipe.eval_gauntlet)
    if recipe.icl_tasks is None:
        return
    configs = read_tasks(recipe.icl_tasks)

    from moefoundry.evaluation.prompts import PromptTokenizer
    from moefoundry.evaluation.tasks.run import Sizes, check_tasks, load_tasks

    tasks, directory = load_tasks(configs, remote=False), Path(recipe.tokenizer.name)
    if directory.is_dir():  # that of remote data may come with them
        tokenizer = PromptTokenizer.open(directory, recipe.model.vocab_size)
        check_tasks(tokenizer, tasks, Sizes.of(recipe), flatten(recipe))


def _goes_on(recipe: Recipe) -> bool:
    """Tell if the run has a checkpoint of its own, which comes before ``load_path``."""
    from moefoundry.checkpoint.store import CHECKPOINTS, CheckpointStore

    return recipe.autoresume and CheckpointStore(Path(recipe.run_dir, CHECKPOINTS)).latest() is not None


def check_names(recipe: Recipe) -> None:
    """Refuse names of modules that do not exist, as training does."""
    from moefoundry.config import ConfigError
    from moefoundry.config.fp8_rules import exclude_problems
    from moefoundry.planning.weights import check_targets, module_names

    fp8, lora = recipe.precision.fp8, recipe.lora
    if fp8.recipe is not None and (problems := exclude_problems(fp8.exclude, module_names(recipe.model))):
        raise ConfigError(problems)
    if lora is not None:
        check_targets(recipe.model, lora)
