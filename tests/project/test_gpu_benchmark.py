"""``python -m benchmarks.gpu`` runs to its end whatever its steps do, and its samples and tables are right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import gpu_tests, runner, training
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.layer import TINY, Case, Shape, both_passes, build, check, mixture
from benchmarks.gpu.peers import experts_alone, grouped_mm_mixture
from benchmarks.gpu.routers import by_shares, expert_ids, zipf_shares
from benchmarks.gpu.steps import STEPS, Options, Step
from benchmarks.gpu.table import render
from moefoundry.ops.fp8 import quantization
from moefoundry.planning.plan import make_plan

LIGHT = [step.name for step in STEPS if step.light]
HEAVY = [step.name for step in STEPS if not step.light]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path, "cpu", True)


def run_in_turn(options: Options, steps: list[Step]) -> dict[str, dict]:
    """The parts of steps that run in this process."""
    for step in steps:
        step.load()(Figures(options.out / f"{step.name}.json"), options)
    return {step.name: json.loads((options.out / f"{step.name}.json").read_text()) for step in steps}


@pytest.mark.slow
def test_light_steps_run_on_a_cpu(options: Options) -> None:
    found = run_in_turn(options, [step for step in STEPS if step.light])
    for name, parts in found.items():
        for part, figures in parts.items():
            assert figures["state"] in ("done", "not run"), (name, part, figures)
            assert "wrong" not in figures, (name, part, figures)
    assert sum("tflops_forward" in figures for figures in found["layer"].values()) == 4  # three routers and the oracle
    assert found["checkpoint"]["background save"]["stall_gb_per_second"] > 0
    assert any("runs_ms" in figures["forward"] for figures in found["layer"].values() if "forward" in figures)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: entry["state"] for name, entry in record["steps"].items()} == dict.fromkeys(LIGHT + HEAVY, "done")
    parts = {
        (name, part): figures for name, entry in record["steps"].items() for part, figures in entry["parts"].items()
    }
    assert not [key for key, figures in parts.items() if figures["state"] == "failed" or "wrong" in figures]
    assert parts["composer", "train and resume"]["bit_equal"]
    assert main(["--render", str(tmp_path / "gpu.json")]) == 0
    assert capfd.readouterr().out.endswith((tmp_path / "table.md").read_text())


def fake_step(tmp_path: Path, body: str) -> list[str]:
    """A command in place of a step's process."""
    code = "import json, os, pathlib, sys, time\nsys.stdin.readline()\nout = pathlib.Path(sys.argv[1])\n" + body
    return [sys.executable, "-c", code, str(tmp_path)]


def test_a_step_that_hangs_or_dies_keeps_its_figures(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = (
        "(out / 'new').write_text(json.dumps({{'a': {{'state': 'done', 'x': 1}}, 'b': {{'state': 'running'}}}}))\n"
        "(out / 'new').rename(out / '{0}.json')\n"
    )
    bodies = {
        "hangs": write.format("hangs") + "time.sleep(60)",
        "dies": write.format("dies") + "os._exit(9)",
        "ends": "(out / 'ends.json').write_text(json.dumps({'a': {'state': 'done', 'y': 2}}))",
    }
    started = []
    popen = subprocess.Popen

    def start(command: list[str], **arguments: object) -> subprocess.Popen:
        name = command[command.index("--step") + 1]
        started.append(name)
        return popen(fake_step(tmp_path, bodies[name]), **arguments)

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    steps = [Step("hangs", 1.5, ""), Step("dies", 20, ""), Step("ends", 20, ""), Step("late", 20, "")]
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.1)
    bodies["late"] = ""
    run = runner.Run(steps, options, 30)
    begin = run._run_step

    def spend(step: Step, following: Step | None) -> None:
        if step.name == "late":
            run.end = time.monotonic()
        begin(step, following)

    monkeypatch.setattr(run, "_run_step", spend)
    run.run()
    record = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert record["hangs"]["state"] == "stopped at its limit"
    assert record["dies"]["state"] == "ended with exit code 9"
    assert record["dies"]["attempts"] == 2, "the second has ended no further part, so there is no third"
    for name in ("hangs", "dies"):
        assert record[name]["parts"]["a"] == {"state": "done", "x": 1}
        assert record[name]["parts"]["b"]["state"] == "failed"
    assert record["ends"]["state"] == "done"
    assert record["late"]["reason"].startswith("no time")
    table = (tmp_path / "table.md").read_text()
    assert "| a | x | 1 |" in table
    assert "| late | the step | not run: no time" in table


