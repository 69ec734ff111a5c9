"""Launches of the kernels of ``kernels.py``, and their tilings."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.fused_experts import kernels
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.swiglu import PLAIN, Activation


class Config(NamedTuple):
    """Tiling of one kernel: rows, columns and depth of a tile, warps and pipeline stages of a program."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Give the arguments of a launch."""
        return {"M": self.m, "N": self.n, "K": self.k, "num_warps": self.warps, "num_stages": self.stages}


CONFIGS = {
    "up_swiglu": Config(128, 128, 64, 8, 3),
    "down": Config(128, 256, 64, 8, 3),
    "down_backward_swiglu": Config(128, 128, 64, 8, 3),
    "up_backward": Config(128, 256, 64, 8, 3),
    "weight_gradient": Config(128, 256, 64, 8, 5),
}
"""Chosen from machine code, by ``python -m benchmarks.predict``, not yet from measured times, which
``python -m benchmarks.tune_experts`` takes. All kernels over tiles of rows share ``m``; for the gradients of weights it
is the width of the operand that is gathered."""
SUM_COLUMNS, SUM_ELEMENTS = 1024, 8192
"""Columns that a program of the sum has, and elements of all rows of a token together."""
MAX_STRIDE = 2**40
"""Bytes; of a tensor descriptor they must be fewer."""
HOST_PROGRAMS = 3
"""Programs without a GPU: few, so that in the interpreter each takes several tiles."""
SHARES = 4
"""Programs for each multiprocessor, which one of them fills: so they run after each other. With one each, those of
multiprocessors that a collective of FSDP or an exchange holds would begin when all others end, and double the time. Of
four, free multiprocessors take what is left."""


class Tiles(NamedTuple):
    """Rows of each tile; int32 [tiles] each, on the device.

    Attributes:
        group: Expert of the tile; E for a tile without rows.
        first: First row of the tile.
        end: End of the expert's rows.
        total: How many tiles have rows, [1].
    """

    group: Tensor
    first: Tensor
    end: Tensor
    total: Tensor


def empty_tiles(num_experts: int, num_rows: int, m: int, device: torch.device) -> Tiles:
    """Allocate as many tiles of ``m`` rows as ``num_rows`` can need."""
    tiles = (num_rows + num_experts * (m - 1)) // m
    return Tiles(*(torch.empty(size, dtype=torch.int32, device=device) for size in (tiles, tiles, tiles, 1)))


def place_tiles(tokens_per_expert_E: Tensor, num_rows: int, m: int) -> Tiles:
    """Tile N rows by ``m``, each expert from a new tile; the number of tiles is an upper bound."""
    num_experts = len(tokens_per_expert_E)
    placed = empty_tiles(num_experts, num_rows, m, tokens_per_expert_E.device)
    kernels.place_tiles[(len(placed.group),)](
        tokens_per_expert_E, *placed, num_experts, MAX_GROUPS=triton.next_power_of_2(num_experts), M=m
    )
    return placed


def programs_of(device: torch.device, tiles: int) -> int:
    """Count the programs among which a kernel shares at most so many tiles."""
    if device.type != "cuda":
        return min(tiles, HOST_PROGRAMS)
    return min(tiles, SHARES * torch.cuda.get_device_properties(device).multi_processor_count)


