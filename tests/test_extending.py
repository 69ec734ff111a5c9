"""Parts of other packages and of Composer: strict like the schema's own, and used in a run."""

from __future__ import annotations

import functools
import json
import math
import pickle
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import ConfigError, dump_recipe, load_layers, load_recipe
from moefoundry.config.parts import (
    COMPOSER_ALGORITHMS,
    COMPOSER_CALLBACKS,
    COMPOSER_LOGGERS,
    COMPOSER_SCHEDULERS,
    TABLES,
)
from tests.conftest import QUICKSTART
from tests.distributed import captured_output, run_distributed

EXAMPLE = Path(__file__).parents[1] / "docs/examples/steps_and_scores"
USE = [
    "callbacks.steps_per_second.every=1",
    "model.moe.router={score_function: tempered_softmax, temperature: 0.5}",
    "losses.smoothing.weight=0.1",
]


OTHERS = """
from dataclasses import dataclass
from moefoundry.config import AttentionConfig, OptimizerConfig, WarmupConfig, key
from moefoundry.registry import Part

@dataclass
class SgdConfig(OptimizerConfig):
    momentum: float = key(0.9, "Momentum.", ge=0)

@dataclass
class StepsConfig(WarmupConfig):
    share: float = key(0.5, "Of the peak.", gt=0)

@dataclass
class LinesConfig:
    file: str = key("lines.txt", "Name of a file.")

@dataclass
class MeanConfig(AttentionConfig):
    gain: float = key(1.0, "Multiplies the mean.", gt=0)

def mean(cfg, model):
    from torch import nn
    from moefoundry.model.attention import Attention
    class Mean(Attention):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        def forward(self, x_BSD, context, cache=None):
            ones = x_BSD.new_ones(x_BSD.shape[1]).cumsum(0).unsqueeze(-1)
            return self.o_proj(x_BSD.cumsum(dim=1) / ones * cfg.gain)
    return Mean()

def each_slot(cfg):
    import torch
    import torch.nn.functional as F
    def mixture(tokens_PD, weights_PK, gate_EFD, up_EFD, down_EDF, order):
        out_PD, experts_N = torch.zeros_like(tokens_PD), torch.arange(cfg.num_experts)
        experts_N = experts_N.repeat_interleave(order.tokens_per_expert_E)
        for slot, expert in zip(order.slot_of_row_N.tolist(), experts_N.tolist()):
            token = slot // order.top_k
            hidden = F.silu(gate_EFD[expert] @ tokens_PD[token]) * (up_EFD[expert] @ tokens_PD[token])
            row = weights_PK.flatten()[slot] * (down_EDF[expert] @ hidden)
            out_PD = out_PD.index_add(0, torch.tensor([token]), row.unsqueeze(0))
        return out_PD
    mixture.obstacle = lambda tokens_PD, hidden_size: "F is 7" if hidden_size == 7 else ""
    return mixture

def sgd(cfg, model, recipe):
    import torch
    from moefoundry.optim import parameter_groups
    return torch.optim.SGD(parameter_groups(model, 0.0), lr=cfg.lr, momentum=cfg.momentum)

def lines(cfg, run_dir, entry):
    from composer.loggers import LoggerDestination
    class Lines(LoggerDestination):
        def log_metrics(self, metrics, step=None):
            with (run_dir / cfg.file).open("a") as file:
                file.write(f"{step} {sorted(metrics)}\\n")
    return Lines()

def counting(cfg, recipe):
    from composer.core import Algorithm, Event
    class Counting(Algorithm):
        def match(self, event, state):
            return event == Event.BATCH_START
        def apply(self, event, state, logger):
            logger.log_metrics({"counting/batches": state.timestamp.batch.value + 1, "batch": 7, "lr": 9.0})
    return Counting()

optimizer, scheduler = Part(SgdConfig, sgd), Part(StepsConfig, lambda cfg: lambda state: cfg.share)
logger, algorithm = Part(LinesConfig, lines), Part(LinesConfig, counting)
attention, backend = Part(MeanConfig, mean), Part(None, each_slot)
"""
FAMILY = """
from moefoundry.conversion.families.llama import Llama
from moefoundry.registry import Part

class Alpaca(Llama):
    name = "alpaca"
    architecture = "AlpacaForCausalLM"

part, misnamed = Part(None, "family:Alpaca"), Part(None, "family:Llama")
"""
OTHERS_POINTS = {
    "moefoundry.optimizers": {"plain_sgd": "others:optimizer"},
    "moefoundry.schedulers": {"half": "others:scheduler"},
    "moefoundry.loggers": {"lines": "others:logger"},
    "moefoundry.algorithms": {"counting": "others:algorithm"},
    "moefoundry.attention_kinds": {"running_mean": "others:attention"},
    "moefoundry.mixture_backends": {"each_slot": "others:backend"},
}
OTHERS_USE = [
    "optimizer={name: plain_sgd, lr: 0.25}",
    "scheduler.name=half",
    "loggers.lines={}",
    "model.moe.backend=each_slot",
    "algorithms.counting={}",
]