def test_a_part_that_hangs_is_ended_and_the_step_goes_on(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the interpreter's lock, as a call into a driver may."""
    body = """
import re, torch
from benchmarks.gpu.figures import Figures
figures = Figures(out / "step.json", 1.0)
figures.run("a", lambda part: part.put(x=1), kind="sound")
figures.run("b", lambda part: re.match("(a+)+b", "a" * 60), kind="bad")
figures.run("c", lambda part: part.put(x=2), kind="bad")
figures.run("d", lambda part: part.put(x=3), kind="sound")
"""
    popen = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda _, **kwargs: popen(fake_step(tmp_path, body), **kwargs))
    runner.Run([Step("step", 60, "")], options, 120).run()
    entry = json.loads((tmp_path / "gpu.json").read_text())["steps"]["step"]
    assert (entry["state"], entry["attempts"]) == ("done", 2)
    parts = entry["parts"]
    assert parts["b"]["state"] == "failed"
    assert parts["b"]["error"].startswith("it hung: Timeout (0:00:01")
    assert any("in match" in line for line in parts["b"]["where"])
    assert parts["c"] == {"kind": "bad", "state": "not run", "reason": "another part with bad ended its process"}
    assert [parts[name]["x"] for name in "ad"] == [1, 3]


def test_an_earlier_command_keeps_its_steps(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "(out / f'{sys.argv[2]}.json').write_text(json.dumps({'a': {'state': 'done', 'x': 1}}))"
    popen = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess,
        "Popen",
        lambda command, **kwargs: popen([*fake_step(tmp_path, body), command[command.index("--step") + 1]], **kwargs),
    )
    for name in ("one", "two"):
        runner.Run([Step(name, 20, "")], options, 30).run()
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {name: entry["parts"]["a"]["x"] for name, entry in steps.items()} == {"one": 1, "two": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastest.json", "gpu.json", "table.md"]
    runner.Run([Step("two", 20, "")], Options(tmp_path, "cuda", True), 30).run()
    assert [*json.loads((tmp_path / "gpu.json").read_text())["steps"]] == ["two"], "of another device"


@pytest.mark.parametrize(("memory", "cut"), [(79.1 * 2**30, True), (139 * 2**30, False)])
def test_models_are_as_deep_as_the_memory_allows(
    memory: float, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "free_bytes", lambda options: memory - training.CONTEXT_BYTES)
    monkeypatch.setattr(training, "measure", lambda part, model, changes, options: part.put(layers=model.layers))
    for run, variants in ((training.run_bf16, training.BF16), (training.run_fp8, training.FP8)):
        figures = Figures(tmp_path / f"{run.__name__}.json")
        run(figures, Options(tmp_path, "cuda", False))
        assert any("cut to" in name for name in figures.parts) == (cut and variants is training.BF16)
        for name, *changes in variants:
            (layers,) = {part["layers"] for label, part in figures.parts.items() if label.startswith(f"{name}, ")}
            model = training.MODELS[name]
            batch = f"global_train_batch_size={model.sequences}", f"device_train_microbatch_size={model.sequences}"
            recipe = training.recipe_of(model._replace(layers=layers), changes, *batch)
            assert make_plan(recipe, 1).memory.total < 0.92 * memory
            assert layers == model.layers or (name, cut) in {("3B-A0.6B", True), ("deep OLMoE", True)}


def test_the_training_step_names_what_it_measures(options: Options) -> None:
    training.run_bf16(Figures(options.out / "train.json"), options)
    parts = json.loads((options.out / "train.json").read_text())
    assert [*parts] == ["tiny, 2 layers, grouped_mm", "tiny, 2 layers, grouped_mm, fused kernels"]
    assert all(part["state"] == "done" and part["tokens_per_second"] > 0 for part in parts.values())


def test_parts_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    def fails(part: Part) -> None:
        part.put(figure=1)
        raise ValueError("no good")

    def cannot(part: Part) -> None:
        raise NotRunError("no device")

    figures = Figures(tmp_path / "step.json")
    figures.run("one", fails)
    figures.run("two", cannot)
    again = Figures(tmp_path / "step.json")
    again.run("one", lambda part: pytest.fail("run twice"))
    assert again.parts["one"]["figure"] == 1
    assert again.parts["one"]["error"] == "ValueError: no good"
    assert again.parts["two"] == {"state": "not run", "reason": "no device"}


def test_loads_fall_as_one_over_rank() -> None:
    shares = zipf_shares(128, 8)
    assert shares.sum().item() == pytest.approx(8)
    assert shares.max() <= 1
    full = int((shares == 1).sum())
    assert full == 1
    assert torch.allclose(shares[full:] * torch.arange(full + 1, 129), shares[full] * (full + 1))
    ids = by_shares(shares, 20000, torch.Generator().manual_seed(0))
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.allclose(torch.bincount(ids.flatten(), minlength=128).double() / 20000, shares, atol=0.02)
    assert zipf_shares(4, 4).tolist() == [1, 1, 1, 1]


def test_uniform_experts_are_distinct_and_even() -> None:
    ids = expert_ids("uniform", Shape(4096, 8, 8, 16, 4), "cpu")
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.bincount(ids.flatten()).float().div(1024).sub(1).abs().max() < 0.1


def test_a_wrong_layer_is_said_to_be_wrong(options: Options) -> None:
    case = Case(TINY[0], "grouped_mm", "real", "fp32")
    layer, x, grad = build(case, options)
    assert "wrong" not in check(layer, x, grad, None, case)
    forward = layer.experts.forward
    layer.experts.forward = lambda *args: forward(*args) * 1.001
    assert "output_error, input_gradient_error" in check(layer, x, grad, None, case)["wrong"]


def test_each_call_quantizes_its_tokens_and_gradients(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized: list[tuple[int, ...]] = []
    quantize = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda x, *a, **k: quantized.append(x.shape) or quantize(x, *a, **k))
    layer, x_BSD, grad_BSD = build(Case(TINY[0], "grouped_mm", "real", "fp8"), options)
    counts = []
    for _ in range(3):
        quantized.clear()
        both_passes(layer, x_BSD, grad_BSD)
        counts.append(quantized.count((TINY[0].T, TINY[0].D)))
    assert counts == [2, 2, 2]


def test_gpu_tests_that_take_too_long_are_interrupted_and_reported(tmp_path: Path) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\ndef test_a():\n    pass\n\ndef test_b():\n    time.sleep(60)\n")
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        f"--junitxml={report}",
        slow,
    ]
    code, _ = gpu_tests.run_for(list(map(str, command)), 5)
    assert code == pytest.ExitCode.INTERRUPTED
    assert gpu_tests.summary(report)["tests"] >= 1


