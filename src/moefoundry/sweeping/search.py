"""Search by Optuna's samplers, with pruning of trials that fall behind.

The study lies in the sweep's directory: a killed search goes on with the trials that were running, then with new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from moefoundry.config.errors import UserError
from moefoundry.runs.metrics import EVAL_KEY
from moefoundry.sweeping.axes import Axis, Point, Range
from moefoundry.sweeping.results import metrics_of, result_of
from moefoundry.sweeping.run import Report, Runner, diverged_at, is_pruned, running
from moefoundry.sweeping.trials import Sweep, Trial

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "optuna.log"
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler"}
PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "hyperband": "HyperbandPruner"}


def search(
    sweep: Sweep,
    axes: Sequence[Axis],
    trials: int,
    how: tuple[str, str, int],
    command: Callable[[Trial], list[str]],
    at_once: int,
    report: Report,
) -> tuple[list[Trial], bool]:
    """Train until ``trials`` trials have ended, of this start and of earlier ones.

    Args:
        sweep: The sweep.
        axes: Its axes; of ranges, the number of values plays no part.
        trials: Number of trials; those that do not validate count.
        how: A key of :data:`SAMPLERS`, one of :data:`PRUNERS`, and the sampler's seed.
        command: Makes the command of a trial.
        at_once: Trials that run side by side.
        report: As for :func:`moefoundry.sweeping.run.run_all`.

    Returns:
        All trials of the study, and whether one of this start has failed.

    Raises:
        UserError: Optuna is not installed.
        Stopped: A signal has ended it.
    """
    study = _study(sweep, how)
    with running(command, report) as runner, ThreadPoolExecutor(at_once) as pool:
        worker = _Worker(sweep, axes, trials, study, runner)
        list(pool.map(lambda _: worker.work(), range(at_once)))
    points = [_point(axes, found.params) for found in study.get_trials(deepcopy=False) if found.params]
    return sweep.trials(points), worker.failed


class _Worker:
    """Takes trials from a study, by turns of several threads."""

    def __init__(self, sweep: Sweep, axes: Sequence[Axis], trials: int, study: optuna.Study, runner: Runner) -> None:
        import optuna

        self.sweep, self.axes, self.trials, self.study, self.runner = sweep, axes, trials, study, runner
        self.states = optuna.trial.TrialState
        self.interrupted = study.get_trials(deepcopy=False, states=[self.states.RUNNING])
        self.lock = threading.Lock()
        self.failed = False

    def work(self) -> None:
        """Train one trial after the other until there are enough."""
        while not self.runner.stopped_by and (taken := self._take()) is not None:
            number, point, asked = taken
            trial = self.sweep.trials([point])[0]
            if trial.problem:
                self.runner.report(trial, f"not valid: {trial.problem}")
                self.study.tell(number, state=self.states.FAIL)
                continue
            pruning = None if asked is None else _Pruning(asked, trial)
            status = self.runner.run(trial, pruning)
            if status is None:
                return
            if pruning is not None:
                pruning.pass_on()
            loss = result_of(self.sweep, trial).loss
            self.failed |= status != 0
            if is_pruned(trial) or diverged_at(trial) is not None:
                self.study.tell(number, state=self.states.PRUNED)
            elif status or loss is None:
                self.study.tell(number, state=self.states.FAIL)
            else:
                self.study.tell(number, loss)

    def _take(self) -> tuple[int, Point, optuna.Trial | None] | None:
        """Take a trial that was interrupted, which is not pruned any more, or a new one; None if there are enough."""
        with self.lock:
            while self.interrupted:
                found = self.interrupted.pop(0)
                if len(found.params) == len(self.axes):
                    return found.number, _point(self.axes, found.params), None
                self.study.tell(found.number, state=self.states.FAIL)
            if len(self.study.get_trials(deepcopy=False)) >= self.trials:
                return None
            trial = self.study.ask()
            return trial.number, _point(self.axes, {_name(axis): _suggest(trial, axis) for axis in self.axes}), trial


class _Pruning:
    """Tells whether a running trial is worth no more; asked again and again."""

    def __init__(self, asked: optuna.Trial, trial: Trial) -> None:
        self.asked, self.trial = asked, trial
        self.last = 0

    def pass_on(self) -> None:
        """Report the held-out losses that are new."""
        for line in metrics_of(self.trial):
            if EVAL_KEY in line and line["batch"] > self.last:
                self.last = line["batch"]
                self.asked.report(line[EVAL_KEY], self.last)

    def __call__(self) -> bool:
        self.pass_on()
        return self.asked.should_prune()


def _study(sweep: Sweep, how: tuple[str, str, int]) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("--optuna needs Optuna: pip install 'moefoundry[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(sweep.directory / STUDY_FILE)))
    sampler, pruner, seed = how
    making: Any = getattr(optuna.samplers, SAMPLERS[sampler])
    cutting = getattr(optuna.pruners, PRUNERS[pruner])()
    study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, pruner=cutting)
    study.sampler = making(seed=seed + len(study.get_trials(deepcopy=False)))  # a new start draws other numbers
    return study


def _name(axis: Axis) -> str:
    return axis.key if isinstance(axis, Range) else ",".join(axis.keys)


def _suggest(trial: optuna.Trial, axis: Axis) -> Any:
    if not isinstance(axis, Range):
        return trial.suggest_categorical(_name(axis), [" ; ".join(row) for row in axis.rows])
    if axis.whole:
        return trial.suggest_int(axis.key, round(axis.low), round(axis.high), log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)


def _point(axes: Sequence[Axis], params: dict[str, Any]) -> Point:
    """Turn Optuna's parameters into the text of each key."""
    point: Point = {}
    for axis in axes:
        value = params[_name(axis)]
        if isinstance(axis, Range):
            point[axis.key] = str(value) if axis.whole else f"{value:.6g}"
        else:
            row = next(row for row in axis.rows if " ; ".join(row) == value)
            point |= dict(zip(axis.keys, row, strict=True))
    return point