def multiply_up(
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    gate: Tensor,
    up: Tensor,
    tiles: Tiles,
    parts: HiddenLayer = PLAIN_LAYER,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the outputs of gate and up with their biases, [N, 2 F], and their weighted SwiGLU, [N, F].

    This is written to ``hidden``, if given.
    """
    config, rows, (_, columns, inner) = CONFIGS["up_swiglu"], len(token_of_row_N), gate.shape
    gate_up = tokens_TD.new_empty(rows, 2 * columns)
    hidden = tokens_TD.new_empty(rows, columns) if hidden is None else hidden
    both, up_first = _described_together(gate, up, 2, config.n, config.k)
    kernels.up_swiglu[(programs_of(hidden.device, len(tiles.group) * triton.cdiv(columns, config.n)),)](
        tokens_TD,
        token_of_row_N,
        both,
        *parts[1:],
        row_weights_N,
        gate_up,
        hidden,
        *tiles,
        inner,
        columns,
        UP_FIRST=up_first,
        **_constants(parts.activation),
        **config.launch(),
    )
    return gate_up, hidden


def multiply_down(hidden_NF: Tensor, down: Tensor, tiles: Tiles) -> Tensor:
    """Multiply by down, [N, F] -> [N, D]."""
    config, (_, columns, inner) = CONFIGS["down"], down.shape
    out = hidden_NF.new_empty(len(hidden_NF), columns)
    kernels.down[(programs_of(out.device, len(tiles.group) * triton.cdiv(columns, config.n)),)](
        _described(hidden_NF, config.m, config.k),
        _described(down, 1, config.n, config.k),
        out,
        *tiles,
        inner,
        columns,
        **config.launch(),
    )
    return out


def multiply_up_backward(grad_gate_up: Tensor, gate: Tensor, up: Tensor, tiles: Tiles) -> Tensor:
    """Multiply gradients by gate and up, and add, [N, 2 F] -> [N, D]."""
    config, (_, inner, columns) = CONFIGS["up_backward"], gate.shape
    out = grad_gate_up.new_empty(len(grad_gate_up), columns)
    both, up_first = _described_together(gate, up, 1, config.k, config.n)
    kernels.up_backward[(programs_of(out.device, len(tiles.group) * triton.cdiv(columns, config.n)),)](
        _described(grad_gate_up, config.m, config.k),
        both,
        out,
        *tiles,
        inner,
        columns,
        UP_FIRST=up_first,
        **config.launch(),
    )
    return out


def multiply_down_backward(
    grad_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    down: Tensor,
    gate_up: Tensor,
    tiles: Tiles,
    activation: Activation = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of gate's and up's outputs [N, 2 F], SwiGLU's output [N, F], gradients of row weights [N]."""
    config, rows = CONFIGS["down_backward_swiglu"], len(token_of_row_N)
    experts, inner, columns = down.shape
    grad_gate_up, hidden = torch.empty_like(gate_up), gate_up.new_empty(rows, columns)
    across = triton.cdiv(columns, config.n)
    parts = row_weights_N.new_empty(across, rows)
    kernels.down_backward_swiglu[(len(tiles.group) * across,)](
        grad_TD,
        token_of_row_N,
        _described(down, 1, config.k, config.n),
        gate_up,
        row_weights_N,
        grad_gate_up,
        hidden,
        parts,
        *tiles[:3],
        experts,
        rows,
        inner,
        columns,
        EVEN=inner % config.k == 0,
        **_constants(activation),
        **config.launch(),
    )
    return grad_gate_up, hidden, parts.sum(0)


def multiply_transposed(
    left: Tensor, right: Tensor, token_of_row_N: Tensor, ends_E: Tensor, outputs: int, *, gather_left: bool
) -> list[Tensor]:
    """Compute ``left``^T ``right`` of each expert's rows, [E, A, B].

    The columns of ``left`` have ``outputs`` parts, each with a result of its own. One of the operands is gathered.
    """
    config, experts = CONFIGS["weight_gradient"], len(ends_E)
    rows, columns = left.shape[1] // outputs, right.shape[1]
    grads = [left.new_empty(experts, rows, columns) for _ in range(outputs)]
    down, across = (config.m, config.n) if gather_left else (config.n, config.m)
    tiles = triton.cdiv(rows, down) * triton.cdiv(columns, across) * outputs * experts
    kernels.weight_gradient[(programs_of(left.device, tiles),)](
        left if gather_left else _described(left, config.k, down),
        _described(right, config.k, across) if gather_left else right,
        token_of_row_N,
        ends_E,
        _described(grads[0], 1, down, across),
        _described(grads[-1], 1, down, across),
        rows,
        columns,
        experts,
        MAX_GROUPS=triton.next_power_of_2(experts),
        OUTPUTS=outputs,
        GATHER_LEFT=gather_left,
        **config.launch() | {"M": down, "N": across},
    )
    return grads


def sum_rows(rows_ND: Tensor, order: RowOrder, row_weights_N: Tensor | None = None) -> Tensor:
    """Sum each token's rows, times their fp32 weights if given, in fp32, [N, D] -> [T, D]."""
    tokens, width = len(order.first_of_token) - 1, rows_ND.shape[1]
    out = rows_ND.new_empty(tokens, width)
    slots = triton.next_power_of_2(order.top_k)
    columns = min(SUM_COLUMNS, triton.next_power_of_2(width), max(32, SUM_ELEMENTS // slots))
    kernels.gather_sum[(tokens, triton.cdiv(width, columns))](
        rows_ND,
        order.row_of_kept_slot_N,
        order.first_of_token,
        row_weights_N,
        out,
        width,
        SLOTS=slots,
        N=columns,
        num_warps=4,
    )
    return out


def _constants(activation: Activation) -> dict[str, float | None]:
    return {"ALPHA": activation.alpha, "LIMIT": activation.limit, "OFFSET": activation.offset}


def _described(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _described_together(first: Tensor, second: Tensor, of_both: int, *block: int) -> tuple[TensorDescriptor, bool]:
    """Describe two tensors [E, O, I] as one, [2, E, O, I], and tell whether the second is its first.

    They need not lie side by side: what is between them is the stride of the first dim. A block has parts of
    ``of_both`` of them.
    """
    distance = second.data_ptr() - first.data_ptr()
    if abs(distance) >= MAX_STRIDE:
        return _described(torch.stack([first, second]), of_both, 1, *block), False
    base, elements = second if distance < 0 else first, abs(distance) // first.element_size()
    strides = [elements, *first.stride()]
    return TensorDescriptor(base, [2, *first.shape], strides, [of_both, 1, *block]), distance < 0
