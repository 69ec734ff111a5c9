"""LLM Foundry finds the callbacks, loaders, metrics, loggers and models of this package by entry points alone.

Its own ``train`` and ``evaluate`` run; nothing of this package is imported before them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed import run_distributed
from tests.llm_foundry import recipes
from tests.llm_foundry.test_training import POINTS
from tests.test_extending import install

OURS = {
    "name": "moe_causal_lm",
    "vocab_size": 384,
    "d_model": 32,
    "n_layers": 2,
    "n_dense_layers": 0,
    "attention": {"n_heads": 4, "n_kv_heads": 2},
    "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 32},
}
MPT = recipes.mpt(
    init_device="cpu",
    ffn_config=recipes.OURS,
    attn_config={"attn_impl": "torch"},
    loss_fn="torch_crossentropy",
    additional_train_metrics=["exact_cross_entropy"],
)
pytestmark = pytest.mark.slow  # LLM Foundry trains and evaluates two models
MODELS = {"mpt": MPT, "ours": OURS}


class Outcome(NamedTuple):
    """A model that was trained and evaluated.

    Attributes:
        lines: Lines of metrics.jsonl.
        difference: Largest difference of logits, saved by ``hf_checkpointer`` against trained.
        evaluated: Metrics of the evaluation command.
    """

    lines: list[dict[str, Any]]
    difference: float
    evaluated: dict[str, float]


def loader(corpus: Path, split: str) -> dict[str, Any]:
    dataset = {"local": str(corpus), "split": split, "max_seq_len": 64, "shuffle": split == "train"}
    return {"name": "moefoundry_prepared", "dataset": dataset, "drop_last": split == "train", "num_workers": 0}


def training(name: str, corpus: Path, root: Path) -> dict[str, Any]:
    saved = {"save_folder": str(root / name / "hf"), "save_interval": "2ba", "precision": "float32"}
    return recipes.recipe(
        MODELS[name],
        corpus,
        train_loader=loader(corpus, "train"),
        eval_loader=loader(corpus, "val"),
        callbacks={"moe_routing_monitor": {}, "hf_checkpointer": saved},
        loggers={"metrics_file": {"run_dir": str(root / name)}},
        save_folder=str(root / name / "checkpoints"),
        max_duration="2ba",
        eval_interval="2ba",
        precision="fp32",
        fsdp_config=None,
        device_train_microbatch_size=2,
    )


def evaluation(name: str, corpus: Path, root: Path) -> dict[str, Any]:
    tree = training(name, corpus, root)
    model = {"model_name": name, "model": tree["model"], "tokenizer": tree["tokenizer"]}
    model["load_path"] = str(root / name / "checkpoints/latest-rank0.pt")
    kinds = {"words": "language_modeling", "choices": "multiple_choice"}
    tasks = [
        {"label": label, "dataset_uri": str(root / f"{label}.jsonl"), "num_fewshot": [0], "icl_task_type": kind}
        for label, kind in kinds.items()
    ]
    return {
        "seed": 17,
        "max_seq_len": 64,
        "device_eval_batch_size": 2,
        "precision": "fp32",
        "models": [model],
        "icl_tasks": tasks,
        "eval_loader": tree["eval_loader"],
        "loggers": {"inmemory": {}},
        "variables": {"length": 64},
    }


def logits_of_saved(name: str, directory: Path, trained: Any, ids: Any) -> float:
    from llmfoundry.models.mpt import MPTForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM if name == "ours" else MPTForCausalLM
    saved = kind.from_pretrained(directory).eval()(ids).logits
    ours = trained.model.eval()(ids)
    return float((saved - (ours if name == "ours" else ours.logits)).abs().max())


def by_llm_foundry(site: Path, corpus: Path, root: Path) -> tuple[dict[str, Outcome], list[str]]:
    """Train and evaluate by LLM Foundry, in a process that began after the installation."""
    sys.path.insert(0, str(site))
    catalogue: Any = import_module("catalogue")
    catalogue.AVAILABLE_ENTRY_POINTS = entry_points()
    import torch
    from llmfoundry.command_utils import evaluate, train
    from llmfoundry.utils.exceptions import UserError as FoundryUserError
    from omegaconf import OmegaConf

    from moefoundry.config import UserError

    outcomes, ids, refused = {}, torch.arange(16)[None] + 5, []
    for name in MODELS:
        trainer = train(OmegaConf.create(training(name, corpus, root)))
        lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        saved = root / name / "hf/huggingface/ba2"
        assert (saved / "tokenizer.json").is_file()
        difference = logits_of_saved(name, saved, trainer.state.model, ids)
        os.chdir(root / name)  # where LLM Foundry leaves a copy of each task
        (evaluator,), _ = evaluate(OmegaConf.create(evaluation(name, corpus, root)))
        data = evaluator.logger.destinations[0].data
        measured = {key: float(values[-1][-1]) for key, values in data.items() if key.startswith("metrics/")}
        outcomes[name] = Outcome(lines, difference, measured)
    for change in (
        {"train_loader": loader(corpus, "train") | {"dataset": {"local": str(corpus)}}},
        {"train_loader": loader(corpus, "train") | {"drop_lst": True}},
        {"train_loader": loader(root, "train")},
        {"model": recipes.mpt(init_device="cpu", attn_config=MPT["attn_config"], loss_fn=MPT["loss_fn"])},
    ):
        with pytest.raises((UserError, FoundryUserError)) as caught:
            train(OmegaConf.create(training("mpt", corpus, root) | change | {"save_folder": None}))
        refused.append(str(caught.value))
    return outcomes, refused


@pytest.fixture(scope="module")
def outcomes(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], list[str]]:
    root = tmp_path_factory.mktemp("registries")
    install(root / "site", "declared", POINTS, {})
    tasks = {
        "words": [{"context": f"def first_{i}(value):\n    return", "continuation": " value"} for i in range(4)],
        "choices": [{"query": f"def f{i}(value):", "choices": [" x", " def"], "gold": i % 2} for i in range(4)],
    }
    for label, lines in tasks.items():
        (root / f"{label}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_distributed(by_llm_foundry, 1, root / "site", tiny_corpus, root, timeout=120)[0]


@pytest.mark.parametrize("name", MODELS)
def test_callbacks_loggers_loaders_and_metrics_are_used(outcomes: Any, name: str) -> None:
    lines = outcomes[0][name].lines
    assert [line["batch"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 <= line["moe/max_violation"] < 3
        assert line["moe/dropped_fraction"] == 0
        loads = {key: value for key, value in line.items() if key.startswith("moe/max_load/")}
        assert list(loads) == ["moe/max_load/layer0", "moe/max_load/layer1"]
        assert all(0.25 <= share <= 0.5 for share in loads.values()), "of 4 experts, of which a token takes 2"
    last = lines[-1]
    assert last["metrics/eval/LanguageCrossEntropy"] > 0
    if name == "mpt":
        composers = last["metrics/eval/LanguageCrossEntropy"]
        assert last["metrics/eval/ExactCrossEntropy"] == pytest.approx(composers, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_hugging_face_checkpointer_saves_what_was_trained(outcomes: Any, name: str) -> None:
    assert outcomes[0][name].difference < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_evaluation_command_has_the_losses_and_its_tasks(outcomes: Any, name: str) -> None:
    found: Outcome = outcomes[0][name]
    loss = "metrics/eval/LanguageCrossEntropy"
    assert found.evaluated[loss] == pytest.approx(found.lines[-1][loss], rel=1e-5)
    assert found.evaluated["metrics/choices/0-shot/InContextLearningMultipleChoiceAccuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert 0 <= found.evaluated["metrics/words/0-shot/InContextLearningLMAccuracy"] <= 1


def test_what_is_wrong_is_named(outcomes: Any) -> None:
    for message, expected in zip(
        outcomes[1],
        (
            r"dataset\.max_seq_len: missing",
            r"drop_lst: unknown key; did you mean 'drop_last'",
            r"is no prepared corpus|index\.json|corpus\.json",
            r"callbacks\.moe_routing_monitor: the model has no experts of ffn_type moefoundry_moe",
        ),
        strict=True,
    ):
        assert re.search(expected, message), message