def test_outcomes_are_read_where_pytest_is_killed() -> None:
    output = """
tests/ops/test_a.py::test_one[90-1] PASSED [ 10%]
[gw3] [ 12%] PASSED tests/ops/test_a.py::test_two
[gw1] [ 14%] FAILED tests/ops/test_b.py::test_three[(5, 8)]
tests/ops/test_c.py::test_four SKIPPED (needs a CUDA device)
"""
    found = gpu_tests.outcomes(output)
    assert (found["tests"], found["failures"]) == (4, 1)
    assert [*found["failed"].values()] == ["FAILED"]


def test_the_routers_step_runs_on_a_cpu(options: Options) -> None:
    (step,) = (step for step in STEPS if step.name == "router")
    parts = run_in_turn(options, [step])["router"]
    by_operators = {name: figures for name, figures in parts.items() if name.endswith("operators")}
    assert len(by_operators) == 3
    assert {figures["state"] for figures in by_operators.values()} == {"done"}
    (gate,) = (figures for name, figures in by_operators.items() if name.startswith("gate"))
    assert gate["logits_error"] < 1e-6
    assert gate["tokens_gradient_error"] < 4e-3


def test_steps_run_in_the_order_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("benchmarks.gpu.__main__.start", lambda steps, *_: asked.append([s.name for s in steps]) or 0)
    assert main(["--out", str(tmp_path), "--steps", "train,machine,router,train"]) == 0
    assert asked == [["train", "machine", "router"]]


