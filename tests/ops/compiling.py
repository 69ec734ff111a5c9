"""Compile Triton kernels for a GPU that is not there, as their own wrappers launch them, and read the machine code.

    python -m tests.ops.compiling [--capability 100] [--update]

prints what ``test_compiled_kernels.py`` compares with ``compiled_kernels.json``, or writes it there. A stand-in for
Triton's driver names the target; launches only compile, every configuration of an autotuned kernel once. So signatures,
specialization (divisible by 16, equal to 1, alignment) and constants are those of real launches. ``ptxas`` and
``cuobjdump`` come with Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("compiled_kernels.json")
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 256, 1536, 256, 128, 8
"""Of the layers that kernels are compiled for: only divisibility matters, and the number of experts."""
PRODUCTS = ("QGMMA", "HGMMA", "UTCQMMA", "UTCHMMA", "HMMA")
"""Instructions of tensor cores."""
QUANTIZERS = ("quantize", "retile", "dequantize")
"""Kernels without loops, whose instructions are counted."""
Found = dict[str, Any]


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def only_compiling(capability: int, configs: int) -> Iterator[list[tuple[str, Any]]]:
    """Let launches only compile; yields the list that every (name, compiled kernel) is appended to.

    Args:
        capability: 80 for Ampere, 90 for Hopper, 100 for Blackwell.
        configs: How many configurations of an autotuned kernel, from the first.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    def each_config(self: Any, *args: Any, **options: Any) -> None:
        options.pop("warmup", None)
        for config in self.configs[:configs]:
            if config.pre_hook is not None:
                config.pre_hook(dict(zip(self.fn.arg_names, args, strict=False)) | options | config.all_kwargs())
            self.fn.run(*args, **options, **config.all_kwargs())

    driver.set_active(NoGpu(capability))  # for good: where there is no GPU there is no driver to go back to
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(Autotuner, "run", each_config):
        yield compiled


@contextmanager
def launching_on_meta() -> Iterator[None]:
    """Let the fused experts and the gate call the functions that launch kernels, and not operators of torch.

    On meta tensors an operator would do nothing.
    """
    from moefoundry.ops import wide_linear
    from moefoundry.ops.fused_experts import function, operators

    gate = mock.patch.object(wide_linear, "PRODUCT", wide_linear.product_by_parts)
    functions = {"UP_SWIGLU": operators.up_swiglu, "DOWN_SUM": operators.down_sum, "BACKWARD": operators.backward}
    with gate, mock.patch.multiple(function, **functions):
        yield


def inspect(kernel: Any) -> Found:
    """Registers, shared memory and spills of a compiled kernel, and how it multiplies and copies."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()

    def has(pattern: str) -> bool:
        return re.search(pattern, code) is not None

    operations = list_operations(code)
    overlap = {"while multiplying": in_flight(operations)} if has(r"\bQGMMA") else {}
    ahead = copies_ahead(operations)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "tensor cores": next((name for name in PRODUCTS if has(rf"\b{name}")), None),
        "copies": [name for name, seen in (("TMA", has("UTMALDG")), ("128 bits", has(r"LDGSTS\S*\.128"))) if seen],
        **overlap,
        **({} if ahead is None else {"copies ahead": ahead}),
        **({"serialized": True} if serialized(operations) else {}),
        "instructions": sum(operation.name != "NOP" for operation in operations),
    }


class Operation(NamedTuple):
    """An instruction of a kernel: its address, name and operands."""

    address: int
    name: str
    operands: str


def list_operations(code: str) -> list[Operation]:
    """Parse what ``cuobjdump -sass`` prints."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code)
    return [Operation(int(address, 16), name, operands) for address, name, operands in found]


def main_loop(operations: list[Operation]) -> list[Operation]:
    """Give the innermost loop over products; empty if there is none."""
    loops = []
    for address, name, rest in operations:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            body = [each for each in operations if int(target[1], 16) <= each.address <= address]
            names = [each.name for each in body]
            if any(name.startswith(PRODUCTS) for name in names) and "EXIT" not in names:  # behind it are waits
                loops.append(body)
    return min(loops, key=len, default=[])


def copies_ahead(operations: list[Operation]) -> int | None:
    """Count the groups of asynchronous 16-byte copies that may be under way while the main loop multiplies.

    None if it waits for no such copies. 0 is a loop that waits for all that it has begun to copy.
    """
    body = main_loop(operations)
    product = next((index for index, each in enumerate(body) if each.name.startswith(PRODUCTS)), 0)
    waits = [int(each.operands.rpartition("0x")[2], 16) for each in body[:product] if each.name == "DEPBAR.LE"]
    return waits[-1] if waits else None


