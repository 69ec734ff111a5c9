"""Narrow copies of fp32 parameters, which the modules of a model on one device multiply by.

On a mesh FSDP casts parameters: in every pass of every micro-batch, through buffers of its own, 34 bytes a parameter.
One device needs no buffers, and parameters change once a step. So a copy is made once a step (6 bytes a parameter), and
the gradient of each micro-batch is added to that of the parameter (6 bytes, then 10).

Parameters stay as they are, fp32 under their own names: so do optimizer, averages and checkpoints. A copy is an
attribute of its module under the name of the parameter. Python finds it before the registered parameter, and
``forward`` reads it like that, also where the backward pass runs it again.

A module may want copies to lie in one tensor, each a slice of its second dimension: it names them in ``adjacent``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moefoundry.parameter_states import ParameterStates, State


class NarrowCopies:
    """Keeps the copies of a model's parameters up to date, from before each forward pass of the model on.

    The arithmetic is FSDP's on one rank: gradients are computed in the narrow dtype, and those of micro-batches are
    added up in that of the parameters.

    Args:
        model: The model, whose ``forward`` is the only way into its modules.
        dtype: Dtype of the copies.
        spared: Modules whose parameters are used as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, spared: Iterable[nn.Module]) -> None:
        self.dtype = dtype
        wide = {id(module) for each in spared for module in each.modules()}
        self.modules = [module for module in model.modules() if id(module) not in wide]
        self._copies: dict[int, _Copy] = {}  # by id of the parameter, which several modules may have
        self._states = ParameterStates()
        model.register_forward_pre_hook(self.refresh)

    @torch.inference_mode(False)  # training may follow an evaluation
    @torch.no_grad()
    def refresh(self, *_: Any) -> None:
        """Make the copies of all parameters that have changed since the last time, or are new."""
        copies: dict[int, _Copy] = {}
        stale = []
        for module in self.modules:
            places = _Places(module, self.dtype)
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                copy = copies.get(id(parameter))
                if copy is None:
                    before = self._copies.get(id(parameter))
                    copy = copies[id(parameter)] = self._copy(parameter, before, partial(places.take, name))
                    if copy is not before:
                        stale.append(copy)
                module.__dict__[name] = copy.tensor
        self._copies = copies
        if stale:
            sources = [copy.parameter.detach() for copy in stale]
            torch._foreach_copy_([copy.tensor.detach() for copy in stale], sources)

    def _copy(self, parameter: nn.Parameter, before: _Copy | None, place: Callable[[], Tensor]) -> _Copy:
        """Return ``before`` if its values are those of ``parameter``, else a copy to be filled, if new in ``place``."""
        state = self._states.of(parameter)
        if before is not None and _alike(before.tensor, parameter):
            return before if before.state == state else _Copy(parameter, before.tensor, state)
        tensor = place().requires_grad_(parameter.requires_grad)
        if parameter.requires_grad:
            tensor.register_post_accumulate_grad_hook(partial(_add_gradient, parameter))
        return _Copy(parameter, tensor, state)


class _Places:
    """Memory of new copies of one module's parameters."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.adjacent: tuple[str, ...] = getattr(module, "adjacent", ())
        self._whole: Tensor | None = None

    def take(self, name: str) -> Tensor:
        """Give the memory of the parameter ``name``, of its shape."""
        parameter = self.module._parameters[name]
        assert parameter is not None
        if name not in self.adjacent:
            return torch.empty_like(parameter, dtype=self.dtype, requires_grad=False)
        first, second, *rest = parameter.shape
        if self._whole is None:
            self._whole = parameter.new_empty(first, second * len(self.adjacent), *rest, dtype=self.dtype)
        return self._whole.narrow(1, second * self.adjacent.index(name), second).detach()


class _Copy(NamedTuple):
    """A narrow copy.

    Attributes:
        parameter: What it is a copy of.
        tensor: The copy, a leaf.
        state: State of the parameter when it was copied.
    """

    parameter: nn.Parameter
    tensor: Tensor
    state: State


def _alike(copy: Tensor, parameter: nn.Parameter) -> bool:
    return (copy.device, copy.requires_grad) == (parameter.device, parameter.requires_grad)


def _add_gradient(parameter: nn.Parameter, copy: Tensor) -> None:
    """Move the gradient of a copy to the parameter."""
    gradient, copy.grad = copy.grad, None
    assert gradient is not None, "the hook runs when there is one"
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient
