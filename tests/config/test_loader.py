"""The strict loader: what is refused, how it is worded, and that nothing valid is lost."""

import copy
import dataclasses
import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moefoundry.config import (
    ConfigError,
    ConstantWithWarmupConfig,
    GqaConfig,
    Problem,
    Recipe,
    diff_recipes,
    dump_recipe,
    flatten,
    load_layers,
    load_recipe,
    recipe_of,
    split_arguments,
)
from moefoundry.config.checks import RULES
from moefoundry.config.field import DURATION, INTERVAL
from moefoundry.config.interpolation import Resolver
from moefoundry.config.layers import Layers, leaves_of
from moefoundry.config.spec import ANY_NAME, Spec, every_key, plain, specs, walk
from moefoundry.config.urls import naming_problem
from moefoundry.config.yaml_reader import StrictDumper, parse_yaml
from tests.conftest import QUICK, QUICKSTART


def problems_of(*overrides: str, path: Path | None = None, world_size: int | None = None) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides if path else [*QUICK, *overrides], world_size)
    problems = caught.value.problems
    assert len({problem.path for problem in problems}) == len(problems), "a path was reported twice"
    return {problem.path: problem for problem in problems}


def only_problem(*overrides: str, path: Path | None = None) -> Problem:
    (problem,) = problems_of(*overrides, path=path).values()
    return problem


QUICK_TREE = load_layers(None, QUICK).tree


def layered(tree: dict[str, Any]) -> Layers:
    """What a recipe file of ``tree`` says over the quickstart's keys."""
    layers = Layers("recipe.yaml")
    layers.add(leaves_of(copy.deepcopy(QUICK_TREE)), "quickstart.yaml")
    layers.add(leaves_of(tree), "recipe.yaml")
    return layers


def write(tmp_path: Path, text: str) -> Path:
    """A recipe file of this text alone."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def write_small(tmp_path: Path, text: str) -> Path:
    """A recipe file that says this over the quickstart's."""
    return write(tmp_path, f"extends: {QUICKSTART}\n{text}")


# ------------------------------------------------------------------------------------------------------ what is loaded


def test_no_file_gives_the_defaults_with_interpolations_resolved():
    recipe = load_recipe(None, QUICK)
    assert recipe.run_dir == "runs/quickstart"
    assert recipe.tokenizer.name == "data/quickstart/tokenizer"
    assert recipe.eval_loader is not None
    assert recipe.eval_loader.dataset.shuffle_seed == recipe.seed
    assert isinstance(recipe.model.attention, GqaConfig)
    assert "${" not in dump_recipe(recipe)


def test_every_variant_defaults_to_its_own_tag():
    for _, spec in walk(Recipe):
        variants = spec.variants or {}
        for tag, cls in variants.items():
            assert variants[getattr(cls(), spec.tag)] is cls, "softmax and sigmoid have one"
            assert getattr(cls(), spec.tag) == tag or [*variants.values()].count(cls) > 1


def test_file_then_overrides_in_order(tmp_path):
    path = write_small(tmp_path, "run_name: mine\nmodel: {moe: {top_k: 3}}\nseed: 1\n")
    recipe = load_recipe(str(path), ["model.moe.top_k=4", "seed=2", "seed=3", "optimizer.betas=[0.8, 0.9]"])
    assert (recipe.run_name, recipe.run_dir) == ("mine", "runs/mine")
    assert (recipe.model.moe.top_k, recipe.seed, recipe.optimizer.betas) == (4, 3, [0.8, 0.9])
    assert recipe.model.moe.num_experts == 16


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"{path}: is empty; allowed: a mapping of keys to values$"):
        load_recipe(path)
    found = problems_of(path=write(tmp_path, "{}"))
    optional = (".yarn.", ".llama3_rope.", ".longrope.", ".linear_attention.")
    required = {key for key, spec in every_key().items() if spec.required and not any(part in key for part in optional)}
    assert required >= set(found)
    assert all(problem.message.startswith("missing: ") for problem in found.values())


