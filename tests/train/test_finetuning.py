"""Finetuning from end to end: pre-train, prepare, finetune, generate, export; transformers says the same."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import QUICKSTART, TINY
from tests.distributed import captured_output, run_distributed

CONFIGS = QUICKSTART.parent
CHATS = [
    {"messages": [{"role": "user", "content": f"Is {n} a number?"}, {"role": "assistant", "content": "yes, it is"}]}
    if n % 2
    else {"prompt": f"value {n} means ", "response": "nothing"}
    for n in range(48)
]
SAME_MODEL = ("model.n_dense_layers=0", "model.moe.num_shared_experts=0", "model.init.std=0.05")
"""One that Mixtral's family can be exported to."""
PAIRS = [{"prompt": f"value {n} means ", "chosen": "less", "rejected": "nothing"} for n in range(24)]
PROMPT = "value 7 means "


def run_all(root: Path, corpus: Path) -> dict[str, Any]:
    """Every command, one after the other, in one process; the imports take long."""
    from moefoundry.cli.main import main

    os.chdir(root)
    (root / "chats.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in CHATS))
    tiny = [change for change in TINY if not change.startswith(("run_name", "max_duration", "eval_interval"))]
    tiny += ["progress_bar=false", "log_to_console=false", *SAME_MODEL]
    tuned = [*tiny, "max_duration=12ep", "eval_interval=6ep", "optimizer.lr=5e-3"]
    tuned += ["global_train_batch_size=4", "device_train_microbatch_size=4"]
    of_chats = ["train_loader.dataset.local=data/chats"]
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in PAIRS))
    recipe, preferences = (str(CONFIGS / "finetune" / f"{name}-tiny.yaml") for name in ("finetune", "dpo"))
    of_pairs = ["train_loader.dataset.local=data/pairs", "max_duration=8ep", "eval_interval=4ep", "optimizer.lr=3e-3"]
    on = ["load_path=runs/dpo-tiny", "load_weights_only=false", "max_duration=9ep"]
    commands = {
        "pretrain": ["train", *tiny, "run_name=tiny", "max_duration=4ba", f"train_loader.dataset.local={corpus}"],
        "prepare": ["prepare", "chats.jsonl", "data/chats", "--tokenizer", f"{corpus}/tokenizer", "--instructions"],
        "finetune": ["train", recipe, *tuned, *of_chats],
        "unpacked": ["train", recipe, *tuned, *of_chats, "run_name=unpacked", "max_duration=2ep", "eval_interval=1ep"],
        "generate": ["generate", "runs/finetune-tiny", "--prompt", PROMPT, "--max-new-tokens", "12", "--json"],
        "pairs": ["prepare", "pairs.jsonl", "data/pairs", "--tokenizer", f"{corpus}/tokenizer", "--preferences"],
        "without_dpo": ["train", recipe, *tuned, "train_loader.dataset.local=data/pairs", "run_name=without_dpo"],
        "early": ["train", preferences, *tuned, *of_pairs, "run_name=early"],
        "early_validate": ["validate", preferences, *tuned, *of_pairs, "run_name=early"],
        "reference": ["reference", "runs/finetune-tiny", "data/pairs"],
        "again": ["reference", "runs/finetune-tiny", "data/pairs"],
        "another": ["reference", "runs/tiny", "data/pairs"],
        "other": ["train", preferences, *tuned, *of_pairs, "run_name=other", "load_path=runs/tiny"],
        "dpo": ["train", preferences, *tuned, *of_pairs],
        "fork": ["train", preferences, *tuned, *of_pairs, "run_name=fork", *on],
        "overwritten": ["reference", "runs/tiny", "data/pairs", "--overwrite"],
        "resumed": ["train", preferences, *tuned, *of_pairs, "max_duration=9ep", "autoresume=true"],
        "forked": ["train", preferences, *tuned, *of_pairs, "run_name=forked", *on],
        "eval_chats": ["eval", "runs/finetune-tiny", "--data", "data/chats", "--json"],
        "eval_unpacked": ["eval", "runs/unpacked", "--data", "data/chats", "--json"],
        "eval_pairs": ["eval", "runs/dpo-tiny", "--data", "data/pairs", "--json"],
        "eval_pairs_of_texts": ["eval", "runs/tiny", "--data", "data/pairs", "--json"],
        "export": ["convert", "export", "runs/finetune-tiny", "-o", "exported"],
    }
    for name in ("prepare", "pairs"):
        commands[name] += ["--val-fraction", "0.2", "--workers", "1"]
    commands["unpacked"] += ["train_loader.dataset.packing.method=none", "eval_loader.dataset.packing.method=none"]
    found: dict[str, Any] = {}
    for name, words in commands.items():
        with captured_output() as texts:
            found[name] = main(words)
        found[name] = (found[name], *texts)
    found["transformers"] = by_transformers(root / "exported")
    return found