def install(site: Path, name: str, points: dict[str, dict[str, str]], files: dict[str, str]) -> None:
    """Lay a package down as pip does, as far as Python needs it."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in of.items()) for group, of in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for file, text in files.items():
        (site / file).write_text(text)


def install_example(site: Path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"], {})
    for file in EXAMPLE.glob("*.py"):
        shutil.copy(file, site)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are installed to, for one test."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    for table in TABLES.values():
        monkeypatch.setattr(table, "_made", {})
    return directory


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(QUICKSTART, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_the_example_is_small() -> None:
    assert sum(len(file.read_text().splitlines()) for file in EXAMPLE.iterdir() if file.is_file()) < 60


def test_the_page_names_all_that_is_listed() -> None:
    page = (EXAMPLE.parents[1] / "extending.md").read_text()
    composers = (*COMPOSER_CALLBACKS, *COMPOSER_ALGORITHMS, *COMPOSER_LOGGERS, *COMPOSER_SCHEDULERS)
    assert all(f"`{name}`" in page for name in composers)
    assert all(f"`moefoundry.{kind}`" in page for kind in TABLES)


def test_recipes_name_parts_of_installed_packages(site: Path, tmp_path: Path) -> None:
    install_example(site)
    recipe: Any = load_recipe(QUICKSTART, USE)
    assert recipe.callbacks.steps_per_second.every == 1
    assert (recipe.model.moe.router.temperature, recipe.model.moe.router.num_groups) == (0.5, 1)
    assert "steps_and_scores_parts" not in sys.modules, "what needs torch is not imported to check a recipe"
    assert recipe.callbacks.speed_monitor is not None, "the schema's own are as they were"
    (tmp_path / "kept.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "kept.yaml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert load_recipe(QUICKSTART, ["callbacks.steps_per_second=null"]).callbacks.steps_per_second is None  # type: ignore[attr-defined]


def test_errors_are_as_strict_as_the_schemas_own(site: Path) -> None:
    install_example(site)
    assert problems("callbacks.steps_per_secnd={}") == [
        "callbacks.steps_per_secnd: unknown key; did you mean 'callbacks.steps_per_second'?"
    ]
    assert problems("callbacks.steps_per_second={evry: 2}") == [
        "callbacks.steps_per_second.evry: unknown key; did you mean 'callbacks.steps_per_second.every'?"
    ]
    assert problems("callbacks.steps_per_second.every=0") == [
        "callbacks.steps_per_second.every: got 0; allowed: an integer >= 1"
    ]
    assert problems("model.moe.router={score_function: tempered_sotmax, scale: -1}") == [
        "model.moe.router.score_function: got 'tempered_sotmax'; allowed: softmax, sigmoid, sparsemixer, "
        "tempered_softmax; did you mean 'tempered_softmax'?"
    ]
    assert problems("model.moe.router={score_function: tempered_softmax, scale: -1}") == [
        "model.moe.router.scale: got -1.0; allowed: a number > 0 and <= 1000000.0"
    ]
    assert problems("model.moe.router={score_function: tempered_softmax, temperature: 0}") == [
        "model.moe.router.temperature: got 0.0; allowed: a number > 0"
    ]
    (unknown,) = problems("model.moe.router.temperature=1")
    assert unknown.startswith("model.moe.router.temperature: unknown key")


PART = "from dataclasses import dataclass\nfrom moefoundry.registry import Part\n"
NO_CONFIG = r"package broken 1\.0: its config is (not derived from moefoundry\.config|no dataclass|not None)"
OTHER = "@dataclass\nclass Other:\n    x: int = 0\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nowhere", r"broken:part of package broken 1\.0 cannot be imported: ModuleNotFoundError: .*nowhere'$"),
        ("raise OSError('no\\nlicence')", r"package broken 1\.0 cannot be imported: OSError: no licence$"),
        ("", r"broken:part of package broken 1\.0 cannot be imported: AttributeError: .*part'$"),
        ("part = print", r"broken:part of package broken 1\.0 is no moefoundry\.registry\.Part$"),
        (f"{PART}part = Part(int, print)", NO_CONFIG),
        (f"{PART}{OTHER}part = Part(Other, print)", NO_CONFIG),
    ],
    ids=["missing module", "own error", "no such name", "no part", "no dataclass", "no keys"],
)
@pytest.mark.parametrize(
    ("group", "override", "key"),
    [
        ("callbacks", "callbacks.mine={}", "callbacks.mine"),
        ("loggers", "loggers.mine.x=1", "loggers.mine"),
        ("schedulers", "scheduler.name=mine", "scheduler.name: mine"),
        ("optimizers", "optimizer.name=mine", "optimizer.name: mine"),
        ("router_scores", "model.moe.router.score_function=mine", "model.moe.router.score_function: mine"),
        ("losses", "losses.mine.weight=1", "losses.mine"),
        ("attention_kinds", "model.attention.kind=mine", "model.attention.kind: mine"),
        ("mixture_backends", "model.moe.backend=mine", "model.moe.backend: mine"),
        ("icl_task_types", "icl_tasks=[{icl_task_type: mine}]", "icl_tasks[0].icl_task_type: mine"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str, group: str, override: str, key: str
) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install(site, "broken", {f"moefoundry.{group}": {"mine": "broken:part"}}, {"broken.py": source})
    (problem,) = problems(override)
    assert problem.startswith(f"{key}: ")
    assert "\n" not in problem
    assert re.search(expected, problem), problem
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_a_part_of_another_class_is_refused(site: Path) -> None:
    from composer.core import Callback

    from moefoundry.config import UserError
    from moefoundry.config.making import make_parts

    source = f"{PART}from moefoundry.config import key\n@dataclass\nclass Mine:\n    x: int = key(1, 'A number.')\n"
    source += "part = Part(Mine, lambda cfg, recipe: None)\n"
    install(site, "nothing", {"moefoundry.callbacks": {"nothing": "nothing:part"}}, {"nothing.py": source})
    recipe = load_recipe(QUICKSTART, ["callbacks.nothing={}"])
    with pytest.raises(UserError, match=r"^callbacks\.nothing: nothing: its build function returns nothing$"):
        make_parts("callbacks", Callback, recipe.callbacks, recipe)
    (problem,) = problems("callbacks.generate={}")
    assert problem.count("speed_monitor") == 1


@pytest.mark.parametrize("change", [lambda scores: scores[:, :2], lambda scores: scores.double()])
def test_scores_of_another_shape_or_dtype_are_refused(change: Any) -> None:
    import torch

    from moefoundry.config import UserError
    from moefoundry.moe.router import Router

    router = Router(8, load_recipe(QUICKSTART).model.moe)
    router.score = lambda logits_TE: change(logits_TE.softmax(dim=-1))
    with pytest.raises(UserError, match=r"^model\.moe\.router\.score_function: softmax gives scores \[5, .*\[5, 16\]"):
        router(torch.randn(5, 8))


TASKS = """
from dataclasses import dataclass
from moefoundry.config import TaskConfig, key
from moefoundry.registry import Part

@dataclass
class LengthConfig(TaskConfig):
    longest: int = key(10, "Letters at most.", ge=1)

class Length:
    usual = ("share",)
    def __init__(self, cfg):
        from moefoundry.evaluation.tasks.task import accuracy
        self.cfg, self.metrics = cfg, {"share": accuracy}
    def evaluate(self, evaluation):
        return [{"correct": len(example["text"]) <= self.cfg.longest} for example in evaluation.examples]

part = Part(LengthConfig, Length)
"""


def test_types_of_tasks_of_others(site: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    from moefoundry.config.tasks import read_tasks
    from moefoundry.evaluation.prompts import PromptTokenizer
    from moefoundry.evaluation.tasks.run import Sizes, evaluate_tasks, load_tasks
    from tests.model.tiny import tiny_config, tiny_model

    install(site, "lengths", {"moefoundry.icl_task_types": {"length": "lengths:part"}}, {"lengths.py": TASKS})
    (tmp_path / "texts.jsonl").write_text('{"text": "short"}\n{"text": "much longer"}\n')
    task = {"label": "l", "icl_task_type": "length", "num_fewshot": [0], "dataset_uri": str(tmp_path / "texts.jsonl")}
    tokenizer = PromptTokenizer.open(tiny_corpus / "tokenizer", 384)
    results = evaluate_tasks(tiny_model(tiny_config()), tokenizer, load_tasks(read_tasks([task])), Sizes(2, 16))
    assert results.metrics == {"metrics/l/0-shot/share": 0.5}
    (problem,) = problems("icl_tasks=[{label: l, icl_task_type: length, num_fewshot: [0], dataset_uri: x, longest: 0}]")
    assert problem == "icl_tasks[0].longest: got 0; allowed: an integer >= 1"


def test_moments_of_another_optimizer_are_not_promised(site: Path) -> None:
    install(site, "others", OTHERS_POINTS, {"others.py": OTHERS})
    (problem,) = problems("optimizer.name=plain_sgd", "precision.optimizer_moments=bf16")
    assert problem == (
        "precision.optimizer_moments: bf16, but only adamw has such moments, and optimizer.name is plain_sgd; "
        "allowed: fp32"
    )
    kept = load_recipe(QUICKSTART, ["optimizer.name=plain_sgd", "optimizer.momentum=0.5"]).optimizer
    assert (type(kept).__name__, kept.name, kept.momentum) == ("SgdConfig", "plain_sgd", 0.5)  # type: ignore[attr-defined]


def test_kinds_of_attention_and_backends_of_others_are_as_strict(site: Path) -> None:
    install(site, "others", OTHERS_POINTS, {"others.py": OTHERS})
    assert problems("model.moe.backend=each_slt") == [
        "model.moe.backend: got 'each_slt'; allowed: auto, triton, grouped_mm, loop, megablocks, quack, each_slot; "
        "did you mean 'each_slot'?"
    ]
    assert problems("model.attention={kind: running_mean, gain: 0, n_heads: 2}") == [
        "model.attention.gain: got 0.0; allowed: a number > 0"
    ]
    (unknown,) = problems("model.attention={kind: running_mean, n_kv_heads: 2}")
    assert unknown.startswith("model.attention.n_kv_heads: unknown key of kind 'running_mean'")


@pytest.mark.parametrize(
    ("stated", "other", "key"),
    [
        ("optimizer: {name: plain_sgd, momentum: 0.5, lr: 0.25}", "optimizer.name=adamw", "momentum"),
        ("scheduler: {name: half, share: 0.25}", "scheduler.name=cosine_with_warmup", "share"),
        ("scheduler: {name: half, share: 0.25}", "scheduler.name=quarter", "share"),
        ("model: {attention: {kind: running_mean, gain: 2.0}}", "model.attention.kind=mla", "gain"),
        (
            "model: {moe: {router: {score_function: tempered_softmax, temperature: 2.0}}}",
            "model.moe.router.score_function=softmax",
            "temperature",
        ),
    ],
)
def test_keys_of_a_part_go_with_its_name(site: Path, tmp_path: Path, stated: str, other: str, key: str) -> None:
    install_example(site)
    install(site, "others", OTHERS_POINTS, {"others.py": OTHERS})
    quarter = f"from moefoundry.config import WarmupConfig\n{PART}part = Part(WarmupConfig, None)\n"
    install(site, "quarters", {"moefoundry.schedulers": {"quarter": "quarters:part"}}, {"quarters.py": quarter})
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text(f"extends: {QUICKSTART}\n{stated}\n")
    path, _, value = other.partition("=")
    *above, tag = path.split(".")
    chosen: Any = {tag: value}
    for name in reversed(above):
        chosen = {name: chosen}
    child.write_text(json.dumps({"extends": "parent.yaml"} | chosen))
    for recipe, overrides in ((parent, [other]), (child, [])):
        tree: Any = load_layers(recipe, overrides).tree
        for name in above:
            tree = tree[name]
        assert key not in tree
        assert tree[tag] == value
        load_recipe(recipe, overrides)
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        load_recipe(parent, [other, f"{'.'.join([*above, key])}=1"])


def test_a_backend_of_others_mixes_as_the_plain_one_and_says_where_it_cannot_run(site: Path) -> None:
    import torch

    from moefoundry.config import UserError
    from moefoundry.model.transformer import MoETransformer, meta_model
    from moefoundry.moe.mixture import check_backend
    from moefoundry.parallel import materialize

    install(site, "others", OTHERS_POINTS, {"others.py": OTHERS})
    sizes = ["model.d_model=16", "model.n_layers=2", "model.vocab_size=32", "model.moe.expert_hidden_size=8"]
    sizes += ["model.attention={kind: running_mean, gain: 0.5, n_heads: 2}", "model.ffn_hidden_size=16"]

    def model(backend: str) -> MoETransformer:
        cfg = load_recipe(QUICKSTART, [*sizes, f"model.moe.backend={backend}"]).model
        check_backend(cfg.moe, cfg.d_model, torch.device("cpu"), torch.float32)
        module = meta_model(cfg)
        materialize(module, "cpu", 0)
        return module

    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    ours, theirs = model("grouped_mm"), model("each_slot")
    torch.testing.assert_close(theirs(ids), ours(ids), rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[:, 4:] = 0
    assert torch.equal(theirs(changed)[:, :4], theirs(ids)[:, :4]), "a mean over what came before"
    cfg = load_recipe(QUICKSTART, ["model.moe={backend: each_slot, expert_hidden_size: 7}"]).model
    with pytest.raises(UserError, match=r"^model\.moe\.backend: each_slot cannot run: F is 7; use .*backend=auto$"):
        check_backend(cfg.moe, cfg.d_model, torch.device("cpu"), torch.float32)


def test_an_installed_package_adds_a_family(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.config import UserError
    from moefoundry.conversion import families

    families._family.cache_clear()
    points = {"moefoundry.families": {"alpaca": "family:part", "lama": "family:misnamed"}}
    install(site, "family", points, {"family.py": FAMILY})
    cfg = load_recipe(QUICKSTART, ["model.n_dense_layers=6"]).model
    written = families.FAMILIES["alpaca"].write_config(cfg, 64)
    assert (written["model_type"], written["architectures"]) == ("alpaca", ["AlpacaForCausalLM"])
    assert families.family_of(written).read_config(written).n_layers == 6
    assert families.family_for(cfg).name == "llama", "listed ones come first"
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        families.family_of({"model_type": "Al-Paca"})
    with pytest.raises(UserError, match=r"^model family: lama: its package calls it 'llama'$"):
        families.family_of({"model_type": "lama"})
    monkeypatch.delitem(sys.modules, "family")


def test_no_family_has_an_attention_of_others() -> None:
    from moefoundry.config import AttentionConfig, ModelConfig
    from moefoundry.conversion.families import nearest_family

    family, reasons = nearest_family(ModelConfig(attention=AttentionConfig(kind="running_mean")))
    assert (family, reasons) == (None, ["model.attention.kind: no family has running_mean"])


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    for name in ("first", "second"):
        install(site, name, {"moefoundry.callbacks": {"mine": f"{name}:part"}}, {})
    assert problems("callbacks.mine={}") == [
        "callbacks.mine: there are several, of the packages first 1.0, second 1.0; uninstall all but one"
    ]


def test_a_listed_name_is_never_looked_up(site: Path) -> None:
    """Nothing that is installed can take its place, or slow it down."""
    points = {"moefoundry.callbacks": {"speed_monitor": "bad:part", "report": "bad:part"}}
    install(site, "bad", points, {"bad.py": "raise SystemExit(3)"})
    begin = time.perf_counter()
    assert load_recipe(QUICKSTART, ["callbacks.speed_monitor.window_size=3"]).callbacks.speed_monitor is not None
    assert time.perf_counter() - begin < 1
    assert "bad" not in sys.modules


def composer_parts() -> list[list[str]]:
    """What is wrong with uses of Composer's parts; and which names Composer has that are not listed."""
    import composer.algorithms
    import composer.callbacks
    import composer.loggers
    import composer.optim
    from composer.core import Algorithm, Callback
    from composer.loggers import LoggerDestination
    from composer.optim import ComposerScheduler

    found = [
        problems("callbacks.early_stopper={monitr: x, patience: 2ba}"),
        problems("callbacks.runtime_estimator.skip_batches=few", "callbacks.runtime_estimatr={}"),
        problems("algorithms={seq_length_warmup: {duration: two, max_seq_length: 8, minimum: 3}}"),
        problems("scheduler={name: step_scheduler, step_size: 10, gama: 0.5}", "loggers.cometml_logger.log_cod=true"),
        problems("scheduler={name: multi_step_scheduler, milestones: [5ba, 10]}"),
    ]
    scheduler = "scheduler={name: step_scheduler, step_size: 10ba, timing: composer}"
    steps: Any = load_recipe(QUICKSTART, [scheduler]).scheduler
    assert (steps.name, steps.step_size, steps.gamma, steps.timing) == ("step_scheduler", "10ba", 0.1, "composer")
    assert not hasattr(steps, "t_warmup")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "steps.yaml"
        path.write_text(f"extends: {QUICKSTART}\n{scheduler.replace('=', ': ')}\n")
        poly: Any = load_recipe(path, ["scheduler.name=polynomial_scheduler", "scheduler.power=2"]).scheduler
        assert (poly.name, poly.power, poly.timing) == ("polynomial_scheduler", 2, "composer")
        assert (
            load_recipe(path, ["scheduler.name=cosine_with_warmup", "scheduler.t_warmup=2ba"]).scheduler.timing
            == "composer"
        )
    assert pickle.loads(pickle.dumps(steps)) == steps
    recipe: Any = load_recipe(QUICKSTART, ["callbacks.early_stopper={monitor: '1', dataloader_label: eval}"])
    assert recipe.callbacks.early_stopper.patience == 1
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert load_recipe(
        QUICKSTART, ["callbacks.early_stopper.monitor=1", "callbacks.early_stopper.dataloader_label=eval"]
    ) == (recipe), "the value of a text is the text as it stands"
    for module, kind, base, listed in (
        (composer.callbacks, "callbacks", Callback, COMPOSER_CALLBACKS),
        (composer.algorithms, "algorithms", Algorithm, COMPOSER_ALGORITHMS),
        (composer.loggers, "loggers", LoggerDestination, COMPOSER_LOGGERS),
        (composer.optim, "schedulers", ComposerScheduler, COMPOSER_SCHEDULERS),
    ):
        classes = {each for each in map(module.__dict__.get, module.__all__) if isinstance(each, type)}
        assert set(listed.values()) <= {each.__name__ for each in classes if issubclass(each, base)}
        for name in listed:
            assert TABLES[kind].find(name) is not None
    return found


def test_arguments_of_composers_parts_are_checked_by_their_signatures() -> None:
    stopper, estimator, warmup, steps, milestones = run_distributed(composer_parts, 1)[0]
    assert steps == [
        "scheduler.step_size: got 10 (an integer); allowed: a duration: an integer and ba, ep, tok or sp, or a part of "
        "the run such as 0.05dur",
        "scheduler.gama: unknown key of name 'step_scheduler'; did you mean 'scheduler.gamma'?",
        "loggers.cometml_logger.log_cod: unknown key; did you mean 'loggers.cometml_logger.log_code'?",
    ]
    assert [problem.partition(":")[0] for problem in milestones] == ["scheduler.milestones[1]"]
    assert stopper == [
        "callbacks.early_stopper.dataloader_label: missing: argument dataloader_label of the class; allowed: a string",
        "callbacks.early_stopper.monitr: unknown key; did you mean 'callbacks.early_stopper.monitor'?",
    ]
    assert [problem.partition(":")[0] for problem in estimator] == [
        "callbacks.runtime_estimator.skip_batches",
        "callbacks.runtime_estimatr",
    ]
    assert [problem.partition(":")[0] for problem in warmup] == [
        "algorithms.seq_length_warmup.duration",
        "algorithms.seq_length_warmup.minimum",
    ]


