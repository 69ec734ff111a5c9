"""Inputs that are wrong, missing or extreme: one line names the culprit and what is allowed, without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config import ConfigError, UserError, load_recipe
from moefoundry.config.advice import fitting_overrides
from moefoundry.planning.devices import accelerator
from moefoundry.sweeping.trials import Budget, Sweep
from tests.conftest import QUICKSTART

RECIPE = str(QUICKSTART)
LONG = "9" * 5000
NUMBERS = (
    "memory_gb: 80\nbf16_tflops: 989\nfp8_tflops: 1979\nmemory_tb_per_s: 3.35\nlink_gb_per_s: 450\n"
    "network_gb_per_s: 50\nlinked_devices: 8\n"
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", RECIPE, "--world-size", LONG], "--world-size: 999999999999999999... has 5000 digits; at most 18"),
        (["validate", RECIPE, "--world-size", "1000001"], "--world-size: 1000001 is more than 1,000,000"),
        (["plan", RECIPE, "--world-size", "8", "--memory-gb", LONG], "--memory-gb: 999999999999999999..."),
        (["estimate", RECIPE, "--world-size", "8", "--price", "nan"], "--price: 'nan' is not a finite number"),
        (["watch", "run", "--interval", "nan"], "--interval: 'nan' is not a finite number"),
        (["generate", "run", "--prompt", "x", "--temperature", "inf"], "--temperature: 'inf' is not a finite number"),
        (["init", "--active", LONG, "--total", "1B"], "is no number of parameters"),
        (["plan", RECIPE, "--world-size", "8", "model.n_layers=100000000"], "allowed: an integer >= 1 and <= 10000"),
        (["explain", "TOP_K"], "TOP_K: no key of a recipe; did you mean top_k?"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_number_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        (["optimizer.lr=1..1e999 5"], "optimizer.lr: 1..1e999 5: a number is too large"),
        (["optimizer.lr=1..2 0"], "optimizer.lr: 1..2 0: 0 values; allowed: 1 to 10,000"),
        (["optimizer.lr=1..2 99999999999"], "99999999999 values; allowed: 1 to 10,000"),
        (
            ["optimizer.lr=1..2 1000", "seed=1..99 20"],
            "optimizer.lr, seed: 20,000 combinations; allowed: at most 10",
        ),
        (["seed=1,2", "--random", "10001"], "--random, --optuna and --parallel are at most 10,000"),
        (["seed=1,2", "--flops", "inf"], "--flops: 'inf' is not a finite number"),
    ],
    ids=str,
)
def test_a_sweep_without_end_is_refused(
    swept: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", RECIPE, "-o", str(tmp_path / "sweep"), "--dry-run", *swept]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_record_of_a_sweep_is_named(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, RECIPE, (), Budget(), 1)
    sweep.remember()
    for content in (b"", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "sweep.json").write_bytes(content)
        with pytest.raises(UserError, match=r"sweep.json: damaged; give another --output"):
            sweep.remember()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "cannot be read: not UTF-8 text"),
        (b"", "is empty"),
        (b"- 1", "allowed: a mapping of keys to values"),
        (NUMBERS.replace("80", ".nan").encode(), "memory_gb: nan is no number above 0 and up to 1,000,000,000"),
        (NUMBERS.replace("80", "1e300").encode(), "memory_gb: 1e+300 is no number above 0"),
        (NUMBERS.replace("devices: 8", "devices: 8.0").encode(), "linked_devices: 8.0 is no whole number above 0"),
        (NUMBERS.replace("memory_gb: 80\n", "").encode(), "memory_gb: the keys must be memory_gb, bf16_tflops"),
    ],
)
def test_a_file_of_an_accelerator_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        accelerator(str(file))
    assert str(file) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 97, 999_983, 1_000_000])
def test_one_device_primes_and_a_million_are_answered(world_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    batch = f"global_train_batch_size={world_size}"
    mesh = "mesh={replicate: -1, shard: 1}" if world_size > 1 else "mesh.shard=1"
    shown = ["--world-size", str(world_size), batch, mesh]
    assert main(["estimate", RECIPE, *shown]) == 0
    assert f"{world_size:,} ranks" in capsys.readouterr().out
    given = load_recipe(RECIPE)
    given.mesh.expert = 1_000_000
    assert fitting_overrides(given, world_size)


def test_problems_found_late_name_the_file_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for command, *options in (["validate"], ["launch", "--on", "slurm", "--dry-run"]):
        assert main([command, RECIPE, *options, "precision.fp8={recipe: rowwise, exclude: [nowhere]}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {RECIPE}: ")


def test_a_problem_keeps_its_words_between_processes() -> None:
    import pickle

    with pytest.raises(ConfigError) as caught:
        load_recipe(RECIPE, ["model.moe.top_k=99"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.source, again.advice) == (RECIPE, "")


def test_a_run_without_a_step_to_replay_is_refused_before_torch_is_there(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom moefoundry.cli.main import main\n"
        f"status = main(['replay', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no step that was not finite; a run that stops for one saves it there" in done.stderr
