"""What callbacks measure stays on the device until the line of a batch is written, and is read at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.distributed import run_distributed
from tests.model.tiny import tiny_config

LAYERS, EXPERTS = 3, 4


def callbacks_on_meta() -> None:
    from composer.core import Timestamp

    from moefoundry.callbacks.expert_bias import ExpertBias
    from moefoundry.callbacks.health import GradientNorm
    from moefoundry.callbacks.routing import RoutingMonitor
    from moefoundry.moe.router import Router

    logged: dict[str, Any] = {}
    logger: Any = SimpleNamespace(log_metrics=logged.update)
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        moe = tiny_config().moe
        moe.balance.bias_update_rate = 1e-3
        routers = [Router(8, moe) for _ in range(LAYERS)]
        outputs = SimpleNamespace(
            tokens_per_expert=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
            dropped_slots=torch.zeros(LAYERS, dtype=torch.int64),
            router_entropy=torch.zeros(LAYERS),
        )
    state: Any = SimpleNamespace(model=model, outputs=outputs, previous_timestamp=Timestamp())
    GradientNorm(1.0).after_train_batch(state, logger)
    for callback in (RoutingMonitor(logged.update, [0, 1, 2]), ExpertBias(routers, 1e-3, None)):
        for _ in range(2):
            callback.after_loss(state, logger)
        callback.batch_end(state, logger)
    assert {"grad_norm", "moe/max_violation", "moe/load/layer2", "moe/expert_bias_max_abs"} <= logged.keys()
    assert all(value.is_meta for value in logged.values())


def test_no_callback_of_every_step_waits_for_the_device() -> None:
    """On meta, where nothing can be read."""
    run_distributed(callbacks_on_meta, 1)


def clip() -> None:
    from moefoundry.callbacks.health import GradientNorm

    for norm, expected in ((torch.inf, [torch.inf, 3.0]), (torch.nan, [torch.nan, 3.0]), (4.0, [0.8, 0.6])):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([norm, 3.0])
        state: Any = SimpleNamespace(model=nn.ParameterList([parameter]))
        GradientNorm(1.0).after_train_batch(state, SimpleNamespace(log_metrics=lambda metrics: None))
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), equal_nan=True)


def test_a_norm_that_is_not_finite_clips_nothing() -> None:
    run_distributed(clip, 1)


def write_a_line(run_dir: Path) -> list[int]:
    from composer.core import Timestamp

    from moefoundry.callbacks.metrics_file import MetricsFile, read_together

    read: list[int] = []
    tolist = Tensor.tolist
    file = MetricsFile(run_dir)
    file.log_metrics({"loss/train/lm": torch.tensor([0.1]), "lr": 0.5, "grad_norm": torch.tensor(2.0).double()})
    file.record({"moe/load/layer0": torch.tensor([0.25, 0.75])})
    with mock.patch.object(Tensor, "tolist", lambda self: (read.append(len(self)), tolist(self))[1]):
        file.batch_checkpoint(SimpleNamespace(timestamp=Timestamp(batch=1)), None)
    assert read_together({"a": 1, "b": [2.0]}) == {"a": 1, "b": [2.0]}
    return read


def test_numbers_of_a_batch_are_read_at_once(tmp_path: Path) -> None:
    assert run_distributed(write_a_line, 1, tmp_path) == [[4]]
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"batch": 1, "loss/train/lm": 0.10000000149011612, "lr": 0.5, "grad_norm": 2.0, '
        '"moe/load/layer0": [0.25, 0.75]}\n'
    )
