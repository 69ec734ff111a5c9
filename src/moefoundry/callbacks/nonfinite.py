"""First tensor of a step that is not finite.

A step that is not finite is brought back to its beginning on all ranks: batch, generators, no gradients. Its state is
saved, as a checkpoint apart from those of the run, and the forward and backward passes are repeated under hooks that
look at the parameters, inputs and outputs of every module, and at the gradients of outputs. ``moefoundry replay`` does
the same later, from what was saved. Steps that are finite cost a copy of the generators' states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.callbacks.health import NonFiniteError
from moefoundry.callbacks.step_start import StepStart
from moefoundry.checkpoint.nonfinite import store_of_steps
from moefoundry.checkpoint.save import Saver
from moefoundry.checkpoint.state import RunState
from moefoundry.config import UserError

T = TypeVar("T")


class ReplayedError(Exception):
    """The step has been replayed; the message says where it first was not finite."""


class _Repeated(Exception):  # noqa: N818  # ends a repetition before the optimizer's step
    pass


@dataclass(frozen=True)
class Finding:
    """First tensor of a rank that is not finite.

    Attributes:
        order: Number of tensors that were looked at before it.
        rank: Number of the rank.
        text: The tensor, its shape and dtype, the share of bad values, and the range of the others.
    """

    order: int
    rank: int
    text: str


class NonFiniteSearch(Callback):
    """Says where a step first was not finite, after :class:`~moefoundry.callbacks.health.FiniteCheck` has found it.

    Args:
        run_dir: Directory of the run; the state of the step is saved below it.
        run: State that is saved.

    Attributes:
        replays: The first batch is replayed, whether it is finite or not, and nothing is saved.
    """

    def __init__(self, run_dir: Path, run: RunState) -> None:
        self.run_dir = run_dir
        self.run = run
        self.replays = False
        self._repeats = False

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if self._repeats:
            raise _Repeated

    def repeating(self, state: State, train_batch: Callable[[], T]) -> T:
        """Call ``train_batch``, and find out more where it is not finite.

        Raises:
            NonFiniteError: With what was found.
            ReplayedError: The batch was to be replayed.
        """
        if self.replays:
            raise ReplayedError(self._search(state, train_batch))
        start = StepStart(state)
        try:
            return train_batch()
        except NonFiniteError as error:
            said = str(error)
        start.restore(state)
        saved = self._save(state)
        try:
            first = self._search(state, train_batch)
        except Exception as error:  # whatever comes of a step that should not be
            first = f"first: not found, as the step could not be repeated: {type(error).__name__}: {error}"
        raise NonFiniteError(f"{said}\n{first}{saved}")

    def _save(self, state: State) -> str:
        """Save the state before the step; say where, and warn where that fails."""
        store, batch = store_of_steps(self.run_dir), state.timestamp.batch.value
        saver = Saver(store, lambda path: None)
        try:
            if not any(dist.all_gather_object(store.path(batch).exists())):
                saver.save(batch, self.run.tensors(state), self.run.document(state), self.run.origin(batch))
        except UserError as error:
            if dist.get_global_rank() == 0:
                print(f"warning: the step is not saved: {error}", file=sys.stderr, flush=True)
            return ""
        finally:
            saver.close()
        return f"\nsaved in {store.path(batch)}; repeat the step: moefoundry replay {self.run_dir}"

    def _search(self, state: State, train_batch: Callable[[], Any]) -> str:
        """Repeat the step under hooks; say what all ranks have found."""
        self._repeats = True
        try:
            with watched(state.model) as found, suppress(NonFiniteError, _Repeated):
                train_batch()
        finally:
            self._repeats = False
        findings = [each for each in dist.all_gather_object(found[0] if found else None) if each is not None]
        if not findings:
            return "first: no parameter, input, output or gradient of a module, when the step was repeated"
        first = min(findings, key=lambda each: (each.order, each.rank))
        others = sorted(each.rank for each in findings if each.order == first.order and each.rank != first.rank)
        more = f"; the same tensor on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
        return f"first: {first.text} on rank {first.rank}{more if others else ''}"


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Finding]]:
    """Look at the tensors of every module while it runs; the list gets the first that is not finite."""
    found: list[Finding] = []
    looked_at = [0]

    def look(what: str, value: Any) -> None:
        looked_at[0] += 1
        if not found and isinstance(value, Tensor) and value.is_floating_point():
            local = value.to_local() if isinstance(value, DTensor) else value
            if not local.isfinite().all():
                found.append(Finding(looked_at[0], dist.get_global_rank(), f"{what}, {describe(local)}"))

    def before(name: str, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for parameter_name, parameter in module.named_parameters(recurse=False):
            look(f"parameter {name}.{parameter_name}", parameter.detach())
        for value in (*args, *options.values()):
            look(f"input of {name}", value)

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            look(f"output of {name}", value)
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(look, f"gradient of the output of {name}"))

    handles: list[Any] = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def describe(values: Tensor) -> str:
    """Describe a tensor that is not finite: shape, dtype, share and kind of bad values, range of the others."""
    finite = values[values.isfinite()]
    bad, kinds = values.numel() - finite.numel(), []
    for kind, count in (("NaN", values.isnan().sum()), ("Inf", values.isinf().sum())):
        if count:
            kinds.append(f"{int(count)} {kind}")
    shown = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
    reach = f"others from {finite.min().item():.3g} to {finite.max().item():.3g}" if finite.numel() else "no other"
    return f"{shown}: {bad / values.numel():.2%} not finite ({', '.join(kinds)}), {reach}"