def test_failures_are_listed_with_their_assertions(tmp_path: Path) -> None:
    module = tmp_path / "test_sample.py"
    module.write_text("def test_a():\n    assert 1 == 2\n\n\ndef test_b():\n    pass\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(module)]
    subprocess.run([*command, f"--rootdir={tmp_path}", "-c", "/dev/null"], capture_output=True, check=False)
    found = gpu_tests.summary(report)
    assert (found["tests"], found["failures"]) == (2, 1)
    assert found["failed"] == {"test_sample.test_a": "assert 1 == 2"}


def test_the_table_lists_what_is_missing() -> None:
    step = {
        "state": "done",
        "parts": {"x": {"state": "done", "wrong": "over 1"}, "y": {"state": "not run", "reason": "z"}},
    }
    page = render([{"device": "cuda", "started": "2026-01-02T", "tiny": False, "steps": {"layer": step}}])
    assert "| layer | x | wrong: over 1 |" in page
    assert "| layer | y | not run: z |" in page


def test_the_command_finds_the_package_where_it_is_not_installed() -> None:
    """``-S`` leaves out what an editable installation adds to the path."""
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    code = "import benchmarks.gpu.runner, moefoundry; print(moefoundry.__file__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=gpu_tests.ROOT,
        env=os.environ | {"PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(gpu_tests.ROOT / "src")


def test_peers_say_whether_they_have_a_router(options: Options) -> None:
    (step,) = (step for step in STEPS if step.name == "peers")
    parts = run_in_turn(options, [step])["peers"]
    done = {name.split(", ", 1)[1]: figures for name, figures in parts.items() if figures["state"] == "done"}
    assert {name: figures["router"] for name, figures in done.items() if not name.startswith("transformers")} == {
        "moefoundry grouped_mm": True,
        "moefoundry grouped_mm, fused kernels": True,
        "torch, grouped_mm between gathers": False,
    }
    record = {"device": "cuda", "started": "2026-01-02T", "tiny": False}
    page = render([record | {"steps": {"peers": {"state": "done", "parts": parts}}}])
    with_router, without = page.split("Given experts and their weights, without a router:")
    assert "moefoundry grouped_mm, fused kernels |" in with_router
    assert "torch, grouped_mm between gathers |" in without


def test_experts_alone_are_the_layer_without_its_router(options: Options) -> None:
    layer, x, _ = build(Case(TINY[0], "grouped_mm", "real", "fp32"), options)
    out, loss = experts_alone(layer, x)(x)
    assert loss is None
    assert torch.allclose(out, layer(x)[0], atol=1e-5)


def test_gathers_of_the_plain_peer_have_the_gradients_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens, experts, width, hidden = 32, 4, 16, 8
    shapes = ((tokens, width), (experts, 2 * hidden, width), (experts, width, hidden), (tokens, 2))
    inputs = [torch.randn(*shape, generator=draw, requires_grad=True) for shape in shapes]
    ids = expert_ids("uniform", Shape(tokens, width, hidden, experts, 2), "cpu")
    x, gate_up, down, topk = inputs
    found = grouped_mm_mixture(x, gate_up, down, ids, topk)
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = mixture(x.double(), [gate, up, down.double()], ids, topk.double())
    grad = torch.randn(tokens, width, generator=draw)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    theirs = torch.autograd.grad(expected, inputs, grad.double())
    for ours, exact in zip(torch.autograd.grad(found, inputs, grad), theirs, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-3)


def test_the_table_has_the_time_on_the_device_of_what_the_host_issues_slowly() -> None:
    figures = {"state": "done", "forward": {"ms": 0.1, "device_us": 16.5}, "both": {"ms": 0.3, "device_us": 40.25}}
    step = {"state": "done", "parts": {"a": figures | {"same_ids": 1.0}}}
    page = render([{"device": "cuda", "started": "2026-01-02T", "tiny": False, "steps": {"router": step}}])
    assert "| part | forward, device | both, device | order, device | forward, events |" in page
    assert "| a | 16.5 | 40.25 |  | 0.1 | 0.3 |  | 1.0 |" in page


def test_a_machine_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.has_device", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--steps", "layers"], ["--out", "x", "--device", "cpu"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error:" in capsys.readouterr().err