@pytest.mark.parametrize("text", ["6e-4", "6.0e-4", "0.0006", ".0006", "6E-4"])
def test_floats_in_every_spelling(text):
    assert load_recipe(None, [*QUICK, f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(6e-4)


def test_an_integer_becomes_a_float_where_a_float_is_wanted():
    weight_decay = load_recipe(None, [*QUICK, "optimizer.weight_decay=1"]).optimizer.weight_decay
    assert (weight_decay, type(weight_decay)) == (1.0, float)


def test_a_part_of_a_mapping_keeps_the_parents_defaults(tmp_path):
    recipe = load_recipe(write_small(tmp_path, "eval_loader: {num_workers: 2}\n"))
    assert recipe.eval_loader is not None
    assert (recipe.eval_loader.num_workers, recipe.eval_loader.dataset.split) == (2, "val")


def test_optional_mappings_are_turned_on_and_off():
    recipe = load_recipe(None, [*QUICK, "loggers.wandb={}", "eval_loader=null", "algorithms.gradient_clipping=null"])
    assert recipe.loggers.wandb is not None
    assert recipe.loggers.wandb.name == "quickstart"
    assert (recipe.eval_loader, recipe.algorithms.gradient_clipping, recipe.loggers.mlflow) == (None, None, None)


def test_turning_a_mapping_on_keeps_what_the_file_says(tmp_path):
    path = write_small(tmp_path, "loggers: {wandb: {project: p}}\n")
    recipe = load_recipe(path, ["loggers.wandb={}", "loggers.wandb.group=g"])
    assert recipe.loggers.wandb is not None
    assert (recipe.loggers.wandb.project, recipe.loggers.wandb.group) == ("p", "g")


@pytest.mark.parametrize("override", ["scheduler.name=constant_with_warmup", "scheduler={name: constant_with_warmup}"])
def test_switching_the_variant_of_a_written_out_recipe(tmp_path, override):
    path = write(tmp_path, dump_recipe(load_recipe(None, [*QUICK, "scheduler.t_warmup=7ba"])))
    recipe = load_recipe(path, [override])
    assert recipe.scheduler == ConstantWithWarmupConfig(t_warmup="7ba")
    assert "scheduler.alpha_f" in problems_of(override, "scheduler.alpha_f=0.5", path=path)


def test_interpolations_resolve_through_overrides_and_the_environment(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("WORKERS", "3")
    recipe = load_recipe(
        None,
        [
            *QUICK,
            "run_dir=${oc.env:SCRATCH}/${run_name}",
            "run_name=x",
            "train_loader.num_workers=${oc.decode:${oc.env:WORKERS}}",
        ],
    )
    assert (recipe.run_dir, recipe.train_loader.num_workers) == ("/scratch/x", 3)


def test_a_mapping_may_refer_to_another():
    recipe = load_recipe(None, [*QUICK, "eval_loader=${train_loader}"])
    assert recipe.eval_loader == recipe.train_loader


def test_what_was_parsed_before_is_parsed_as_it_was_written() -> None:
    text = "a: [1, {b: 2}]"
    parse_yaml(text, "text")["a"][1]["b"] = 3
    assert parse_yaml(text, "text") == {"a": [1, {"b": 2}]}
    assert parse_yaml(text, "text", plain_text=True) == {"a": ["1", {"b": "2"}]}
    for source in ("one", "other"):
        with pytest.raises(ConfigError, match=f"{source}:2: key 'a' is given twice"):
            parse_yaml("a: 1\na: 2", source)


def test_aliases_are_copies(tmp_path):
    path = write_small(tmp_path, "train_loader: &a {num_workers: 1}\neval_loader: *a\n")
    recipe = load_recipe(path, ["train_loader.num_workers=2"])
    assert recipe.eval_loader is not None
    assert (recipe.train_loader.num_workers, recipe.eval_loader.num_workers) == (2, 1)


def test_merge_keys(tmp_path):
    path = write_small(tmp_path, "train_loader: &a {num_workers: 1}\neval_loader: {<<: *a, drop_last: true}\n")
    recipe = load_recipe(path)
    assert recipe.eval_loader is not None
    assert (recipe.eval_loader.num_workers, recipe.eval_loader.drop_last) == (1, True)


# ------------------------------------------------------------------------------------------- row 21: keys and types


def test_row21_key_typo_gives_path_and_suggestion():
    assert str(only_problem("model.moe.topk=4")) == "model.moe.topk: unknown key; did you mean 'model.moe.top_k'?"


def test_row21_word_for_an_integer():
    assert str(only_problem("model.moe.top_k=four")) == (
        "model.moe.top_k: got 'four' (a string); allowed: an integer >= 1"
    )


def test_row21_float_for_an_integer():
    assert str(only_problem("model.moe.top_k=2.5")) == "model.moe.top_k: got 2.5 (a float); allowed: an integer >= 1"


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("top_k=4", "top_k", "model.moe.top_k"),
        ("nheads=4", "nheads", "model.attention.n_heads"),
        ("model.n_heads=4", "model.n_heads", "model.attention.n_heads"),
        ("max_duraton=1ba", "max_duraton", "max_duration"),
        ("precision.recipe=null", "precision.recipe", "precision.fp8.recipe"),
        ("eval_loader.dataset.sufle=true", "eval_loader.dataset.sufle", "eval_loader.dataset.shuffle"),
        ("loggers.wandb.projct=x", "loggers.wandb.projct", "loggers.wandb.project"),
    ],
)
def test_row21_unknown_keys_suggest_a_full_path(override, path, suggestion):
    problem = only_problem(override)
    assert (problem.path, problem.message, problem.suggestion) == (path, "unknown key", suggestion)


def test_an_unknown_key_near_nothing_lists_what_there_is():
    allowed = "replicate, shard, expert, ranks_per_node, gather, reduce"
    for key in ("mesh.zzz", "mesh.ep", "mesh.tp"):
        assert str(only_problem(f"{key}=1")) == f"{key}: unknown key; allowed: {allowed}"
    assert str(only_problem("mesh.kind=1")) == (
        "mesh.kind: unknown key; keys with this name are model.norm.kind, model.attention.kind"
    )


def test_a_dotted_key_in_the_file_is_to_be_nested(tmp_path):
    problem = only_problem(path=write_small(tmp_path, "model.moe.top_k: 4\n"))
    assert (problem.path, "nest it" in problem.message) == ("model.moe.top_k", True)


def test_keys_of_another_variant_are_unknown(tmp_path):
    path = write_small(tmp_path, "scheduler: {name: constant_with_warmup, alpha_f: 0.1}\n")
    problem = only_problem(path=path)
    assert problem.path == "scheduler.alpha_f"
    assert problem.message == "unknown key of name 'constant_with_warmup'"
    assert problem.allowed == "name, timing, t_warmup"


def test_unknown_variant_lists_the_options():
    problem = only_problem("scheduler.name=cosine", "scheduler.whatever=1")
    assert problem.path == "scheduler.name"
    assert problem.allowed.startswith("cosine_with_warmup, linear_decay_with_warmup, constant_with_warmup, ")
    assert problem.suggestion == "cosine_with_warmup"


def test_enums_list_what_is_allowed():
    problem = only_problem("precision.compute=bf61")
    assert (problem.allowed, problem.suggestion) == ("fp32, bf16, bf16_emulated", "bf16")


def test_what_is_not_there_yet_is_named():
    problem = only_problem("train_loader.name=video")
    assert problem.path == "train_loader.name"
    assert problem.message.endswith("is not available yet")
    assert problem.allowed == "text"


def test_tasks_are_checked_where_they_stand():
    assert only_problem("icl_tasks=[lambada]").path == "icl_tasks[0]"
    task = "{label: a, icl_task_type: schema, dataset_uri: x, num_fewshot: [0], shots: 1}"
    assert only_problem(f"icl_tasks=[{task}]").path == "icl_tasks[0].shots"
    assert only_problem("icl_tasks=tasks.yaml", "eval_gauntlet={weighting: SIZE}").path == "eval_gauntlet.weighting"
    assert only_problem("eval_gauntlet=file.yaml").path == "eval_gauntlet"
    assert only_problem("icl_tasks=s3://bucket/tasks.yaml").message.endswith("must be a path, not a URL")
    recipe = load_recipe(
        None, [*QUICK, f"icl_tasks=[{task.replace(', shots: 1', '')}]", "eval_gauntlet={categories: []}"]
    )
    assert recipe.icl_tasks[0]["num_fewshot"] == [0]
    assert load_recipe(None, [*QUICK, *(f"{key}=null" for key in ("icl_tasks", "eval_gauntlet"))]).icl_tasks is None


def test_a_recipe_with_tasks_reads_back(tmp_path):
    task = '{label: a, icl_task_type: schema, dataset_uri: x, num_fewshot: [0], prompt_string: "a\\nb"}'
    recipe = load_recipe(None, [*QUICK, f"icl_tasks=[{task}]", "eval_gauntlet={averages: {all: []}}"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", ["mpt_causal_lm", "hf_causal_lm"])
def test_llm_foundrys_recipes_get_one_error(tmp_path, name):
    path = write(tmp_path, f"model: {{name: {name}, n_heads: 4, expansion_ratio: 4}}\nmax_seq_len: x\nvariables: 1\n")
    problem = only_problem(path=path)
    assert problem.path == "model.name"
    assert name in problem.message
    assert "only `train` and `validate` take" in problem.message


NAMES = "letters, digits, '_', '-' and '.', but not '.' or '..'"
SEEDS = "an integer >= 0 and <= 4294967295"
AT_LEAST_1 = "an integer >= 1"


@pytest.mark.parametrize(
    ("override", "path", "allowed"),
    [
        ("optimizer.lr=0", "optimizer.lr", "a number > 0"),
        ("optimizer.lr=.nan", "optimizer.lr", "a number > 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "a number > 0"),
        ("optimizer.lr=1e999", "optimizer.lr", "a number > 0"),
        ("optimizer.lr='6e-4'", "optimizer.lr", "a number > 0"),
        ("optimizer.lr=true", "optimizer.lr", "a number > 0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]", "a number >= 0 and < 1"),
        ("optimizer.betas=[x, 0.9]", "optimizer.betas[0]", "a number >= 0 and < 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "a list of 2 numbers >= 0 and < 1"),
        ("optimizer.betas=0.9", "optimizer.betas", "a list of 2 numbers >= 0 and < 1"),
        ("seed='17'", "seed", SEEDS),
        ("seed=true", "seed", SEEDS),
        ("seed=017", "seed", SEEDS),
        ("seed=-1", "seed", SEEDS),
        ("seed=4294967296", "seed", SEEDS),
        ("train_loader.dataset.shuffle_seed=4294967296", "train_loader.dataset.shuffle_seed", SEEDS),
        ("autoresume=1", "autoresume", "true, false"),
        ("autoresume=yes", "autoresume", "true, false"),
        ("run_name=a/b", "run_name", NAMES),
        ("run_name=..", "run_name", NAMES),
        ("run_name=.", "run_name", NAMES),
        ("run_name='..'", "run_name", NAMES),
        ("run_name=a b", "run_name", NAMES),
        ('run_name="a\\n"', "run_name", NAMES),
        ("run_name=#1", "run_name", NAMES),
        ("tokenizer.name=null", "tokenizer.name", "a path"),
        ("tokenizer.name=", "tokenizer.name", "a path"),
        ("load_path=''", "load_path", "a path, or null"),
        ('run_dir=runs/"a\0b"', "run_dir", "a path"),
        ("run_dir=~nosuchuser/runs", "run_dir", "a path"),
        (f"run_dir=runs/{'x' * 256}/a", "run_dir", "a path"),
        (f"run_dir={'x/' * 2000}", "run_dir", "a path"),
        (f"run_name={'é' * 128}", "run_dir", "a path"),
        ("callbacks.report.prompt=''", "callbacks.report.prompt", "text, not empty, or null"),
        ("loggers.wandb.tags=['']", "loggers.wandb.tags[0]", "texts of 1 to 64 characters"),
        ("seed=3 # the third", "seed=", "quotes around it"),
        ("loggers.wandb={} # on", "loggers.wandb=", "quotes around it"),
        ("dist_timeout=1e9", "dist_timeout", "a number >= 1 and <= 31622400"),
        ("dist_timeout=0.001", "dist_timeout", "a number >= 1 and <= 31622400"),
        ("device_eval_batch_size=2147483648", "device_eval_batch_size", "an integer >= 1 and <= 1048576"),
        ("optimizer.eps=1e-60", "optimizer.eps", "a number > 0"),
        ("optimizer.lr=1e39", "optimizer.lr", "a number > 0"),
        ("model.moe.balance.z_loss_weight=1e-50", "model.moe.balance.z_loss_weight", "a number >= 0 and <= 1000000.0"),
        (
            "model.moe.balance.aux_loss_weight=1e30",
            "model.moe.balance.aux_loss_weight",
            "a number >= 0 and <= 1000000.0",
        ),
        ("callbacks.speed_monitor.window_size=9223372036854775808", "callbacks.speed_monitor.window_size", AT_LEAST_1),
        ("max_duration=9999999999999999999ba", "max_duration", "a duration: a positive integer and ba, ep, tok or sp"),
        ("model=null", "model", "a mapping"),
        ("model=[1]", "model", "a mapping"),
        ("loggers.wandb=true", "loggers.wandb", "a mapping, or null"),
        ("max_duration=200", "max_duration", "a duration: a positive integer and ba, ep, tok or sp"),
        (
            "scheduler.t_warmup=1.5ba",
            "scheduler.t_warmup",
            "a duration: an integer and ba, ep, tok or sp, or a part of the run such as 0.05dur",
        ),
        ("save_interval=0ba", "save_interval", "a duration: a positive integer and ba, ep, tok or sp"),
    ],
)
def test_row21_types_bounds_and_patterns(override, path, allowed):
    problem = only_problem(override)
    assert (problem.path, problem.allowed) == (path, allowed)


def leaves() -> list[Any]:
    """(path, spec, tag settings needed to reach it) for every leaf of every variant."""
    found = []

    def visit(cls: type, prefix: str, tags: dict[str, Any]) -> None:
        for name, spec in specs(cls).items():
            path = f"{prefix}{name}"
            if not spec.is_mapping:
                found.append(pytest.param(path, spec, tags, id="-".join([path, *map(str, tags.values())])))
            for tag, child in (spec.variants or ({"": spec.kind} if spec.is_mapping else {})).items():
                visit(child, f"{path}.", {f"{path}.{spec.tag}": tag} if tag else tags)

    visit(Recipe, "", {})
    return found


def required_beside(path: str) -> dict[str, Any]:
    """Further keys of a recipe in which the key ``path`` stands alone."""
    if path == "model.ffn_hidden_size":
        return {"model.n_dense_layers": 0}
    if path == "lora.base":
        return {"load_path": "runs/base"}
    extensions = {
        "yarn": ("factor", "original_max_seq_len"),
        "llama3_rope": ("factor",),
        "longrope": ("original_max_seq_len",),
        "linear_attention": ("n_key_heads", "n_value_heads"),
    }
    mapping = path.rpartition(".")[0]
    lists = ("short_factors", "long_factors") if mapping.endswith(".longrope") else ()
    numbers = extensions.get(mapping.rpartition(".")[2], ())
    return {f"{mapping}.{key}": [1.0] * 16 for key in lists} | {f"{mapping}.{key}": 64 for key in numbers}


@pytest.mark.parametrize(("path", "spec", "tags"), leaves())
@pytest.mark.parametrize("wrong", ["a mapping", "a scalar", "a list"])
def test_row21_every_leaf_of_the_schema_is_typed(path, spec: Spec, tags, wrong):
    scalar = 12345 if spec.kind in (str, list, object) or issubclass(spec.kind, StrEnum) else "some words"
    value = {"a mapping": {"x": 1}, "a list": ["x", {"y": 2}], "a scalar": scalar}[wrong]
    layers = layered({})
    for key, leaf in {
        **{key: tag for key, tag in {**required_beside(path), **tags}.items() if key != path},
        path: value,
    }.items():
        layers.add({tuple(key.split(".")): leaf}, "recipe.yaml")
    with pytest.raises(ConfigError) as caught:
        recipe_of(layers)
    found = [problem.path for problem in caught.value.problems]
    own = [where for where in found if where == path or where.startswith((f"{path}[", f"{path}."))]
    assert own
    # Nothing else, but that a mapping above may not be available yet.
    assert all(where in own or path.startswith(f"{where}.") for where in found), found


@pytest.mark.parametrize(("path", "spec", "tags"), leaves())
def test_row21_every_leaf_refuses_null_unless_optional(path, spec: Spec, tags):
    layers = layered({})
    for key, leaf in {**required_beside(path), **tags, path: None}.items():
        layers.add({tuple(key.split(".")): leaf}, "recipe.yaml")
    if spec.optional:
        recipe_of(layers)
    else:
        with pytest.raises(ConfigError) as caught:
            recipe_of(layers)
        assert path in [problem.path for problem in caught.value.problems]


@pytest.mark.parametrize(
    "text",
    ["1", "true", "def f(x):  # a comment: 2", "a: b", " [x", "{}", "'tis", '"a" and "b"', "- x", "&a", "a\tb ", "!x"],
)
def test_the_override_of_a_text_is_what_stands_after_the_first_equals_sign(text):
    assert load_recipe(None, [*QUICK, f"callbacks.report.prompt={text}"]).callbacks.report.prompt == text


def test_texts_as_overrides_and_what_else_may_stand_there(tmp_path):
    recipe = load_recipe(
        None,
        [
            *QUICK,
            "run_name=1",
            "callbacks.report.prompt='it''s # quoted'",
            "load_path=null",
            "save_keep_best=",
            "eval_loader.dataset.remote=~",
            "tokenizer.name=a=b#c",
            "loggers.wandb.tags=[1, true, 'a, b', c#d]",
            "loggers.wandb.name=null",
            "loggers.mlflow={run_name: '1'}",
            "precision.compute='bf16'",
        ],
    )
    assert (recipe.run_name, recipe.run_dir) == ("1", "runs/1")
    assert recipe.callbacks.report.prompt == "it's # quoted"
    assert (recipe.load_path, recipe.save_keep_best, recipe.eval_loader.dataset.remote) == (None, None, None)
    assert recipe.tokenizer.name == "a=b#c"
    assert recipe.loggers.wandb.tags == ["1", "true", "a, b", "c#d"]
    assert recipe.loggers.wandb.name is None
    assert recipe.loggers.mlflow.run_name == "1"
    assert recipe.precision.compute == "bf16"
    path = write(tmp_path, dump_recipe(recipe))
    assert load_recipe(path) == recipe, "what is kept reads back as text"


@pytest.mark.parametrize("override", ["run_dir=\udcff", 'callbacks.report={prompt: "\\udcff"}', 'run_dir="\\ud800"'])
def test_what_is_not_utf8_is_refused(override):
    problem = only_problem(override)
    assert problem.path in ("run_dir", "callbacks.report.prompt")
    assert "is not UTF-8 text" in problem.message
    assert "not valid YAML" in only_problem("callbacks.report={prompt: \udcff}").message


def test_a_path_may_begin_at_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [path for path, spec in walk(Recipe) if spec.path]
    assert {path.rpartition(".")[2] for path in paths} == {
        *("run_dir", "name", "local", "remote", "load_path", "save_remote", "log_dir", "tracking_uri", "base"),
        *("filename", "workdir"),
    }
    of_streams = [path for path in paths if ANY_NAME in path.split(".")]
    for some in (of_streams, [path for path in paths if path not in of_streams]):
        leaves = flatten(load_recipe(None, [*QUICK, *(f"{path}=~/a~ b/c" for path in some)]))
        assert {leaves[path] for path in some} == {f"{tmp_path}/a~ b/c"}
    recipe = load_recipe(
        write_small(tmp_path, "train_loader: {dataset: {local: ~/data, remote: s3://a/~b}}\nload_path: ~")
    )
    assert recipe.tokenizer.name == f"{tmp_path}/data/tokenizer"
    assert recipe.eval_loader.dataset.local == f"{tmp_path}/data"
    assert recipe.train_loader.dataset.remote == "s3://a/~b"
    assert recipe.load_path is None, "a ~ alone is YAML's null"
    assert load_recipe(None, [*QUICK, "train_loader.dataset.local=~"]).train_loader.dataset.local == str(tmp_path)


def test_all_errors_are_reported_at_once(tmp_path):
    path = write_small(
        tmp_path,
        "model: {d_model: wide, moe: {top_kk: 2, num_experts: 4, top_k: 8}}\nmax_seq_lenn: 3\noptimizer: {lr: -1}\n",
    )
    found = problems_of("--seed=3", "precision.compute=fp8", "mesh.shard=0", path=path)
    assert set(found) == {
        "--seed",
        "model.d_model",
        "model.moe.top_kk",
        "max_seq_lenn",
        "optimizer.lr",
        "precision.compute",
        "mesh.shard",
    }
    # top_k may be what the typo was meant to set, so nothing is said about it.
    with pytest.raises(ConfigError, match=r"recipe\.yaml: 7 errors\n"):
        load_recipe(path, ["--seed=3", "precision.compute=fp8", "mesh.shard=0"])


def test_a_check_across_keys_joins_the_other_errors():
    assert set(problems_of("model.moe.top_k=17", "optimizer.lr=x")) == {"model.moe.top_k", "optimizer.lr"}


def test_a_bad_value_is_one_problem_however_many_keys_refer_to_it():
    assert only_problem("seed=x").path == "seed"
    assert only_problem("max_seq_len=1.5", "eval_loader=${train_loader}").path == "max_seq_len"


# ----------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("token", "path", "suggestion"),
    [
        ("--model.moe.top_k=4", "--model.moe.top_k", "model.moe.top_k=4"),
        ("-seed=4", "-seed", "seed=4"),
        ("seed", "seed", "seed=..."),
        ("--autoresume", "--autoresume", "autoresume=..."),
        ("optimizer.betas[1]=0.9", "optimizer.betas[1]", "optimizer.betas=[...]"),
        ("optimizer.betas.1=0.9", "optimizer.betas.1", "optimizer.betas=[...]"),
        ("=4", "", ""),
        ("a..b=4", "a..b", ""),
    ],
)
def test_malformed_overrides(token, path, suggestion):
    problem = only_problem(token)
    assert (problem.path, problem.suggestion) == (path, suggestion)


def test_the_value_of_a_secret_is_never_repeated():
    for token in ("--wandb.api_key=s3cr3t", "loggers.wandb.api_key=s3cr3t", "loggers.wandb.api_key=[s3cr3t"):
        assert "s3cr3t" not in str(only_problem(token))


def test_a_value_that_is_not_yaml_names_its_key():
    assert only_problem("optimizer.betas=[0.9").path == "optimizer.betas=:1"


def test_a_key_below_a_value_is_refused(tmp_path):
    assert "'quickstart'" in only_problem("run_name.x=3", path=write_small(tmp_path, "run_name: quickstart")).message
    problem = only_problem("eval_loader.num_workers=1", path=write_small(tmp_path, "eval_loader: ${train_loader}"))
    assert "${train_loader}" in problem.message


def test_split_arguments(tmp_path, monkeypatch):
    odd = write(tmp_path, "").rename(tmp_path / "a=b.yaml")
    assert split_arguments([]) == (None, [])
    assert split_arguments(["r.yaml", "a=1"]) == ("r.yaml", ["a=1"])
    assert split_arguments(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split_arguments(["--a=1"]) == (None, ["--a=1"])
    assert split_arguments([str(odd)]) == (str(odd), [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_arguments(["~/a=b.yaml", "a=~"]) == (str(odd), ["a=~"])


# ------------------------------------------------------------------------------------------------------ interpolations


@pytest.mark.parametrize(
    ("overrides", "paths", "words"),
    [
        (["load_path=${nowhere}"], ["load_path"], "'nowhere' not found"),
        (["load_path=${model.nowhere}"], ["load_path"], "not found"),
        (["load_path=${tokenizer.name}", "tokenizer.name=${load_path}"], ["load_path", "tokenizer.name"], "Recursive"),
        (["model.attention=${model}"], ["model.attention"], "parent"),
        (["load_path=${"], ["load_path"], "not an interpolation"),
        (["load_path=x${a"], ["load_path"], "not an interpolation"),
        (["load_path='\\${a}'"], ["load_path"], "literal"),
        (["load_path='???'"], ["load_path"], "Missing mandatory value"),
        (["load_path='${oc.env:NOT_SET_ANYWHERE}'"], ["load_path"], "NOT_SET_ANYWHERE"),
        (["load_path='${oc.env:WANDB_API_KEY,x}'"], ["load_path"], "secret"),
        (["load_path='${oc.create:{a: 1}}'"], ["load_path"], "resolver 'oc.create' is refused"),
        (["loggers.wandb.tags=[a, '${nowhere}']"], ["loggers.wandb.tags[1]"], "not found"),
        (["seed=${run_name}"], ["seed"], "'quickstart'"),
    ],
)
def test_bad_interpolations_are_named_where_they_stand(overrides, paths, words):
    found = problems_of(*overrides)
    assert list(found) == paths or sorted(found) == sorted(paths)
    assert all(words in found[path].message for path in paths)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": "${b}", "b": "${c.d}", "c": {"d": 1}, "e": ["${a}", {"f": "x-${g}-${g}"}], "g": "${h}/y", "h": "z"},
        {"a": "${b}", "b": None, "c": "${d}", "d": True, "e": "${f}", "f": 1.5e-6, "g": "${h}", "h": ""},
        {"a": "${b}", "b": {"c": "${d}"}, "d": [1, "${e}"], "e": "x"},
        {"a": "${b}-${c}", "b": 1.0, "c": None, "d": {"e": "${.f}", "f": "${oc.decode:'3'}"}},
    ],
)
def test_interpolations_mean_what_they_mean_to_omegaconf(tree):
    assert Resolver().resolve(tree) == OmegaConf.to_container(OmegaConf.create(tree), resolve=True)


def test_mappings_that_refer_to_each_other_end_in_problems():
    assert problems_of("train_loader.dataset=${eval_loader}", "eval_loader.dataset=${train_loader}")
    assert (
        "Recursive" in problems_of("train_loader=${eval_loader}", "eval_loader=${train_loader}")["eval_loader"].message
    )


# ------------------------------------------------------------------------------------------------- row 23: strict YAML


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            "seed: 1\nrun_name: !!python/object/apply:os.system ['touch pwned']\n",
            2,
            "'!!python/object/apply:os.system'",
        ),
        ("a: !!python/name:os.system\n", 1, "refused"),
        ("a: !custom {b: 1}\n", 1, "'!custom'"),
        ("a: !!timestamp 2020-01-01\n", 1, "refused"),
        ("? !!python/object/apply:os.getcwd []\n: 1\n", 1, "not a string"),
    ],
)
def test_row23_yaml_tags_are_refused(tmp_path, monkeypatch, text, line, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    problem = only_problem(path=path)
    assert problem.path == f"{path}:{line}"
    assert words in problem.message
    assert not (tmp_path / "pwned").exists()


def test_row23_tags_in_overrides_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("seed", "loggers.wandb.tags"):
        assert "refused" in only_problem(f"{path}=!!python/object/apply:os.system ['touch pwned']").message
    assert "got" in only_problem("run_name=!!python/object/apply:os.system ['touch pwned']").message
    assert not (tmp_path / "pwned").exists()


def test_row23_duplicate_keys_are_refused_at_every_depth(tmp_path):
    path = write(tmp_path, "seed: 1\nmodel:\n  moe:\n    top_k: 1\n    top_k: 2\nseed: 2\n")
    found = problems_of(path=path)
    assert "key 'model.moe.top_k' is given twice (first on line 4)" in found[f"{path}:5"].message
    assert "key 'seed' is given twice (first on line 1)" in found[f"{path}:6"].message
    assert "twice" in only_problem("mesh={shard: 1, shard: 2}").message


def test_row23_alias_bombs_and_loops_are_refused(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert "aliases expand too far" in only_problem(path=write(tmp_path, bomb)).message
    assert "contains itself" in only_problem(path=write(tmp_path, "a: &a [*a]\n")).message
    assert "nested too deeply" in only_problem(path=write(tmp_path, "a: " + "[" * 5000)).message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: *nowhere\n", "not valid YAML"),
        ("\ta: 1\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        ("a: !!int x\n", "not valid YAML"),
        ("1: x\n", "a key that is not a string"),
        ("[1, 2]: x\n", "a key that is not a string"),
        ("- a\n", "the top level is a list"),
        ("just words\n", "the top level is 'just words'"),
    ],
)
def test_row23_other_broken_files(tmp_path, text, words):
    path = write(tmp_path, text)
    problem = only_problem(path=path)
    assert problem.path.startswith(str(path))
    assert words in problem.message


def test_plain_words_are_strings():
    text = "[yes, on, No, 2020-01-01, '1', 12:30, 010, 0x1F, 1_000, ~, 1e3, .5, -.inf, +4]"
    values = ["yes", "on", "No", "2020-01-01", "1", "12:30", "010", "0x1F", 1000, None, 1000.0, 0.5, -math.inf, 4]
    parsed = parse_yaml(text, "text")
    assert parsed == values
    assert list(map(type, parsed)) == list(map(type, values))


# ------------------------------------------------------------------------------------------------------ files not there


def test_an_unknown_file_suggests_a_near_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    problem = only_problem(path=tmp_path / "quikstart.yml")
    assert problem.message == "no such recipe file"
    assert problem.suggestion == str(tmp_path / "quickstart.yaml")


def test_unreadable_files(tmp_path):
    assert "Is a directory" in only_problem(path=tmp_path).message
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run_name: é\n".encode("latin-1"))
    assert "not UTF-8" in only_problem(path=latin).message


# ------------------------------------------------------------------------------------------------- dump, flatten, diff


def test_dump_is_plain_yaml_in_the_schemas_order():
    data = yaml.safe_load(dump_recipe(load_recipe(None, QUICK)))
    assert list(data) == [field.name for field in dataclasses.fields(Recipe)]
    assert data["model"]["moe"]["backend"] == "auto"


def test_flatten_and_diff():
    old = load_recipe(None, QUICK)
    new = load_recipe(None, [*QUICK, "model.moe.top_k=4", "ema=null", "loggers.wandb={project: p}"])
    assert flatten(old)["optimizer.betas"] == [0.9, 0.95]
    assert flatten(old)["callbacks.lr_monitor"] == {}
    assert diff_recipes(old, copy.deepcopy(old)) == []
    lines = diff_recipes(old, new)
    assert lines[0] == "model.moe.top_k: 2 -> 4"
    assert "loggers.wandb: null -> (absent)" in lines
    assert "loggers.wandb.project: (absent) -> 'p'" in lines


STRANGE = st.sampled_from(
    ["yes", "null", "~", "6e-4", "1_000", "010", "12:30", "", " a ", "#x", "a: b", "'", '"', "é\n"]
)
TEXT = STRANGE | st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "${" not in text)


def values_of(spec: Spec) -> st.SearchStrategy[Any]:
    """Values that one key accepts, as the schema states them."""
    if spec.available is not None:
        return st.sampled_from([plain(value) for value in spec.available])
    kind = spec.item or spec.kind
    low, high = spec.bounds.get("ge", spec.bounds.get("gt")), spec.bounds.get("le", spec.bounds.get("lt"))
    if kind is bool:
        values: st.SearchStrategy[Any] = st.booleans()
    elif kind is int:
        values = st.integers(None if low is None else int(low), 10**9 if high is None else int(high))
    elif kind is float:
        open_ends = {"exclude_min": "gt" in spec.bounds, "exclude_max": "lt" in spec.bounds}
        open_ends = {name: value for name, value in open_ends.items() if value}
        fp32 = {"width": 32, "allow_subnormal": False, "allow_nan": False, "allow_infinity": False}
        values = st.floats(low, high, **fp32, **open_ends)  # type: ignore[arg-type]
    elif issubclass(kind, StrEnum):
        values = st.sampled_from([str(member) for member in kind])
    elif spec.path:
        values = TEXT.filter(lambda text: text != "???" and not naming_problem(text))
    elif spec.pattern in (DURATION, INTERVAL):
        values = st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["ba", "ep", "tok", "sp"]))
    else:
        values = st.from_regex(spec.pattern, fullmatch=True) if spec.pattern else TEXT
        values = values.filter(lambda text: text != "???")  # OmegaConf's "missing"
    if spec.item:
        size = {"min_size": spec.length, "max_size": spec.length} if spec.length else {"max_size": 3}
        values = st.lists(values, **size)  # type: ignore[arg-type]
    return st.none() | values if spec.optional else values


