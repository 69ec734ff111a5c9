"""Mixture backends: functions that compute the weighted sum of each token's experts.

``model.moe.backend`` names one. A backend sees the tokens that have experts on this rank, whether they were here or
arrived from other ranks, and the order of their rows. Installed packages may add others: ``docs/extending.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moefoundry.config import MoEConfig, UserError
from moefoundry.config.making import make_part
from moefoundry.moe.fastest import backends_by_speed, measured_layers
from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer, add_bias
from moefoundry.ops.expert_mixture import expert_mixture, pays
from moefoundry.ops.grouped_linear import GroupedLinear, grouped_linear, grouped_linear_loop
from moefoundry.ops.permute import RowOrder, permute, permute_slots, sum_rows
from moefoundry.ops.recompute import last_operand_is_there
from moefoundry.ops.swiglu import PLAIN, Activation, swiglu

BACKEND_KEY = "model.moe.backend"


class Mixture(Protocol):
    """A mixture backend. It may also have ``obstacle``, see :func:`check_backend`."""

    @property
    def takes_hidden(self) -> bool:
        """True if it takes ``hidden``; one without this attribute computes plain SwiGLU without biases."""
        ...

    def __call__(
        self,
        tokens_PD: Tensor,
        weights_PK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: RowOrder,
        hidden: HiddenLayer = PLAIN_LAYER,
    ) -> Tensor:
        """Mix each token's experts, [P, D] -> [P, D]; differentiable in the first five arguments, and in biases.

        Args:
            tokens_PD: Tokens that have experts on this rank.
            weights_PK: Weights of their slots in the sum, fp32 or wider.
            gate_EFD: Weights of this rank's E experts, each in the layout of ``nn.Linear``; likewise the others.
            up_EFD: [E, F, D].
            down_EDF: [E, D, F].
            order: Order of the slots that are for experts on this rank: its N rows.
            hidden: Activation, and biases of gate and up; that of down is added to the result, whatever the backend.
        """
        ...


def build_mixture(cfg: MoEConfig, activation: Activation = PLAIN) -> Mixture:
    """Make the backend that ``model.moe.backend`` names.

    Raises:
        UserError: It computes plain SwiGLU without biases, and the model has more.
    """
    mixture: Mixture = make_part("mixture_backends", cfg.backend, BACKEND_KEY, cfg)
    if (cfg.projection_bias or activation != PLAIN) and not getattr(mixture, "takes_hidden", False):
        key = "model.moe.projection_bias" if cfg.projection_bias else "model.swiglu"
        raise UserError(f"{BACKEND_KEY}: {cfg.backend} does not compute {key}; use {BACKEND_KEY}=auto")
    return mixture


def check_backend(cfg: MoEConfig, d_model: int, device: torch.device, dtype: torch.dtype) -> None:
    """Ask the recipe's backend if it can run.

    If it has ``obstacle(tokens_PD, hidden_size)``, this gives the reason why not, or an empty text.

    Args:
        cfg: The recipe's ``model.moe``.
        d_model: D.
        device: Device of the tokens.
        dtype: Dtype of the products.

    Raises:
        UserError: The backend cannot run.
    """
    obstacle = getattr(build_mixture(cfg), "obstacle", None)
    found = obstacle and obstacle(torch.empty(1, d_model, device=device, dtype=dtype), cfg.expert_hidden_size)
    if found:
        raise UserError(f"{BACKEND_KEY}: {cfg.backend} cannot run: {found}; use {BACKEND_KEY}=auto")


@dataclass(frozen=True)
class RowMixture:
    """The mixture by rows: rows in expert order, three grouped products, and a sum over each token's rows.

    Attributes:
        product: The grouped product; precision policies replace it.
    """

    product: GroupedLinear
    takes_hidden = True

    def __call__(
        self,
        tokens_PD: Tensor,
        weights_PK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: RowOrder,
        hidden: HiddenLayer = PLAIN_LAYER,
    ) -> Tensor:
        rows_ND, counts_E = permute(tokens_PD, order), order.tokens_per_expert_E
        gate_NF = add_bias(self.product(rows_ND, gate_EFD, counts_E), hidden.gate_bias_EF, counts_E)
        up_NF = add_bias(self.product(rows_ND, up_EFD, counts_E), hidden.up_bias_EF, counts_E)
        hidden_NF = swiglu(gate_NF, up_NF, permute_slots(weights_PK, order), hidden.activation)
        last_operand_is_there()
        return sum_rows(self.product(hidden_NF, down_EDF, counts_E), order)


def grouped_mm(cfg: MoEConfig) -> Mixture:
    """Multiply rows by ``F.grouped_mm``."""
    return RowMixture(grouped_linear)


def loop(cfg: MoEConfig) -> Mixture:
    """Multiply rows one expert at a time: the oracle, for any dtype."""
    return RowMixture(grouped_linear_loop)


@dataclass(frozen=True)
class AutoMixture:
    """The mixture that was measured to be fastest for the device, dtype and size; by rows where none was.

    On a CPU that is one expert after the other for large layers in fp32; on a GPU ``fastest.json`` says.

    Attributes:
        by_rows: The mixture by rows.
        cfg: Of which others are made.
    """

    by_rows: RowMixture
    cfg: MoEConfig
    takes_hidden = True

    def __call__(
        self,
        tokens_PD: Tensor,
        weights_PK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: RowOrder,
        hidden: HiddenLayer = PLAIN_LAYER,
    ) -> Tensor:
        operands = tokens_PD, weights_PK, gate_EFD, up_EFD, down_EDF, order
        if tokens_PD.device.type == "cuda" and measured_layers():
            rows = len(order.slot_of_row_N) / max(len(down_EDF), 1)
            mixture = self.on_gpu(tokens_PD, down_EDF.shape[-1], rows, hidden)
            return mixture(*operands) if hidden.plain else mixture(*operands, hidden)
        on_cpu = tokens_PD.device.type == "cpu" and tokens_PD.dtype == torch.float32
        sizes = len(order.slot_of_row_N), len(down_EDF), tokens_PD.shape[1], tokens_PD.itemsize
        if on_cpu and hidden.plain and pays(*sizes):
            return expert_mixture(*operands)
        return self.by_rows(*operands, hidden)

    def on_gpu(self, tokens_PD: Tensor, hidden_size: int, rows: float, hidden: HiddenLayer) -> Mixture:
        """Take the fastest backend that can run with these tokens and this hidden layer."""
        device, dtype = torch.cuda.get_device_name(tokens_PD.device), str(tokens_PD.dtype).removeprefix("torch.")
        for backend in backends_by_speed(device, dtype, tokens_PD.shape[1], hidden_size, rows):
            mixture: Mixture = make_part("mixture_backends", backend, BACKEND_KEY, self.cfg)
            obstacle = getattr(mixture, "obstacle", None)
            takes = hidden.plain or getattr(mixture, "takes_hidden", False)
            if takes and not (obstacle and obstacle(tokens_PD, hidden_size)):
                return mixture
        return self.by_rows


def auto(cfg: MoEConfig) -> Mixture:
    """Use what was measured to be fastest for the device, dtype and size of the tokens; the one place that chooses."""
    return AutoMixture(RowMixture(grouped_linear), cfg)


@dataclass(frozen=True)
class KernelMixture:
    """Kernels of their own, in a module that is imported when they are used.

    Attributes:
        backend: Name of the backend.
        functions: Imports and gives ``obstacle(tokens_PD, hidden_size)``, a reason or "", and the mixture function.
        takes_hidden: The function takes ``hidden``.
        stacks: It needs gate and up in one tensor [E, 2F, D], and copies them where they are not.
    """

    backend: str
    functions: Callable[[], tuple[Callable[[Tensor, int], str], Callable[..., Tensor]]]
    takes_hidden: bool = True
    stacks: bool = False

    def __call__(
        self,
        tokens_PD: Tensor,
        weights_PK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: RowOrder,
        hidden: HiddenLayer = PLAIN_LAYER,
    ) -> Tensor:
        if found := self.obstacle(tokens_PD, down_EDF.shape[-1]):
            raise ValueError(f"{BACKEND_KEY}: {self.backend} cannot run: {found}; use {BACKEND_KEY}=auto")
        _, mixture = self.functions()
        operands = tokens_PD, weights_PK, gate_EFD, up_EFD, down_EDF, order
        return mixture(*operands, hidden) if self.takes_hidden else mixture(*operands)

    def obstacle(self, tokens_PD: Tensor, hidden_size: int) -> str:
        """Say why the kernels cannot run; empty if they can."""
        obstacle, _ = self.functions()
        return obstacle(tokens_PD, hidden_size)


def triton(cfg: MoEConfig) -> Mixture:
    """Use the fused Triton kernels."""
    return KernelMixture("triton", _of_triton)


def megablocks(cfg: MoEConfig) -> Mixture:
    """Use block-sparse products, as MegaBlocks does."""
    return KernelMixture("megablocks", _of_megablocks)


def quack(cfg: MoEConfig) -> Mixture:
    """Use QuACK's grouped GEMMs."""
    return KernelMixture("quack", _of_quack, takes_hidden=False, stacks=True)


def _of_triton() -> Any:
    from moefoundry.ops import fused_experts as found

    return found.obstacle, found.fused_experts


def _of_megablocks() -> Any:
    from moefoundry.ops import block_sparse as found

    return found.obstacle, found.block_sparse_experts


def _of_quack() -> Any:
    from moefoundry.ops import quack_experts as found

    return found.obstacle, found.quack_experts
