"""``moefoundry eval``: what training found, from its checkpoint and from what it exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from moefoundry.cli.arguments import check_writable
from moefoundry.cli.main import main
from tests.evaluation.tiny_tasks import Trained, problems, write_lines

LOSS = "metrics/eval/LanguageCrossEntropy"
TASKS_OF_RUN = ("metrics/", "icl/")


def evaluate(capsys: pytest.CaptureFixture[str], place: Path, *options: Any) -> dict[str, float]:
    capsys.readouterr()
    assert main(["eval", str(place), *map(str, options), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["metrics"]


def test_a_run_is_evaluated_as_in_training(trained: Trained, capsys, tmp_path: Path) -> None:
    line = trained.run.metrics[-1]
    expected = {name: value for name, value in line.items() if name.startswith(TASKS_OF_RUN)}
    found = evaluate(capsys, trained.run.run_dir, "-o", tmp_path / "samples.jsonl", "--batch-size", "3")
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) >= 8
    kept = {json.loads(text)["task"] for text in (tmp_path / "samples.jsonl").open()}
    others = {"answer/1-shot", "code/0-shot", "fill/0-shot", "fill/1-shot", "go_on/0-shot"}
    assert kept == {"choose/0-shot", "choose/2-shot", "pick/1-shot", *others}


def test_tasks_and_losses_of_what_is_exported(trained: Trained, capsys) -> None:
    line = trained.run.metrics[-1]
    options = ("--gauntlet", trained.tasks, "--max-seq-len", "256")
    found = evaluate(capsys, trained.hf, trained.tasks, *options)
    assert found == pytest.approx({name: line[name] for name in found}, rel=1e-6)
    assert "icl/metrics/eval_gauntlet/easy" in found
    corpus = Path(trained.corpus)
    assert evaluate(capsys, trained.hf, "--data", corpus) == {LOSS: pytest.approx(line[LOSS], abs=1e-6)}
    assert main(["eval", str(trained.hf), "--data", str(corpus), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{LOSS}  {line[LOSS]:.4f}\n"


def test_conversations_do_not_see_each_other_in_what_is_exported(trained: Trained, capsys, tmp_path: Path) -> None:
    """As transformers computes each alone; sequences are as long as config.json allows, unless an option says more."""
    from streaming import StreamingDataset
    from transformers import AutoModelForCausalLM

    records = [{"prompt": f"value {n} means ", "response": f"{n} or more"} for n in range(40)]
    file, data = write_lines(tmp_path / "chats.jsonl", records), tmp_path / "chats"
    options = [
        "--instructions",
        "--tokenizer",
        f"{trained.corpus}/tokenizer",
        "--val-fraction",
        "0.5",
        "--workers",
        "1",
    ]
    assert main(["prepare", str(file), str(data), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(trained.hf).eval()
    losses = []
    for sample in StreamingDataset(local=str(data / "val"), shuffle=False, batch_size=1):
        tokens, learnt = (torch.from_numpy(sample[name].astype("int64")) for name in ("tokens", "targets"))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, tokens[1:], reduction="none")[learnt[1:] > 0])
    expected = torch.cat(losses).mean().item()
    longest = json.loads((trained.hf / "config.json").read_text())["max_position_embeddings"]
    capsys.readouterr()
    for length, further in ((longest, []), (2 * longest, ["--max-seq-len", str(2 * longest)])):
        assert main(["eval", str(trained.hf), "--data", str(data), *further, "--device", "cpu", "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["metrics"] == {LOSS: pytest.approx(expected, abs=1e-5)}
        assert found["held_out"] == {"max_seq_len": length, "packing": "best_fit", "document_masking": True}
        line = f"held-out data: rows of {length} tokens, packing best_fit, a token sees its own document alone\n"
        assert err.startswith(line)
        warned = f"config.json says sequences of {longest} tokens at most, and these have up to {length}" in err
        assert warned == bool(further)


def test_data_of_another_tokenizer_are_refused(trained: Trained, capsys, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.corpus, other)
    file = other / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (40, 41)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    assert main(["eval", str(trained.hf), "--data", str(other), "--device", "cpu"]) == 2
    assert f"{other}: another tokenizer than the model's made these data" in capsys.readouterr().err


def test_limits(trained: Trained, capsys, tmp_path: Path) -> None:
    examples = [json.loads(text) for text in Path(trained.tasks).with_name("examples.jsonl").open()][:5]
    uri = write_lines(tmp_path / "five.jsonl", examples)
    task = f"{{label: go_on, icl_task_type: language_modeling, num_fewshot: [0], dataset_uri: {uri}}}"
    (tmp_path / "five.yaml").write_text(f"icl_tasks: [{task}]")
    (tmp_path / "all.yaml").write_text(
        f"icl_tasks: [{task}]".replace(str(uri), str(trained.tasks.with_name("examples.jsonl")))
    )
    found = evaluate(capsys, trained.hf, tmp_path / "five.yaml")
    assert evaluate(capsys, trained.hf, tmp_path / "all.yaml", "--limit", 5) == found


def test_metrics_are_printed_before_a_file_that_cannot_be_written(trained: Trained, capsys) -> None:
    options = ["--limit", "2", "--device", "cpu", "-o", "/dev/full"]
    assert main(["eval", str(trained.hf), str(trained.tasks), *options]) == 2
    out, err = capsys.readouterr()
    assert "metrics/go_on/0-shot/InContextLearningLMAccuracy" in out
    assert err.splitlines()[-1] == "error: /dev/full: No space left on device"


def test_an_output_is_tried_before_the_model_is_loaded(trained: Trained, capsys, monkeypatch, tmp_path: Path) -> None:
    for name in ("pretrained.evaluated_at", "checkpoint.weights.load_model"):
        monkeypatch.setattr(f"moefoundry.{name}", lambda *_, **__: pytest.fail("loaded"))
    kept = write_lines(tmp_path / "kept.jsonl", [{"a": 1}])
    check_writable(kept)
    assert kept.read_text() == '{"a": 1}\n'
    assert main(["eval", str(trained.hf), str(trained.tasks), "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
    pairs = write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    )
    tokenizer = str(Path(trained.corpus) / "tokenizer")
    data = tmp_path / "pairs"
    assert main(["prepare", str(pairs), str(data), "--preferences", "--tokenizer", tokenizer, "--workers", "1"]) == 0
    (data / "train" / ".reference.npy").mkdir()
    assert main(["reference", str(trained.run.run_dir), str(data), "--overwrite"]) == 2
    assert capsys.readouterr().err == f"error: {data}/train/.reference.npy: Is a directory\n"


def test_functions_of_a_bare_signature_and_broken_ones(trained: Trained, capsys, monkeypatch, tmp_path: Path) -> None:
    bare = {"task_id": "T/9", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x + 1\n"}
    bare["test"] = problems()[0]["test"]
    missing = bare | {"task_id": "T/8", "prompt": "import nowhere\n" + bare["prompt"]}
    file, results = tmp_path / "problems.jsonl", tmp_path / "results.jsonl"
    options = ["--humaneval", str(file), "--allow-code-execution", "--max-new-tokens", "2", "--timeout", "30"]
    command = ["eval", str(trained.hf), *options, "-o", str(results), "--device", "cpu"]
    write_lines(file, [problems()[0], bare, missing])
    assert main(command) == 0
    first, second, third = (json.loads(text)["result"] for text in results.open())
    assert (first, second.split(":")[0]) == ("passed", "failed")
    assert third == "broken: the test is broken: ModuleNotFoundError: No module named 'nowhere'"
    assert f"warning: T/8: {third}; none of its samples can pass" in capsys.readouterr().err
    write_lines(file, [problems()[0], bare | {"test": "def check(candidate)\n"}])
    monkeypatch.setattr("moefoundry.cli.evaluations.complete_problems", lambda *_, **__: pytest.fail("completed"))
    assert main(command) == 2
    assert f"error: {file}: T/9: the test is broken: SyntaxError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.yaml"], "error: none.yaml: 1 error\n  icl_tasks: none.yaml: no such file"),
        (["--limit", "0", "none.yaml"], "error: --limit 0: must be at least 1"),
        (["none.yaml", "-o", "nowhere/a.jsonl"], "error: nowhere: no such directory"),
        (["--data", "nowhere"], "error: nowhere"),
        (["none.yaml", "--data", "x"], "error: TASKS and --data: give one of them"),
        ([], "has no recipe that says what to evaluate: give TASKS, --data or --harness"),
        (["--humaneval", "x"], "error: --humaneval needs -o RESULTS"),
        (["--data", "x", "--mesh", "foo"], "error: --mesh foo: no mapping such as '{expert: 2}'"),
        (["--data", "x", "--mesh", "{expert: 2}"], "mesh.expert"),
        (["--data", "x", "--mesh", "{exprt: 1}"], "mesh.exprt: unknown key; did you mean 'mesh.expert'?"),
        (["--data", "x", "-o", "y"], "error: -o: --data has no samples to write"),
        (
            ["--gauntlet", "none.yaml"],
            "error: --gauntlet none.yaml: averages of TASKS, a file with icl_tasks; give that",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(trained: Trained, capsys, options: list[str], message: str) -> None:
    assert main(["eval", str(trained.hf), *options]) == 2
    assert message in capsys.readouterr().err


def test_files_and_runs_that_are_not_there_are_named(trained: Trained, capsys) -> None:
    assert main(["eval", str(trained.hf), str(trained.tasks), "--gauntlet", "none.yaml"]) == 2
    assert "error: none.yaml: 1 error\n  eval_gauntlet: none.yaml: no such file" in capsys.readouterr().err
    run = trained.run.run_dir
    assert main(["eval", f"{run}s", str(trained.tasks)]) == 2
    err = capsys.readouterr().err
    assert f"error: {run}s: no such checkpoint, run or Hugging Face directory; did you mean {run}?" in err
