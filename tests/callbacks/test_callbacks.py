"""Callbacks by themselves; what they log in a run is tested with the run, in ``tests/train``.

Their modules import Composer, which only the ranks' server has done: the bodies run there.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moefoundry.config import Fp8Recipe, Recipe
from tests.distributed import run_distributed


def norms() -> None:
    from moefoundry.callbacks.health import GradientNorm, global_norm

    assert global_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]) == 5.0

    model = torch.nn.Linear(2, 1)
    model.unused = torch.nn.Linear(2, 1)
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=logged.update)
    state = SimpleNamespace(model=model)
    for max_norm, expected in ((None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
        GradientNorm(max_norm).after_train_batch(state, logger)
        assert logged == {"grad_norm": 5.0}, "before clipping"
        assert [model.weight.grad[0, 0].item(), model.bias.grad.item()] == pytest.approx(expected)


def test_gradient_norm_and_clipping() -> None:
    run_distributed(norms, 1)


def norm_of_pieces() -> None:
    from moefoundry.callbacks.health import global_norm

    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(4096, 256, generator=draw) * torch.randn(4096, 1, generator=draw).mul(2).exp()
    exact = whole.double().norm()
    assert abs(torch.nn.utils.get_total_norm([whole]) / exact - 1) > 1e-5, "as fp32 has it"
    for pieces in (1, 2, 3, 64):
        assert global_norm(whole.chunk(pieces)).item() == pytest.approx(exact.item(), rel=1e-8)


def test_norm_of_a_large_gradient_does_not_depend_on_its_split() -> None:
    run_distributed(norm_of_pieces, 1)


def read(run_dir: Path) -> list[dict]:
    from moefoundry.runs.metrics import read_metrics

    return read_metrics(run_dir)


def test_later_lines_win_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    lines = [{"batch": 1, "lr": 1.0}, {"batch": 2, "lr": 2.0}, {"batch": 3, "lr": 3.0}, {"batch": 2, "lr": 2.5}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"batch": 3, "lr'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_distributed(read, 1, tmp_path) == [[lines[0], lines[3], lines[2]]]


def goes_on(run_dir: Path) -> list[dict]:
    from composer.core import Timestamp

    from moefoundry.callbacks.metrics_file import MetricsFile

    file = MetricsFile(run_dir)
    file.begin(after=1)
    file.batch_checkpoint(SimpleNamespace(timestamp=Timestamp(batch=2)), None)
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("left", [None, "", '{"batch": 1}\n', '{"batch": 1}\n{"batch": 2, "lr'])
def test_what_a_killed_run_left_is_not_continued_in_its_line(tmp_path: Path, left: str | None) -> None:
    if left is not None:
        (tmp_path / "metrics.jsonl").write_text(left)
    expected = ['{"batch": 1}', '{"batch": 2}'] if left else ['{"batch": 2}']
    assert run_distributed(goes_on, 1, tmp_path) == [expected]


def test_lines_of_batches_that_are_trained_again_are_set_aside(tmp_path: Path) -> None:
    """One line a batch stays, of the run that goes on; those of another run go."""
    path, superseded = tmp_path / "metrics.jsonl", tmp_path / "metrics.superseded.jsonl"
    path.write_text('{"batch": 1}\nnonsense\n{"batch": 2}\n[3]\n{"batch": 3}\n{"batch": 4, "l')
    run_distributed(set_aside_after, 1, path, 2)
    assert path.read_text() == '{"batch": 1}\n{"batch": 2}\n'
    assert superseded.read_text() == 'nonsense\n[3]\n{"batch": 3}\n{"batch": 4, "l\n'
    run_distributed(set_aside_after, 1, path, 2)
    run_distributed(set_aside_after, 1, path, 0)
    assert path.read_text() == ""
    assert superseded.read_text().endswith('"l\n{"batch": 1}\n{"batch": 2}\n')


def set_aside_after(path: Path, batch: int) -> None:
    from moefoundry.callbacks.metrics_file import set_aside

    set_aside(path, batch)


def evaluated_at_the_end(run_dir: Path) -> str:
    from composer.core import Timestamp

    from moefoundry.callbacks.metrics_file import MetricsFile

    file = MetricsFile(run_dir)
    state = SimpleNamespace(timestamp=Timestamp(batch=1))
    file.log_metrics({"metrics/eval/LanguageCrossEntropy": 1.25, "lr": 0.123456789})
    file.eval_after_all(state, None)  # within training: before the line of the batch
    file.batch_checkpoint(state, None)
    state.timestamp = Timestamp(batch=2)
    file.batch_checkpoint(state, None)
    file.log_metrics({"metrics/eval/LanguageCrossEntropy": 1.5})
    file.eval_after_all(state, None)
    file.log_metrics({"metrics/eval/LanguageCrossEntropy": 1.0})
    file.eval_after_all(state, None)
    return (run_dir / "metrics.jsonl").read_text()


def test_an_evaluation_after_the_last_batch_completes_its_line(tmp_path: Path) -> None:
    (text,) = run_distributed(evaluated_at_the_end, 1, tmp_path)
    first, second = (json.loads(line) for line in text.splitlines())
    assert first == {"batch": 1, "metrics/eval/LanguageCrossEntropy": 1.25, "lr": 0.123456789}
    assert second == {"batch": 2, "metrics/eval/LanguageCrossEntropy": 1.0}


def full_precision(run_dir: Path) -> str:
    from composer.core import Timestamp

    from moefoundry.callbacks.metrics_file import MetricsFile

    file = MetricsFile(run_dir)
    file.log_metrics({"loss/train/lm": torch.tensor(0.1), "time/batch": 3})
    file.record({"moe/load/layer1": [0.25, 0.75]})
    file.batch_checkpoint(SimpleNamespace(timestamp=Timestamp(batch=4)), None)
    file.batch_checkpoint(SimpleNamespace(timestamp=Timestamp(batch=5)), None)
    return (run_dir / "metrics.jsonl").read_text()


def test_a_line_has_every_digit_and_only_its_own_batch(tmp_path: Path) -> None:
    (text,) = run_distributed(full_precision, 1, tmp_path)
    first, second = (json.loads(line) for line in text.splitlines())
    assert first == {"batch": 4, "loss/train/lm": torch.tensor(0.1).item(), "moe/load/layer1": [0.25, 0.75]}
    assert second == {"batch": 5}


def routing() -> list[dict]:
    from moefoundry.callbacks.routing import RoutingMonitor

    recorded: list[dict] = []
    monitor = RoutingMonitor(recorded.append, layers=[1, 2])
    logger = SimpleNamespace(log_metrics=recorded.append)
    micro_batches = (([[3, 1], [2, 2]], [1, 0], [0.2, 0.4]), ([[3, 1], [0, 4]], [1, 2], [0.4, 0.6]))
    for counts, dropped, entropy in micro_batches:
        outputs = SimpleNamespace(
            tokens_per_expert=torch.tensor(counts),
            dropped_slots=torch.tensor(dropped),
            router_entropy=torch.tensor(entropy),
        )
        monitor.after_loss(SimpleNamespace(outputs=outputs), logger)
    monitor.batch_end(SimpleNamespace(), logger)
    return recorded


def test_routing_over_micro_batches_by_hand() -> None:
    """Layer 1: loads 6 and 2 of 8, violation 0.5. Layer 2: 2 and 6, violation 0.5. Entropies 0.3 and 0.5. Of 16 slots 4
    are dropped."""
    logged, loads = run_distributed(routing, 1)[0]
    assert logged["moe/max_violation"] == pytest.approx(0.5)
    assert logged["moe/router_entropy"] == pytest.approx(0.4)
    assert logged["moe/dropped_fraction"] == 0.25
    loads = {name: shares_E.tolist() for name, shares_E in loads.items()}
    assert loads == {"moe/load/layer1": [0.75, 0.25], "moe/load/layer2": [0.25, 0.75]}


def commands() -> list[str]:
    from moefoundry.callbacks.report import next_command

    return [
        next_command(["composer", "-n", "2", "scripts/train.py", "r.yaml", "autoresume=true", "seed=3"], "200ba"),
        next_command(["python", "scripts/train.py", "max_duration=1ep", "callbacks.report={prompt: 'a b'}"], "1ep"),
    ]


def test_next_command_trains_twice_as_long() -> None:
    assert run_distributed(commands, 1)[0] == [
        "composer -n 2 scripts/train.py r.yaml seed=3 autoresume=true max_duration=400ba",
        """python scripts/train.py 'callbacks.report={prompt: '"'"'a b'"'"'}' autoresume=true max_duration=2ep""",
    ]


def compared() -> tuple[str, str]:
    from moefoundry.callbacks.report import compared

    return compared(3.5, 3.75), compared(6.0, 3.75)


def test_a_loss_is_better_or_worse_by_what_it_differs() -> None:
    assert run_distributed(compared, 1) == [("0.2500 better", "2.2500 worse")]


def mean_over_targets() -> list[float]:
    from moefoundry.foundry import LanguageCrossEntropy, count_tokens, with_counts

    metric = LanguageCrossEntropy()
    metric.update(torch.tensor(2.0), torch.tensor(3))
    metric.update(torch.tensor(4.0), torch.tensor(1))
    batch = {"input_ids": torch.zeros(2, 4), "labels": torch.tensor([[5, 1, -100, 2], [-100, -100, -100, 3]])}
    assert count_tokens(with_counts(batch)) == {"total": 8, "loss_generating": 3}
    return metric.compute().item()


def test_held_out_loss_is_a_mean_over_targets() -> None:
    assert math.isclose(run_distributed(mean_over_targets, 1)[0], 2.5)


def utilization(recipe: Recipe) -> tuple[dict[str, float], int, float, bool]:
    """What is logged at a million tokens a second on a GPU that is not there, and the parameters that a token meets."""
    from moefoundry.build import build_utilization
    from moefoundry.model.transformer import meta_model

    file: Any = SimpleNamespace(values=lambda names: dict.fromkeys(names, 1e6))
    assert build_utilization(recipe, file) is None, "a CPU"
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"  # type: ignore[method-assign]
    logged: dict[str, float] = {}
    callback = build_utilization(recipe, file)
    callback.batch_end(None, SimpleNamespace(log_metrics=logged.update))
    model, moe = meta_model(recipe.model), recipe.model.moe
    routed = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3)
    matrices = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2) - recipe.model.vocab_size * recipe.model.d_model
    )
    recipe.precision.fp8.recipe = Fp8Recipe.rowwise
    gain = callback.share / build_utilization(recipe, file).share
    torch.cuda.get_device_name = lambda: "Tesla V100"  # type: ignore[method-assign]
    return logged, matrices + routed * moe.top_k // moe.num_experts, gain, build_utilization(recipe, file) is None


def test_mfu_is_of_the_parameters_that_a_token_meets(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    ((logged, active, gain, unknown),) = run_distributed(
        utilization, 1, tiny_recipe(tmp_path, "precision.compute=bf16")
    )
    attention = 3 * 3 * 2 * (32 + 32) * 65 / 2  # three layers, forward and backward; 65 / 2 positions are seen
    assert logged == {"throughput/device/mfu": pytest.approx(1e6 * (6 * active + attention) / 989e12)}
    assert gain == pytest.approx(1979 / 989)
    assert unknown, "a GPU without numbers"


def test_devices_are_known_by_what_drivers_call_them() -> None:
    from moefoundry.planning.devices import ACCELERATORS, known_device

    names = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GB200": "gb200", "AMD Instinct MI300X": "mi300x"}
    assert {name: known_device(name) for name in names} == {name: ACCELERATORS[key] for name, key in names.items()}
    assert known_device("NVIDIA GeForce RTX 4090") is None