def train_with_parts(site: Path, overrides: list[str]) -> tuple[list[dict[str, Any]], str, float]:
    """Two batches and one more with the example's parts and some of Composer's, and what the model then computes."""
    import torch

    import moefoundry
    from moefoundry.config import UserError
    from moefoundry.runs.metrics import read_metrics

    sys.path.insert(0, str(site))
    run_dir = ""
    for length in ("2ba", "3ba"):
        recipe = load_recipe(QUICKSTART, [*overrides, f"max_duration={length}", "autoresume=true"])
        run_dir = recipe.run_dir
        with captured_output() as texts:
            moefoundry.train(recipe)
        for name in ("batch", "lr"):
            warning = f"warning: Counting logs {name}, a key that metrics.jsonl has already: it is left out"
            assert texts[1].count(warning) == 1, texts[1]
    bad = load_recipe(QUICKSTART, [*overrides, "run_dir=bad", "callbacks.runtime_estimator.time_unit=weeks"])
    with pytest.raises(UserError, match=r"^callbacks\.runtime_estimator: cannot be used: .*time_unit"):
        moefoundry.train(bad)
    model = moefoundry.from_pretrained(run_dir)
    layer = next(module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "score"))
    logits = torch.tensor([[0.0, 1.0]])
    difference = (layer.score(logits) - (logits / 0.5).softmax(-1)).abs().max().item()
    return read_metrics(Path(run_dir)), Path(run_dir, "config.yaml").read_text(), difference