def by_transformers(directory: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    text: str = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture(scope="module")
def outcomes(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("finetuning")
    return root, run_distributed(run_all, 1, root, tiny_corpus, timeout=180)[0]


def metrics(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_succeeds_and_the_model_answers(outcomes: tuple[Path, dict[str, Any]]) -> None:
    found = outcomes[1]
    for name in ("pretrain", "prepare", "finetune", "unpacked", "generate", "export", "pairs", "reference", "dpo"):
        assert found[name][0] == 0, found[name]
    completion = json.loads(found["generate"][1])["completion"]
    assert completion == "nothing"
    assert found["transformers"] == completion


@pytest.mark.parametrize("run", ["finetune-tiny", "unpacked"])
def test_the_held_out_loss_falls(outcomes: tuple[Path, dict[str, Any]], run: str) -> None:
    lines = metrics(outcomes[0], run)
    held_out = [
        line["metrics/eval/LanguageCrossEntropy"] for line in lines if "metrics/eval/LanguageCrossEntropy" in line
    ]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0] < lines[0]["loss/train/lm"]


def test_preferences_are_no_texts(outcomes: tuple[Path, dict[str, Any]]) -> None:
    status, _, err = outcomes[1]["without_dpo"]
    assert status == 2
    for loader in ("train", "eval"):
        assert f"{loader}_loader.dataset.local: data/pairs: preferences, whose rejected responses would be" in err


@pytest.mark.parametrize(
    ("command", "run"), [("eval_chats", "finetune-tiny"), ("eval_unpacked", "unpacked"), ("eval_pairs", "dpo-tiny")]
)
def test_records_are_evaluated_as_by_the_run_s_own_recipe(
    outcomes: tuple[Path, dict[str, Any]], command: str, run: str
) -> None:
    root, found = outcomes
    assert found[command][0] == found["eval_pairs_of_texts"][0] == 0, found[command]
    loss = json.loads(found[command][1])["metrics"]["metrics/eval/LanguageCrossEntropy"]
    assert loss == pytest.approx(metrics(root, run)[-1]["metrics/eval/LanguageCrossEntropy"], rel=1e-6)


def test_only_responses_are_predicted(outcomes: tuple[Path, dict[str, Any]]) -> None:
    corpus = json.loads((outcomes[0] / "data/chats/corpus.json").read_text())
    assert corpus["inputs"]["kind"] == "instructions"
    assert sum(split["documents"] for split in corpus["splits"].values()) == len(CHATS)
    assert not corpus["left_out"]


def test_preferences_are_learned_from_the_reference_on(outcomes: tuple[Path, dict[str, Any]]) -> None:
    lines = metrics(outcomes[0], "dpo-tiny")
    assert lines[0]["loss/train/dpo"] == pytest.approx(math.log(2), rel=1e-5), "the run begins as the reference"
    assert lines[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["loss/train/dpo"] < 0.5
    assert lines[-1]["preference/margin"] > 0
    assert lines[-1]["preference/accuracy"] == 1
    assert lines[-1]["metrics/eval/PreferenceAccuracy"] == 1


def test_a_reference_that_is_absent_or_another_is_refused(outcomes: tuple[Path, dict[str, Any]]) -> None:
    status, _, err = outcomes[1]["early"]
    assert status == 2
    absent = "reference.json: no such file; dpo needs those of a reference: moefoundry reference CHECKPOINT DATA"
    assert absent in err
    status, out, err = outcomes[1]["early_validate"]
    assert (status, absent in out + err) == (2, True)
    status, out, _ = outcomes[1]["again"]
    assert (status, out.count("up to date, scored by")) == (0, 2)
    status, _, err = outcomes[1]["another"]
    assert status == 2
    assert "data/pairs/train: has scores of another reference; --overwrite replaces them" in err
    status, _, err = outcomes[1]["other"]
    assert status == 2
    assert "are of another checkpoint than load_path; compute them again: moefoundry reference runs/tiny" in err


def test_a_run_goes_on_with_the_reference_that_it_was_saved_with(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """In another run_dir, too, where it does not begin as the reference; scores of another model are refused."""
    root, found = outcomes
    assert found["fork"][0] == 0, found["fork"][2]
    fork, before = metrics(root, "fork"), metrics(root, "dpo-tiny")
    assert fork[0]["batch"] == before[-1]["batch"] + 1
    assert fork[-1]["preference/margin"] > 0
    assert found["overwritten"][0] == 0
    named = "train_loader.dataset (reference): data/pairs/train has log-probabilities of another model than "
    for name in ("resumed", "forked"):
        status, _, err = found[name]
        assert status == 2
        assert named in err
    assert len(metrics(root, "dpo-tiny")) == len(before)
