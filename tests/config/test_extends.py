"""Recipes that extend others: what is merged, what is refused and how, and where each value comes from."""

import re
from pathlib import Path

import pytest
import yaml

from moefoundry.config import (
    ConfigError,
    ConstantWithWarmupConfig,
    CosineWithWarmupConfig,
    MlaConfig,
    annotated,
    dump_recipe,
    load_layers,
    load_recipe,
    recipe_of,
)
from tests.conftest import QUICK, QUICKSTART


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes recipes below the working directory: name -> text. ``quick.yaml`` has all that is required."""
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").write_text(yaml.safe_dump(load_layers(None, QUICK).tree), encoding="utf-8")

    def write(**texts: str) -> None:
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return write


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_chain_of_files_in_other_directories(files):
    files(
        base="extends: quick.yaml\nrun_name: base\nseed: 1\n"
        "model: {moe: {num_experts: 8, top_k: 3}}\noptimizer: {betas: [0.8, 0.9]}\n",
        deep__middle="extends: ../base.yaml\nseed: 2\nmodel: {moe: {top_k: 1}}\n",
        deep__deeper__child="extends: ../middle.yaml\nrun_name: child\noptimizer: {betas: [0.7, 0.8]}\n",
    )
    recipe = load_recipe("deep/deeper/child.yaml", ["model.n_layers=2"])
    assert (recipe.run_name, recipe.run_dir, recipe.seed) == ("child", "runs/child", 2)
    assert (recipe.model.moe.num_experts, recipe.model.moe.top_k, recipe.model.n_layers) == (8, 1, 2)
    assert recipe.optimizer.betas == [0.7, 0.8], "lists are replaced"


def test_what_is_kept_is_resolved(files):
    files(base="extends: quick.yaml\nseed: 5\n", child="extends: base.yaml\n")
    kept = dump_recipe(load_recipe("child.yaml"))
    assert "extends" not in kept
    files(again=kept)
    assert load_recipe("again.yaml") == load_recipe("child.yaml") == load_recipe("quick.yaml", ["seed=5"])


def test_interpolations_are_resolved_after_merging(files):
    files(
        base="extends: quick.yaml\nseed: ${max_seq_len}\neval_loader: ${train_loader}\n",
        child="extends: base.yaml\nmax_seq_len: 64\n",
    )
    recipe = load_recipe("child.yaml", ["train_loader.num_workers=3"])
    assert (recipe.seed, recipe.eval_loader) == (64, recipe.train_loader)


def test_null_turns_off_and_a_mapping_over_null_has_its_defaults(files):
    files(
        base="extends: quick.yaml\neval_loader: {num_workers: 2}\nloggers: {wandb: {project: p}}\nema: {decay: 0.5}\n",
        off="extends: base.yaml\neval_loader: null\nema: null\nloggers: {wandb: {}}\n",
        on="extends: off.yaml\neval_loader: {drop_last: true}\nema: {}\n",
    )
    off, on = load_recipe("off.yaml"), load_recipe("on.yaml")
    assert (off.eval_loader, off.ema) == (None, None)
    assert off.loggers.wandb.project == "p", "an empty mapping over another changes nothing"
    assert (on.eval_loader.num_workers, on.eval_loader.drop_last, on.ema.decay) == (0, True, 0.999)


def test_another_variant_drops_the_keys_that_it_has_not(files):
    files(
        base="extends: quick.yaml\nscheduler: {t_warmup: 5ba, alpha_f: 0.3}\n"
        "model: {attention: {n_kv_heads: 2, n_heads: 4}}\n",
        child="extends: base.yaml\nscheduler: {name: constant_with_warmup}\nmodel: {attention: {kind: mla}}\n",
        grandchild="extends: child.yaml\nscheduler: {name: cosine_with_warmup}\n",
        wrong="extends: base.yaml\nscheduler: {name: constant_with_warmup, alpha_f: {x: 1}}\n",
        strange="extends: quick.yaml\nscheduler: {name: constant_with_warmup, alpha_f: {x: 1}}\n",
    )
    recipe = load_recipe("child.yaml")
    assert recipe.scheduler == ConstantWithWarmupConfig(t_warmup="5ba")
    assert recipe.model.attention == MlaConfig(n_heads=4)
    assert load_recipe("grandchild.yaml").scheduler == CosineWithWarmupConfig(t_warmup="5ba")
    assert "scheduler.alpha_f.x (in wrong.yaml): scheduler.alpha_f is 0.3, not a mapping" in error_of("wrong.yaml")
    assert "scheduler.alpha_f (in strange.yaml): unknown key of name 'constant_with_warmup'" in error_of("strange.yaml")


def test_errors_say_in_which_file_a_key_stands(files):
    files(
        base="extends: quick.yaml\nseed: x\n"
        "model: {moe: {topk: 2, num_experts: 4}}\nloggers: {wandb: {tags: [a, 1]}}\n",
        child="extends: base.yaml\nmodel: {d_model: wide}\nmesh: {sharrd: 1}\nmodel.moe.top_k: 3\n",
    )
    message = error_of("child.yaml", "optimizer.lr=-1", "loggers.wandb.api_key=hf_abcdefghijklmnopqrstuvwx")
    assert message.splitlines() == [
        "child.yaml: 8 errors",
        "  seed (in base.yaml): got 'x' (a string); allowed: an integer >= 0 and <= 4294967295",
        "  model.d_model (in child.yaml): got 'wide' (a string); allowed: an integer >= 1",
        "  model.moe.topk (in base.yaml): unknown key; did you mean 'model.moe.top_k'?",
        "  mesh.sharrd (in child.yaml): unknown key; did you mean 'mesh.shard'?",
        "  optimizer.lr: got -1.0; allowed: a number > 0",
        "  loggers.wandb.tags[1] (in base.yaml): got 1 (an integer); allowed: texts of 1 to 64 characters",
        "  loggers.wandb.api_key: unknown key; allowed: project, entity, group, name, tags",
        "  model.moe.top_k (in child.yaml): a dotted key is for overrides; nest it in the file",
    ]
    assert "model.moe.top_k (in base.yaml): 9 experts" in (
        files(
            base="extends: quick.yaml\nmodel: {moe: {top_k: 9}}\n",
            child="extends: base.yaml\nmodel: {moe: {num_experts: 8}}\n",
        )
        or error_of("child.yaml")
    )


def test_a_mapping_is_not_merged_into_an_interpolation(files):
    base = "extends: quick.yaml\neval_loader: ${train_loader}\n"
    files(base=base, child="extends: base.yaml\neval_loader: {num_workers: 1}\n")
    assert error_of("child.yaml").splitlines()[1] == (
        "  eval_loader.num_workers (in child.yaml): eval_loader is '${train_loader}', not a mapping; "
        "allowed: another value of eval_loader as a whole"
    )


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"a": "extends: a.yaml"}, r"extends: a\.yaml: a recipe cannot extend itself\n  \(a\.yaml extends a\.yaml\)"),
        (
            {"a": "extends: d/b.yaml", "d__b": "extends: ../c.yaml", "c": "extends: d/../a.yaml"},
            r"extends: c\.yaml: a recipe cannot extend itself"
            r"\n  \(a\.yaml extends d/b\.yaml extends c\.yaml extends a\.yaml\)",
        ),
        (
            {"a": "extends: bass.yaml", "base": "{}"},
            r"bass\.yaml: no such recipe file; did you mean 'base\.yaml'\?\n  \(a\.yaml extends bass\.yaml\)",
        ),
        ({"a": "extends: b.yaml", "b": "x: [1\n"}, r"b\.yaml:2: not valid YAML.*\n  \(a\.yaml extends b\.yaml\)"),
        ({"a": "extends: b.yaml", "b": "seed: 1\nseed: 2\n"}, r"b\.yaml:2: key 'seed' is given twice"),
        ({"a": "extends: b.yaml", "b": "# nothing"}, r"b\.yaml: is empty"),
        ({"a": "extends: b.yaml", "b": "run_name: !!python/name:os.system x"}, r"b\.yaml:1: YAML tag .* is refused"),
        ({"a": "extends: .", "b": "{}"}, r"\.: cannot be read: Is a directory\n  \(a\.yaml extends \.\)"),
        ({"a": "extends: [b.yaml]", "b": "{}"}, r"extends: a\.yaml: got a list; allowed: the path of another recipe"),
        ({"a": "extends: null"}, r"extends: a\.yaml: got null; allowed: the path"),
        ({"a": "extends: ''"}, r"extends: a\.yaml: is empty; allowed: the path"),
        ({"a": "extends: s3://b/c.yaml"}, r"extends: a\.yaml: 's3://b/c\.yaml' must be a path, not a URL"),
        ({"a": "extends: ${run_name}.yaml"}, r"files are read before interpolations are resolved"),
        ({"a": "extends: quick.yaml\nextnds: b.yaml"}, r"extnds \(in a\.yaml\): unknown key; did you mean 'extends'\?"),
        (
            {"a": "extends: quick.yaml\nmodel: {extends: b.yaml}"},
            r"model\.extends \(in a\.yaml\): one recipe file extends another at its top",
        ),
    ],
)
def test_what_cannot_be_extended(files, texts, problem):
    files(**texts)
    message = error_of("a.yaml")
    assert re.search(problem, message), message
    assert message.startswith("a.yaml: 1 error\n")


def test_an_override_extends_nothing(files):
    files(a="{}", b="{}")
    assert "extends: a recipe file extends another at its top; no override does" in error_of("a.yaml", "extends=b.yaml")


def test_a_file_of_another_release_through_links_and_the_home_directory(files, tmp_path, monkeypatch):
    files(
        there__base="extends: more.yaml\nseed: 4\n",
        there__more="extends: ../quick.yaml\nmax_seq_len: 32\n",
        a="extends: link/base.yaml\n",
    )
    (tmp_path / "link").symlink_to("there")
    assert load_recipe("a.yaml").seed == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    files(b="extends: ~/there/base.yaml\n", c=f"extends: {tmp_path}/there/base.yaml\n")
    assert load_recipe("b.yaml") == load_recipe("c.yaml") == load_recipe("a.yaml")


def test_the_quickstart_can_be_extended(files):
    files(mine=f"extends: {QUICKSTART}\nmodel: {{n_layers: 2}}\n")
    assert load_recipe("mine.yaml") == load_recipe(QUICKSTART, ["model.n_layers=2"])


# ---------------------------------------------------------------------------------------------------------------- show


def origins_of(text: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (value, comment) of what is shown."""
    found, path = {}, []
    for line in text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name, _, rest = line.strip().partition(":")
        path = [*path[:indent], name]
        value, _, comment = rest.rpartition("  # ")
        found[".".join(path)] = (value.strip(), comment)
    return found


