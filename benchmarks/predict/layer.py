"""Launches of one MoE layer, forward and backward, and the task of each of its kernels.

The layer runs on meta tensors, which have sizes and no values. Its Triton kernels are compiled for compute capability
9.0 as their wrappers launch them, at the layer's real sizes; nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.layer import Shape
from benchmarks.predict.machine_code import Code, read_code
from benchmarks.predict.model import SMS, TENSOR_OPERATIONS, Chip, Tile, Work, predict
from moefoundry.ops.fused_experts.launches import SHARES
from moefoundry.ops.order_kernel import BLOCK
from moefoundry.ops.router_kernels.function import PROGRAMS
from tests.ops.compiling import launching_on_meta, only_compiling

ALLOCATIONS = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh", "set_")
"""Beginnings of the names of operators that launch nothing, beside those that torch marks as views."""
SLOW_BYTES = 0.15e12
"""Bytes a second of a top-k over short rows."""
SORT_PASSES = 4
"""Passes of a radix sort of int32 keys; each reads and writes keys and int64 indices, in two kernels."""
LOOPS = ("route", "sum_blocks")
"""Kernels without products that have a loop."""
SIMT_OPERATIONS = 50e12
"""Operations a second of a product in fp32."""


class Launch(NamedTuple):
    """A launch of one of our kernels, with what it was given; ``size`` is that of its first operand."""

    kernel: str
    options: dict[str, Any]
    code: Code
    size: int = 0
    grid: tuple[int, ...] = ()


class Operator(NamedTuple):
    """An operator of torch that launches kernels.

    Attributes:
        moved: Bytes of its tensors.
        products: Multiplications and additions, if it is a matrix product.
        wide: They are in fp32.
    """

    name: str
    moved: int
    products: int
    wide: bool


Recorded = list[Launch | Operator]


class Passes(NamedTuple):
    """Launches and operators of a forward and of a backward pass."""

    forward: Recorded
    backward: Recorded


class _Operators(TorchDispatchMode):
    def __init__(self, found: Recorded) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(ALLOCATIONS):
            tensors = {id(x): x for x in _tensors((args, kwargs, result))}.values()
            products = 2 * args[0].numel() * args[1].shape[-1] if name == "mm" else 0
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.found.append(Operator(name, moved, products, name == "mm" and args[0].dtype == torch.float32))
        return result


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for part in nested:
            yield from _tensors(part)
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))


_CODES: dict[int, Code] = {}


@contextmanager
def recording(found: Recorded) -> Iterator[None]:
    """Append every launch and operator; kernels are compiled and not run."""
    from triton.runtime.jit import JITFunction

    with only_compiling(90, 1):
        compile_only = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=warmup, **options)
            if id(kernel) not in _CODES:
                _CODES[id(kernel)] = read_code(kernel, any_loop=self.__name__ in LOOPS)
            size = args[0].numel() if isinstance(args[0], Tensor) else 0
            found.append(Launch(self.__name__, options, _CODES[id(kernel)], size, grid))
            return kernel

        def multiply_parts(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            out = a.new_empty(len(a), b.shape[1], dtype=dtype)
            moved = sum(x.numel() * x.element_size() for x in (a, b, out))
            found.append(Operator("mm", moved, 2 * a.numel() * b.shape[1], False))
            return out

        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch("moefoundry.ops.wide_linear._by_parts", return_value=True),
            mock.patch("moefoundry.ops.wide_linear.multiply_parts", multiply_parts),
            mock.patch("moefoundry.ops.fused_experts.obstacle", return_value=""),
            launching_on_meta(),
            mock.patch("moefoundry.ops.kernel_choice._fused", True),
            mock.patch("moefoundry.ops.kernel_choice._can_run", return_value=True),
            _Operators(found),
        ):
            yield


def record(forward: Callable[[], Any], gradient: Callable[[Any], Any]) -> Passes:
    """Record a call, and the backward pass that ``gradient`` starts from its result."""
    passes = Passes([], [])
    with recording(passes.forward):
        result = forward()
    with recording(passes.backward):
        gradient(result)
    return passes


def record_layer(shape: Shape) -> Passes:
    """Record a whole layer as it trains: router, experts, balance loss and z-loss."""
    from moefoundry.config import MoEConfig
    from moefoundry.moe.layer import MoELayer

    cfg = MoEConfig(
        num_experts=shape.E, top_k=shape.K, expert_hidden_size=shape.F, num_shared_experts=0, backend="triton"
    )
    with torch.device("meta"):
        layer = MoELayer(shape.D, cfg).train()
        layer.experts.to(torch.bfloat16)
        x_BSD = torch.empty(1, shape.T, shape.D, dtype=torch.bfloat16, requires_grad=True)

    def gradient(result: Any) -> None:
        out_BSD, stats = result
        loss = 1e-2 * stats.balance_loss + 1e-3 * stats.z_loss
        torch.autograd.backward([out_BSD, loss], [torch.empty_like(out_BSD), None])

    return record(lambda: layer(x_BSD), gradient)


def record_experts(shape: Shape) -> Passes:
    """Record the experts alone, with the order of their rows: no router, no losses."""
    from moefoundry.ops.fused_experts import fused_experts
    from moefoundry.ops.permute import order_by_expert

    with torch.device("meta"):
        gate, up, down = (
            torch.empty(shape.E, *size, dtype=torch.bfloat16, requires_grad=True)
            for size in ((shape.F, shape.D), (shape.F, shape.D), (shape.D, shape.F))
        )
        x_TD = torch.empty(shape.T, shape.D, dtype=torch.bfloat16, requires_grad=True)
        weights_TK = torch.empty(shape.T, shape.K, requires_grad=True)
        ids_TK = torch.empty(shape.T, shape.K, dtype=torch.int64)
    return record(
        lambda: fused_experts(x_TD, weights_TK, gate, up, down, order_by_expert(ids_TK, shape.E)),
        lambda out_TD: out_TD.backward(torch.empty_like(out_TD)),
    )


def work_of(launch: Launch, shape: Shape, rows_E: list[int]) -> Work:
    """Say what a kernel of the experts or of the router has to do.

    Operands that programs of one wave share are read from HBM once. Gathered tokens are read once for each of their
    rows: the cache holds too few of them to matter.

    Args:
        launch: Of a kernel of ``ops/fused_experts``, or of the router.
        shape: Of the layer.
        rows_E: Rows of each expert.
    """
    options, rows = launch.options, sum(rows_E)
    wide, narrow, weights = 2 * rows * shape.D, 2 * rows * shape.F, 2 * shape.E * shape.F * shape.D
    product = 2 * rows * shape.D * shape.F
    m, n, k = (options.get(letter, 1) for letter in "MNK")

    def by_rows(columns: int, inner: int, operands: int, hbm_bytes: int, products: int) -> Work:
        tiles = sum(_parts(count, m) for count in rows_E) * _parts(columns, n)
        tile = Tile(tiles, _parts(inner, k))
        return Work([tile], 2 * k * operands, hbm_bytes, products * product, shares=SHARES)

    def by_expert(down: int, across: int, outputs: int, hbm_bytes: int) -> Work:
        programs = _parts(down, m) * _parts(across, n) * outputs
        tiles = [Tile(programs, max(1, _parts(count, k))) for count in rows_E]
        return Work(tiles, 2 * k * (m + n), hbm_bytes, outputs * product, 2 * m * n, SHARES)

    match launch.kernel:
        case "up_swiglu":
            return by_rows(shape.F, shape.D, m + 2 * n, wide + 2 * weights + 3 * narrow, 2)
        case "down":
            return by_rows(shape.D, shape.F, m + n, narrow + weights + wide, 1)
        case "down_backward_swiglu":
            return by_rows(shape.F, shape.D, m + n, wide + weights + 5 * narrow, 1)
        case "up_backward":
            return by_rows(shape.D, 2 * _parts(shape.F, k) * k, m + n, 2 * narrow + 2 * weights + wide, 2)
        case "weight_gradient" if options["GATHER_LEFT"]:
            return by_expert(shape.D, shape.F, 1, wide + narrow + weights)
        case "weight_gradient":
            return by_expert(shape.F, shape.D, 2, wide + 2 * narrow + 2 * weights)
        case "gather_sum":
            columns = _parts(shape.D, n)
            return Work([Tile(shape.T * columns, 1)], 0, wide + 2 * shape.T * shape.D, 0)
        case "route" | "route_backward":
            tiles = _parts(shape.T, options["ROWS"])
            steps = _parts(tiles, PROGRAMS) if launch.kernel == "route" else 1
            hbm_bytes = 2 * 4 * shape.T * shape.E + (8 + 4) * rows  # logits and scores or gradients; ids and weights
            return Work([Tile(_parts(tiles, steps), steps)], 0, hbm_bytes, 0)
        case "split":
            size, number = launch.size, options["NUMBER"]
            return Work([Tile(_parts(size, options["SIZE"]), 1)], 0, (4 + 2 * number) * size, 0)
        case "gate_logits":
            across, down, shares = launch.grid
            tile = Tile(across * down * shares, _parts(_parts(shape.D, k), shares))
            hbm_bytes = 2 * (shape.T + 3 * shape.E) * shape.D + 4 * shares * shape.T * shape.E
            return Work([tile], 2 * k * (m + 3 * n), hbm_bytes, 6 * shape.T * shape.D * shape.E)
        case "gate_gradient":
            tile = Tile(_parts(shape.T, m) * _parts(shape.D, n), _parts(3 * shape.E, k))
            hbm_bytes = 2 * (3 * shape.E * (shape.T + shape.D) + 2 * shape.T * shape.D)
            return Work([tile], 2 * k * (m + n), hbm_bytes, 6 * shape.T * shape.D * shape.E)
        case "count_slots":
            return Work([Tile(_parts(rows, options["BLOCK"]), 1)], 0, 8 * rows, 0)
        case "sum_blocks":
            blocks = _parts(rows, BLOCK)
            return Work([Tile(shape.E, _parts(blocks, options["PART"]))], 0, 8 * blocks * shape.E, 0)
        case "place_slots":
            blocks = _parts(rows, options["BLOCK"])
            return Work([Tile(blocks, 1)], 0, 24 * rows + 4 * blocks * shape.E, 0)
        case "place_tiles":
            return Work([Tile(rows // m + shape.E, 1)], 0, 0, 0)
        case kernel:
            raise ValueError(f"nothing is known of the work of {kernel}")


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def seconds_of(operator: Operator, chip: Chip) -> float:
    """Predict an operator's time from the bytes it moves."""
    if operator.name == "sort":
        return SORT_PASSES * (2 * operator.moved / chip.hbm + 2 * chip.kernel)
    if operator.name == "topk":
        return operator.moved / SLOW_BYTES
    rate = SIMT_OPERATIONS if operator.wide else 0.7 * SMS * TENSOR_OPERATIONS * chip.clock
    return max(chip.kernel, operator.moved / chip.hbm, operator.products / rate)


def seconds(recorded: Recorded, shape: Shape, rows_E: list[int], chip: Chip) -> float:
    """Predict the time of all that was recorded, one after the other."""
    return sum(
        seconds_of(part, chip)
        if isinstance(part, Operator)
        else predict(part.code, work_of(part, shape, rows_E), chip).seconds
        for part in recorded
    )