def mapping_of(cls: type, prefix: str, tag: str, chosen: str, bound: set[str]) -> st.SearchStrategy[dict[str, Any]]:
    optional: dict[str, st.SearchStrategy[Any]] = {}
    required = {tag: st.just(chosen)} if chosen else {}
    for name, spec in specs(cls).items():
        path = f"{prefix}{name}"
        if path in bound or name in required:
            continue
        if spec.is_mapping and spec.available is None:
            variants = spec.variants or {"": spec.kind}
            below = [mapping_of(child, f"{path}.", spec.tag, kind, bound) for kind, child in variants.items()]
            optional[name] = st.one_of(*below, *([st.none()] if spec.optional else []))
        else:
            optional[name] = values_of(spec)
    return st.fixed_dictionaries(required, optional=optional)


# Keys that no rule across keys reads, so that every drawn recipe is valid.
FREE_RECIPES = mapping_of(
    Recipe, "", "", "", {key for rule in RULES for key in rule.keys} | {"mesh", "model.attention", "format_version"}
)


@settings(max_examples=50, deadline=None)
@given(tree=FREE_RECIPES)
def test_dump_then_load_gives_the_same_recipe(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    recipe = recipe_of(layered(parse_yaml(yaml.dump(tree, Dumper=StrictDumper), "recipe.yaml") or {}))
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert diff_recipes(recipe, again) == []
