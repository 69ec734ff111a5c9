"""``moefoundry generate`` and ``eval``: what a run of several ranks would say, from its checkpoint in one process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.checkpoint.remote import upload_checkpoint
from moefoundry.cli.main import main
from moefoundry.config import load_recipe
from tests.train.runs import Run, run_recipe

PROMPT = "def first"
MLA = (
    "{kind: mla, n_heads: 4, q_lora_rank: 12, kv_lora_rank: 16,"
    " qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}"
)


@pytest.fixture(scope="module")
def run(tiny_overrides: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two batches on two ranks that share the experts, and the report's completion of ``PROMPT``."""
    changes = ["max_duration=2ba", "mesh.expert=2", "mesh.shard=2", "model.document_masking=true"]
    changes += [f"model.attention={MLA}", f"callbacks.report={{prompt: {PROMPT!r}, max_new_tokens: 12}}"]
    overrides = tiny_overrides(tmp_path_factory.mktemp("run"), *changes)
    grouped_query = next(text for text in overrides if text.startswith("model.attention="))
    return run_recipe(load_recipe(None, [text for text in overrides if text != grouped_query]), world_size=2)


def generate(capsys: pytest.CaptureFixture[str], checkpoint: Path | str, *options: str) -> str:
    options = ("--max-new-tokens", "12", "--device", "cpu", *options)
    assert main(["generate", str(checkpoint), "--prompt", PROMPT, *options]) == 0
    return capsys.readouterr().out


def test_text_is_that_of_the_ranks_that_trained(run: Run, capsys) -> None:
    text = generate(capsys, run.run_dir)
    assert text.startswith(PROMPT)
    assert "".join(f"    | {line}\n" for line in text.splitlines()) in run.out
    assert generate(capsys, run.run_dir / "checkpoints" / "ba2") == text


def test_a_gap_is_filled(run: Run, capsys) -> None:
    place = str(run.run_dir)
    gap = [
        "generate",
        place,
        "--prefix",
        "def first",
        "--suffix",
        "\nreturn",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
    ]
    assert main(gap) == 0
    text = capsys.readouterr().out
    assert text.startswith("def first")
    assert text.endswith("\nreturn\n")
    assert main([*gap, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prefix"], found["suffix"]) == ("def first", "\nreturn")
    assert f"{found['prefix']}{found['completion']}{found['suffix']}\n" == text
    for wrong in (["generate", place], [*gap, "--prompt", "x"]):
        assert main(wrong) == 2
        assert "give --prompt, or --prefix and --suffix" in capsys.readouterr().err


def test_sampling_options(run: Run, capsys) -> None:
    greedy = generate(capsys, run.run_dir)
    assert generate(capsys, run.run_dir, "--temperature", "0.7", "--top-k", "1") == greedy
    assert generate(capsys, run.run_dir, "--temperature", "0", "--seed", "3") == greedy
    assert generate(capsys, run.run_dir, "--seed", "1") == generate(capsys, run.run_dir, "--seed=1", "--top-p=1.0")
    assert generate(capsys, run.run_dir, "--seed", "1") != generate(capsys, run.run_dir, "--seed", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "/nowhere"], "error: /nowhere: no complete checkpoint there"),
        (["--prompt", ""], "error: --prompt '': has no token"),
        (["--max-new-tokens", "0"], "error: --max-new-tokens 0: must be at least 1"),
        (["--temperature", "-1"], "error: --temperature -1.0: must be a number of at least 0"),
        (["--top-k", "0"], "error: --top-k 0: must be at least 1"),
        (["--device", "abacus"], "error: --device abacus: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run: Run, capsys, options: list[str], message: str) -> None:
    assert main(["generate", "--checkpoint", str(run.run_dir), "--prompt", PROMPT, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_missing_tokenizer_is_named(run: Run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.evaluation import prompts as module

    document = module.read_state(run.run_dir / "checkpoints" / "ba2")
    for recipe, message in [
        (document["recipe"] | {"tokenizer.name": "/nowhere"}, "error: /nowhere/tokenizer.json: no such file"),
        ({}, "the checkpoint has no tokenizer, and its recipe names none (tokenizer.name)"),
    ]:
        monkeypatch.setattr(module, "read_state", lambda _, recipe=recipe: document | {"recipe": recipe})
        assert main(["generate", "--checkpoint", str(run.run_dir), "--prompt", PROMPT]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_behind_a_url(run: Run, tmp_path: Path, capsys) -> None:
    url = f"memory://{tmp_path.name}"
    upload_checkpoint(run.run_dir / "checkpoints" / "ba2", url)
    assert generate(capsys, url) == generate(capsys, run.run_dir)


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """A problem that any comment solves, and one that a tiny model does not."""
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    prompts = ["def f(x):\n    return x + 1  # ", 'def f(x):\n    """Next."""\n']
    lines = [
        {"task_id": f"T/{n}", "prompt": prompt, "entry_point": "f", "canonical_solution": "", "test": test}
        for n, prompt in enumerate(prompts)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_eval_estimates_pass_at_k(run: Run, problems: str, tmp_path: Path, capsys) -> None:
    def evaluate(name: str, *options: str) -> tuple[dict, list[dict]]:
        path = tmp_path / name
        options = (*options, "--max-new-tokens=1", "--timeout=30", "--device=cpu", "--json", "-o", str(path))
        assert main(["eval", str(run.run_dir), "--humaneval", problems, "--allow-code-execution", *options]) == 0
        out, err = capsys.readouterr()
        assert "NOT stopped: errors of the kernel itself" in err
        return json.loads(out), [json.loads(line) for line in path.open()]

    printed, results = evaluate("greedy.jsonl")
    assert (printed["samples"], printed["pass@1"]) == (2, 0.5)
    assert [result["passed"] for result in results] == [True, False]
    drawn = ("-n", "10", "--temperature", "2")
    printed, results = evaluate("drawn.jsonl", *drawn)
    assert [result["task_id"] for result in results] == ["T/0"] * 10 + ["T/1"] * 10
    assert (printed["pass@1"], printed["pass@10"]) == (0.5, 0.5)
    assert len({result["completion"] for result in results}) > 5
    assert evaluate("again.jsonl", *drawn)[1] == results
    assert evaluate("other.jsonl", *drawn, "--seed=1")[1] != results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: --allow-code-execution False: must be True"),
        (["-n", "0"], "error: --samples 0: must be at least 1"),
        (["-n", "2"], "error: --samples 2: all would be the same without a --temperature above 0"),
        (["--timeout", "0"], "error: --timeout 0.0: must be a number above 0"),
        (["--workers", "0"], "error: --workers 0: must be at least 1"),
        (["--top-p", "2"], "error: --top-p 2.0: must be above 0 and at most 1"),
    ],
)
def test_eval_says_what_is_wrong(run: Run, problems: str, tmp_path: Path, capsys, options, message: str) -> None:
    allowed = ["--allow-code-execution", *options] if options else []
    output = tmp_path / "results.jsonl"
    assert main(["eval", str(run.run_dir), "--humaneval", problems, "-o", str(output), *allowed]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not output.exists()