def serialized(operations: list[Operation]) -> bool:
    """Tell if every product of Hopper's tensor cores in the main loop is waited for before the next.

    The compiler does so where it sees the sum used while a product is under way, which Triton should have waited for.
    """
    names = ("HGMMA", "WARPGROUP.DEPBAR")
    body = [each for each in main_loop(operations) if each.name.startswith(names)]
    following = zip(body, body[1:] + body[:1], strict=True)
    waited = [
        next_one.name.startswith(names[1]) and next_one.operands.rstrip().endswith("0x0")
        for each, next_one in following
        if each.name.startswith(names[0])
    ]
    return len(waited) > 1 and all(waited)


def in_flight(operations: list[Operation]) -> dict[str, int]:
    """Count the additions and copies that the inner loop over FP8 products does between a product and the next wait.

    Sums of a block are added to the total by FFMA, so these are promoted while the tensor cores multiply.
    """
    body = [each for _, each, _ in main_loop(operations)]
    last = max(index for index, each in enumerate(body) if each.startswith("QGMMA"))
    turned = [*body[last + 1 :], *body[: last + 1]]  # from behind the last product to the wait for it
    wait = next(index for index, each in enumerate(turned) if each.startswith("WARPGROUP.DEPBAR"))
    kinds = {"FFMA": "FFMA", "copies": ("UTMALDG", "LDGSTS")}
    return {kind: sum(each.startswith(names) for each in turned[:wait]) for kind, names in kinds.items()}


