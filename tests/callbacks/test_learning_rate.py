"""The rate of each batch, by hand. Nothing is stored, so a rate follows from the recipe and the position alone."""

from types import SimpleNamespace

import pytest

from moefoundry.config import load_recipe
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed

WARMUP_4_OF_20 = ["max_duration=20ba", "optimizer.lr=1.0", "max_seq_len=8", "global_train_batch_size=4"]


def rates(overrides: list[str], batches: int, batches_per_epoch: int = 5) -> list[float]:
    """The rates of the first ``batches`` batches, each from its position alone."""
    from composer.core import Time, Timestamp

    from moefoundry.callbacks.learning_rate import LearningRate

    recipe = load_recipe(QUICKSTART, [*WARMUP_4_OF_20, *overrides])
    result = []
    for batch in range(batches):
        groups = [{"lr": 9.0}, {"lr": 9.0}]
        now = Timestamp(batch=batch, sample=4 * batch, token=32 * batch, epoch=batch // batches_per_epoch)
        duration = Time.from_timestring(recipe.max_duration)
        optimizers = [SimpleNamespace(param_groups=groups)]
        LearningRate(recipe).batch_start(
            SimpleNamespace(
                timestamp=now, max_duration=duration, dataloader_len=batches_per_epoch, optimizers=optimizers
            ),
            None,
        )
        assert groups[0] == groups[1]
        result.append(groups[0]["lr"])
    return result


def check_rates() -> None:
    linear = "scheduler={name: linear_decay_with_warmup, t_warmup: 4ba, alpha_f: 0.2}"
    own = rates([linear], 20)
    assert own == pytest.approx([0.25, 0.5, 0.75, 1.0, *(1 - 0.05 * n for n in range(1, 17))])
    composers = rates(["scheduler={name: linear_decay_with_warmup, t_warmup: 4ba, alpha_f: 0.2, timing: composer}"], 20)
    assert composers == pytest.approx([0, 0, 0.25, 0.5, 0.75, *own[3:18]]), "two batches late"

    cosine = rates(["scheduler={name: cosine_with_warmup, t_warmup: 0.2dur, alpha_f: 0.1}"], 20)
    assert cosine[:4] == own[:4]
    assert (cosine[11], cosine[19]) == pytest.approx((0.55, 0.1))
    constant = rates(["scheduler={name: constant_with_warmup, t_warmup: 2ba}"], 20)
    assert constant == [0.5] + [1.0] * 19
    assert rates(["scheduler={name: constant_with_warmup, t_warmup: 0ba}"], 2) == [1.0, 1.0]

    shape = "scheduler={name: linear_decay_with_warmup, alpha_f: 0.2, t_warmup: "
    for warmup, duration in (("16sp", "80sp"), ("128tok", "640tok"), ("0.2dur", "4ep"), ("4ba", "4ep")):
        assert rates([f"{shape}{warmup}}}", f"max_duration={duration}"], 20) == own, duration
        timed = [f"{shape}{warmup}, timing: composer}}", f"max_duration={duration}"]
        assert rates(timed, 20) == composers, duration
    assert rates([f"{shape}128tok}}", "max_duration=630tok"], 20)[-1] == own[-1], (
        "a last batch that goes beyond the end"
    )


def test_rates_by_hand() -> None:
    run_distributed(check_rates, 1)


def check_a_schedule_of_the_state() -> None:
    """A schedule from outside asks the state for more than a position, and gets it for the batch that follows."""
    from composer.core import State, Time, Timestamp
    from composer.optim import ComposerScheduler

    from moefoundry.callbacks.learning_rate import LearningRate

    class Outside(ComposerScheduler):
        def __call__(self, state: State, ssr: float = 1.0) -> float:
            elapsed = state.get_elapsed_duration()
            assert elapsed is not None
            return float(elapsed) + state.run_number

    rate = LearningRate(load_recipe(QUICKSTART, WARMUP_4_OF_20))
    rate.schedule = Outside()
    state = SimpleNamespace(timestamp=Timestamp(batch=4), max_duration=Time(20, "ba"), dataloader_len=5, run_number=2)
    assert rate.rate(state) == pytest.approx(2 + 5 / 20)
    state.max_duration = Time(4, "ep")
    state.timestamp = Timestamp(batch=14, epoch=2, batch_in_epoch=4)
    assert rate.rate(state) == pytest.approx(2 + 2 / 4), "in epochs, as Composer counts: those that have ended"


def test_a_schedule_from_outside_gets_the_state() -> None:
    run_distributed(check_a_schedule_of_the_state, 1)


def check_composers() -> None:
    """What ``timing: composer`` gives is what Composer's own trainer gives."""
    import torch
    from composer import Trainer
    from composer.core import Callback
    from composer.models import ComposerModel
    from torch.utils.data import DataLoader, TensorDataset

    from moefoundry.callbacks.learning_rate import build_schedule

    class Line(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            return batch[0] * self.weight

        def loss(self, outputs, batch):
            return outputs.mean()

    class Record(Callback):
        seen: list[float] = []  # noqa: RUF012

        def batch_start(self, state, logger) -> None:
            self.seen.append(state.optimizers[0].param_groups[0]["lr"])

    changes = ["scheduler={name: cosine_with_warmup, t_warmup: 4ba, alpha_f: 0.1, timing: composer}"]
    model = Line()
    Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
        schedulers=build_schedule(load_recipe(QUICKSTART, [*WARMUP_4_OF_20, *changes]).scheduler),
        train_dataloader=DataLoader(TensorDataset(torch.ones(20, 1)), batch_size=4),
        max_duration="20ba",
        callbacks=[Record()],
        progress_bar=False,
    ).fit()
    assert Record.seen == rates(changes, 20)


def test_composers_timing_is_composers() -> None:
    run_distributed(check_composers, 1)