def test_show_says_where_each_value_comes_from(files):
    files(
        base="extends: quick.yaml\nrun_name: base\nmodel: {moe: {top_k: 3}}\nema: {}\n"
        "loggers: {wandb: {tags: [x, '${run_name}']}}\n",
        child="extends: base.yaml\nrun_name: child\neval_loader: ${train_loader}\nmodel: {moe: {num_experts: 8}}\n",
    )
    layers = load_layers("child.yaml", ["seed=3", "train_loader.num_workers=${seed}"])
    recipe = recipe_of(layers)
    shown = annotated(recipe, layers)
    origins = origins_of(shown)
    assert origins["run_name"] == ("child", "child.yaml")
    assert origins["run_dir"] == ("runs/child", "runs/${run_name} (default)")
    assert origins["seed"] == ("3", "override")
    assert origins["model.moe.top_k"] == ("3", "base.yaml")
    assert origins["model.moe.num_experts"] == ("8", "child.yaml")
    assert origins["model.n_layers"] == ("6", "quick.yaml")
    assert origins["ema.decay"] == ("0.999", "default")
    assert origins["train_loader.num_workers"] == ("3", "${seed} (override)")
    assert origins["eval_loader.dataset.split"] == ("train", "${train_loader} (child.yaml)")
    assert origins["loggers.wandb.tags"] == ("[x, child]", "${run_name} (base.yaml)")
    files(shown=shown)
    assert load_recipe("shown.yaml") == recipe


def test_show_hides_secrets_and_keeps_every_value_on_its_line(files):
    token = "hf_" + "a" * 30
    files(
        a="extends: quick.yaml\n"
        f"callbacks: {{report: {{prompt: \"é: #\\n'{token}\"}}}}\nload_path: '{token}/${{run_name}}'\n"
    )
    (Path("a.yaml")).rename(f"{token} \n#.yaml")
    layers = load_layers(f"{token} \n#.yaml", ["loggers.wandb={group: '" + "0a" * 20 + "'}"])
    shown = annotated(recipe_of(layers), layers)
    assert token not in shown
    assert "0a0a0a" not in shown
    assert len(shown.splitlines()) == len(origins_of(shown))
    files(shown=shown)
    assert load_recipe("shown.yaml").callbacks.report.prompt == "é: #\n'(secret)"