def launches() -> dict[str, Callable[[], Any]]:
    """Launches of every kernel, by name, on small operands whose values nobody reads."""
    from moefoundry.ops import adamw_kernel
    from moefoundry.ops.block_sparse import function as blocks_of_experts
    from moefoundry.ops.block_sparse import layout
    from moefoundry.ops.block_sparse.kernels import missing
    from moefoundry.ops.fp8 import Format, Scaling, Tile, formats
    from moefoundry.ops.fp8 import triton_gemm as gemm
    from moefoundry.ops.fp8 import triton_quantize as quantize
    from moefoundry.ops.fp8 import triton_swiglu as swiglu
    from moefoundry.ops.fp8.formats import QuantizedTensor
    from moefoundry.ops.fused_experts import launches as fused
    from moefoundry.ops.gate_kernels import multiply_and_add, multiply_gate
    from moefoundry.ops.order_kernel import order_slots
    from moefoundry.ops.permute import order_by_expert, pad_order
    from moefoundry.ops.router_kernels import function as router
    from moefoundry.ops.row_kernels import function as by_row
    from moefoundry.ops.split_kernel import stack_parts_triton

    rows = TOKENS * TOP_K

    def bf16(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    def tiles(rows: int, columns: int, format: Format = Format.E4M3) -> QuantizedTensor:
        values = torch.zeros(rows, format.width(columns), dtype=torch.uint8).view(format.dtype)
        scales = torch.ones(rows, columns // formats.TILE, dtype=torch.uint8)
        return QuantizedTensor(values, scales, Tile.ROW, (rows, columns), format)

    def blocks(rows: int, columns: int) -> QuantizedTensor:
        values = torch.zeros(EXPERTS, rows, columns, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.ones(EXPERTS, rows // formats.TILE, columns // formats.TILE, dtype=torch.uint8)
        return QuantizedTensor(values, scales, Tile.BLOCK, (EXPERTS, rows, columns))

    def columns(width: int) -> QuantizedTensor:
        count = formats.num_column_tiles(rows, EXPERTS)
        values = torch.zeros(width, count * formats.TILE, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.ones(count, width, dtype=torch.uint8)
        return QuantizedTensor(values, scales, Tile.COLUMN, (rows, width), Format.E4M3, sizes_E)

    sizes_E = torch.full((EXPERTS,), rows // EXPERTS, dtype=torch.int64)
    order = order_by_expert(torch.arange(rows).remainder(EXPERTS).view(TOKENS, TOP_K), EXPERTS)
    token_of_row, weights = order.token_of_row_N.to(torch.int32), torch.ones(rows)
    x, hidden, gate = bf16(TOKENS, WIDTH), bf16(rows, HIDDEN), bf16(EXPERTS, HIDDEN, WIDTH)
    place = fused.Tiles(*(torch.zeros(rows // 128 + EXPERTS, dtype=torch.int32) for _ in range(4)))
    ends_E = sizes_E.cumsum(0, dtype=torch.int32)
    padded = pad_order(order, TOKENS, 128)
    topology, rows_PD = layout.find_topology(padded, HIDDEN // 128), bf16(len(padded.slot_of_row_N), WIDTH)
    by_width, sparse = gate.flatten(0, 1), bf16(len(topology.row_indices), 128, 128)
    blocks_of_stk = {
        "blocks: up": lambda: blocks_of_experts.multiply_into_blocks(rows_PD, by_width.T, topology),
        "blocks: down": lambda: blocks_of_experts.multiply_blocks(sparse, by_width, topology),
        "blocks: gradients of weights": lambda: blocks_of_experts.multiply_blocks(
            sparse, rows_PD, topology, transposed=True
        ),
    }
    heads = bf16(2, TOKENS // 2, 12, 128).transpose(1, 2)
    narrow = bf16(2, TOKENS // 2, 12, 64).transpose(1, 2)
    wide, weight = bf16(TOKENS, 2048).requires_grad_(), bf16(2048).requires_grad_()
    of_head, head_weight = bf16(TOKENS, 128).requires_grad_(), bf16(128).requires_grad_()
    by_rows = {
        "rows: RMSNorm": lambda: by_row.rms_norm(wide, weight, 1e-5).sum().backward(),
        "rows: RMSNorm of heads": lambda: by_row.rms_norm(of_head, head_weight, 1e-5).sum().backward(),
        "rows: rotation": lambda: by_row.rotate(heads, *torch.zeros(2, TOKENS // 2, 64)),
        "rows: interleaved rotation": lambda: by_row.rotate(narrow, *torch.zeros(2, TOKENS // 2, 32), True),
        "rows: cross entropy": lambda: by_row.cross_entropy_(bf16(TOKENS, 50304), sizes_E.repeat(2), gradient=True),
    }

    def route(experts: int, choice: router.Choice, bias_E: Tensor | None = None) -> None:
        routed = router.choose_experts(torch.zeros(TOKENS, experts).requires_grad_(), bias_E, choice)
        (routed.weights_TK.sum() + routed.probs_GE.sum() + routed.z_loss_G.sum()).backward()

    of_logits = {
        "router: softmax": lambda: route(EXPERTS, router.Choice(TOP_K, True, True, 1.0, 2)),
        "router: sigmoid with a bias": lambda: route(256, router.Choice(TOP_K, False, True, 2.5, 2), torch.zeros(256)),
        "router: groups": lambda: route(256, router.Choice(TOP_K, False, True, 2.5, 2, 8, 4, 2), torch.zeros(256)),
        "router: groups of 20": lambda: route(160, router.Choice(6, True, False, 16.0, 1, 8, 3, 1)),
        "router: parts of the weight": lambda: stack_parts_triton(torch.zeros(EXPERTS, WIDTH), 5, dim=0),
        "router: parts of gradients": lambda: stack_parts_triton(torch.zeros(TOKENS, EXPERTS), 4, dim=1),
        "router: logits": lambda: multiply_gate(x, bf16(3 * EXPERTS, WIDTH)),
        "router: logits of 40 experts": lambda: multiply_gate(bf16(TOKENS, 1000), bf16(3 * 40, 1000)),
        "router: tokens' gradients": lambda: multiply_and_add(
            bf16(TOKENS, 4 * EXPERTS)[:, EXPERTS:], bf16(3 * EXPERTS, WIDTH), x
        ),
        "router: tokens' gradients of odd widths": lambda: multiply_and_add(
            bf16(TOKENS, 4 * 40)[:, 40:], bf16(3 * 40, 1000), bf16(TOKENS, 1000)
        ),
        "router: 500 experts": lambda: route(500, router.Choice(22, False, True, 2.5, 1), torch.zeros(500)),
        "router: 1000 experts": lambda: route(1000, router.Choice(8, True, False, 1.0, 1)),
    }
    moments = torch.zeros(2, 2**16, dtype=torch.bfloat16)
    constants = adamw_kernel.Update(1e-2, 0.9, 0.95, 1e-8, 0.1)
    adamw = {
        f"AdamW, {name}": lambda counter=counter: adamw_kernel.update_(
            torch.zeros(2**16), torch.zeros(2**16), *moments, constants, 0, counter
        )
        for name, counter in (("to the nearest", None), ("stochastic", 2**32 - 1))
    }
    power, scaling = Scaling.POWER_OF_TWO, "power-of-two scales"
    of_rows = {
        f"quantize {format.name} rows, {scaling}": lambda f=format: quantize.quantize_triton(x, Tile.ROW, f, power)
        for format in Format
    }
    retiled = {
        f"retile {format.name}": lambda f=format: quantize.retile_triton(tiles(rows, WIDTH, f), sizes_E, power)
        for format in Format
    }
    ids_S = torch.zeros(rows, dtype=torch.int64)

    def of_experts(width: int, hidden: int, name: str = "") -> dict[str, Callable[[], Any]]:
        x, hidden_NF, gate_up = bf16(TOKENS, width), bf16(rows, hidden), bf16(rows, 2 * hidden)
        gate, down = bf16(EXPERTS, hidden, width), bf16(EXPERTS, width, hidden)
        gather = token_of_row, weights
        found = {
            "up and SwiGLU": lambda: fused.multiply_up(x, *gather, gate, gate, place),
            "down": lambda: fused.multiply_down(hidden_NF, down, place),
            "down's and SwiGLU's gradients": lambda: fused.multiply_down_backward(x, *gather, down, gate_up, place),
            "tokens' gradients": lambda: fused.multiply_up_backward(gate_up, gate, gate, place),
            "gradients of gate and up": lambda: fused.multiply_transposed(
                gate_up, x, token_of_row, ends_E, 2, gather_left=False
            ),
            "gradients of down": lambda: fused.multiply_transposed(
                x, hidden_NF, token_of_row, ends_E, 1, gather_left=True
            ),
        }
        return {f"experts{name}: {kernel}": launch for kernel, launch in found.items()}

    return {
        "order: all slots": lambda: order_slots(ids_S, EXPERTS, TOP_K, None, rows),
        "order: kept slots, 500 experts": lambda: order_slots(ids_S, 500, TOP_K, ids_S < 0, rows),
        "experts: place tiles": lambda: fused.place_tiles(sizes_E, rows, 128),
        **of_experts(WIDTH, HIDDEN),
        **of_experts(1000, 200, " of odd widths"),
        "experts: sum": lambda: fused.sum_rows(bf16(rows, WIDTH), order),
        "experts: weighted sum": lambda: fused.sum_rows(bf16(rows, WIDTH), order, weights),
        **({} if missing() else blocks_of_stk),
        **by_rows,
        **of_logits,
        **adamw,
        "FP8 fprop": lambda: gemm.multiply_triton(tiles(rows, WIDTH), blocks(HIDDEN, WIDTH), sizes_E, torch.bfloat16),
        "FP8 dgrad": lambda: gemm.multiply_triton(tiles(rows, HIDDEN), blocks(WIDTH, HIDDEN), sizes_E, torch.bfloat16),
        "FP8 wgrad": lambda: gemm.wgrad_triton(columns(HIDDEN), columns(WIDTH), torch.float32),
        **of_rows,
        f"quantize blocks, {scaling}": lambda: quantize.quantize_triton(gate, Tile.BLOCK, Format.E4M3, power),
        f"quantize columns, {scaling}": lambda: quantize.quantize_columns_triton(bf16(rows, WIDTH), sizes_E, power),
        f"quantize blocks transposed, {scaling}": lambda: quantize.quantize_transposed_triton(gate, power),
        **retiled,
        "quantize SwiGLU": lambda: swiglu.swiglu_forward_triton(hidden, hidden, weights, True),
        "quantize SwiGLU's gradients": lambda: swiglu.swiglu_backward_triton(
            hidden, (tiles(rows, HIDDEN), tiles(rows, HIDDEN)), weights, sizes_E
        ),
        "dequantize E5M6": lambda: quantize.dequantize_triton(tiles(rows, WIDTH, Format.E5M6), torch.bfloat16),
    }


def compile_all(capability: int, configs: int, beginning: str | tuple[str, ...] = "") -> dict[str, Found]:
    """Inspect every kernel whose name begins so, or in one of these ways.

    All configurations of a kernel but the first have a number behind the name. A process compiles for one capability:
    Triton keeps what it has compiled, whatever its driver says then.
    """
    found: dict[str, Found] = {}
    for name, launch in launches().items():
        if not name.startswith(beginning):
            continue
        with only_compiling(capability, configs) as compiled:
            launch()
        for number, (_, kernel) in enumerate(compiled):
            facts = inspect(kernel)
            if not name.startswith(QUANTIZERS):
                facts.pop("instructions")
            found[name if number == 0 else f"{name} ({number + 1})"] = facts
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile all Triton kernels for a GPU that is not there.")
    parser.add_argument(
        "--capability", type=int, default=90, help="80 for Ampere, 90 for Hopper (the default), 100 for Blackwell"
    )
    parser.add_argument("--configs", type=int, default=2, help="of each autotuned kernel, from its first (default 2)")
    parser.add_argument("--update", action="store_true", help=f"write it to {GOLDEN.name}")
    args = parser.parse_args(argv)
    import triton

    beginning = "" if args.capability >= 90 else "blocks"  # the others are for Hopper and newer GPUs
    kernels = compile_all(args.capability, args.configs, beginning)
    found = {f"triton {triton.__version__}, sm_{args.capability}": kernels}
    if args.update:
        found = (json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}) | found
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