def test_a_run_uses_the_examples_parts_and_composers(tiny_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    install_example(tmp_path / "site")
    install(tmp_path / "site", "others", OTHERS_POINTS, {"others.py": OTHERS})
    composers = (
        "{early_stopper: {monitor: LanguageCrossEntropy, dataloader_label: eval}, runtime_estimator: {skip_batches: 0}}"
    )
    moe = "{num_experts: 4, top_k: 2, expert_hidden_size: 32}"
    overrides = [*tiny_overrides(tmp_path / "run", f"callbacks={composers}"), f"model.moe={moe}", *USE, *OTHERS_USE]
    overrides += [f"loggers.file_logger.filename={tmp_path}/composer.txt"]
    metrics, kept, difference = run_distributed(train_with_parts, 1, tmp_path / "site", overrides)[0]
    assert [line["batch"] for line in metrics] == [1, 2, 3]
    assert all(line["throughput/steps_per_sec"] > 0 for line in metrics)
    assert [line["counting/batches"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        parts = [line[f"loss/train/{name}"] for name in ("lm", "balance", "z", "smoothing")]
        assert line["loss/train/total"] == pytest.approx(sum(parts), rel=1e-6)
    assert metrics[0]["loss/train/smoothing"] == pytest.approx(0.1 * math.log(384), rel=0.02)
    assert [line["lr"] for line in metrics] == [0.125] * 3
    assert any("time/remaining_estimate" in line for line in metrics)
    lines = (tmp_path / "run/lines.txt").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines if "loss/train/lm" in line] == ["1", "2", "3"]
    for text in ("temperature: 0.5", "name: plain_sgd", "momentum: 0.9", "share: 0.5"):
        assert text in kept
    assert difference == 0


def test_the_mixture_of_the_page_equals_the_loop() -> None:
    import torch
    import torch.nn.functional as F

    from moefoundry.moe.mixture import loop
    from moefoundry.ops.permute import order_by_expert

    page = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(page.partition("## Mixture backends\n\n```python\n")[2].partition("```")[0], names)
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])
    order = order_by_expert(ids, 3, torch.rand(7, 2, generator=generator) < 0.8)
    arguments = [draw(7, 8), draw(7, 2), draw(3, 12, 8), draw(3, 12, 8), draw(3, 8, 12)]
    expected = loop(None)(*arguments, order)  # type: ignore[arg-type]
    torch.testing.assert_close(names["build"](None)(*arguments, order), expected)


def test_a_part_that_is_not_made_is_named(site: Path) -> None:
    from moefoundry.config import UserError
    from moefoundry.config.making import make_part

    text = "from dataclasses import dataclass\nfrom moefoundry.config import SchedulerConfig\n"
    text += "from moefoundry.registry import Part\n\n\n@dataclass\nclass Config(SchedulerConfig):\n    pass\n\n\n"
    text += "part = Part(Config, lambda config: None)\n"
    install(site, "empty", {"moefoundry.schedulers": {"nothing": "empty:part"}}, {"empty.py": text})
    cfg = load_recipe(QUICKSTART, ["scheduler={name: nothing}"]).scheduler
    with pytest.raises(UserError, match=r"^scheduler: nothing: its build function returns nothing$"):
        make_part("schedulers", "nothing", "scheduler", cfg)
