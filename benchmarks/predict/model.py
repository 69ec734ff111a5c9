"""Time of a kernel from what its machine code does, for one GPU.

A multiprocessor computes a tile, of rows and columns of the result, in one program. The main loop of a program takes
steps. A step cannot be faster than any pipe: tensor cores, shared memory, issue of instructions, copies from the L2
cache; nor than the copies' latency, divided among the steps that they are issued ahead. Programs of one multiprocessor
share its pipes and hide each other's latencies. Programs go to multiprocessors in their order, each to the first that
is free. The whole cannot be faster than its bytes of HBM.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.predict.machine_code import SHARED_BYTES_A_CYCLE, Code, Phase

SMS = 132
TENSOR_OPERATIONS = 4096
"""BF16 operations of a multiprocessor in a cycle: 64 x N x 16 takes N / 2 cycles."""
SCHEDULERS = 4
"""Each issues an instruction of a warp in a cycle."""
REGISTERS, SHARED, MAX_PROGRAMS = 65536, 227 * 1024, 32
"""Resources of a multiprocessor."""
SHARED_OVERHEAD = 1024
"""Bytes of shared memory that each program takes besides."""
STORE_BYTES_A_CYCLE = 64
"""From a multiprocessor to the L2 cache."""
WAIT_CYCLES = 60
"""From the end of a product to the next instruction that waited for it; also of a barrier."""
WAVES = 16 * SMS / 2048
"""Waves that 8192 x 8192 in tiles of 128 x 256 takes, over those it would take were tiles divisible."""


class Chip(NamedTuple):
    """A GPU under load.

    Attributes:
        clock: Hz while tensor cores are busy: the clock at which the vendor's library would reach its measured rate
            with never a pause but the last, half-empty wave.
        hbm: Bytes a second.
        ingress: Bytes a second from the L2 cache to one multiprocessor.
        latency: Seconds of a load from HBM under load.
        l2_latency: Seconds of a load from the L2 cache: tables of tiles and of rows.
        launch: Seconds from the end of a program to the first instruction of the next in its place.
        kernel: Least seconds of a kernel, with the gap to the next.
    """

    clock: float
    hbm: float = 2.6e12
    ingress: float = 8.2e12 / SMS
    latency: float = 0.69e-6
    l2_latency: float = 0.3e-6
    launch: float = 0.3e-6
    kernel: float = 2e-6


def chip_of(library_tflops: float) -> Chip:
    """Describe the H100 on which the vendor's library multiplies 8192 x 8192 x K at this rate, for a large K."""
    return Chip(clock=library_tflops * 1e12 * WAVES / (SMS * TENSOR_OPERATIONS))


class Tile(NamedTuple):
    """Programs that do the same.

    Attributes:
        count: How many, one after the other in the grid.
        steps: Rounds of the main loop.
    """

    count: int
    steps: int


class Work(NamedTuple):
    """Task of a kernel.

    Attributes:
        tiles: In the order of the grid.
        step_bytes: Operands of a step.
        hbm_bytes: Read and written in all.
        operations: Multiplications and additions of the products, without padding.
        store_bytes: Of a tile's result that waits in shared memory of its own for a copy by TMA.
        shares: Programs after each other on a multiprocessor, of a kernel whose programs take many tiles.
    """

    tiles: list[Tile]
    step_bytes: int
    hbm_bytes: int
    operations: int
    store_bytes: int = 0
    shares: int = 1


class Prediction(NamedTuple):
    """Seconds of a kernel, and what they come from.

    Attributes:
        seconds: Predicted.
        programs: That share a multiprocessor.
        limits: Seconds by each limit alone.
    """

    seconds: float
    programs: int
    limits: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])


def programs_of(code: Code) -> int:
    """Count the programs that fit on a multiprocessor."""
    per_warp = -(-code.registers // 8) * 8 * 32
    by_registers = REGISTERS // per_warp // code.warps
    by_shared = (SHARED + SHARED_OVERHEAD) // (code.shared + SHARED_OVERHEAD)
    return max(1, min(by_registers, by_shared, MAX_PROGRAMS, 64 // code.warps))


def issue(part: Phase, code: Code) -> float:
    """Cycles that the schedulers need to issue a part's instructions."""
    return part.instructions * code.warps / SCHEDULERS


def step_pipes(code: Code, step_bytes: int, chip: Chip) -> dict[str, float]:
    """Cycles of each pipe in a step of the main loop."""
    step = code.step
    assert step is not None
    groups = code.warps / 4
    moved = step.operand_bytes * groups + step.shared_bytes * code.warps + step_bytes
    return {
        "tensor cores": sum(step.columns) / 2 * groups,
        "shared memory": moved / SHARED_BYTES_A_CYCLE,
        "issue": issue(step, code),
        "L2": step_bytes / chip.ingress * chip.clock,
    }


def step_latency(code: Code, work: Work, chip: Chip) -> float:
    """Cycles of a step of a program that has its multiprocessor alone."""
    step = code.step
    assert step is not None
    pipes = step_pipes(code, work.step_bytes, chip)
    serial = sum(step.columns) / 2 + step.product_waits * WAIT_CYCLES if step.product_waits else 0.0
    if not work.step_bytes:  # nothing is copied ahead: a step waits for its own loads
        return max(*pipes.values(), serial) + chip.latency * chip.clock
    buffers = (code.shared - work.store_bytes) // work.step_bytes
    ahead = max(1, buffers - 1)
    return max(*pipes.values(), serial, (chip.latency * chip.clock + pipes["L2"]) / ahead)


def around_the_loop(code: Code, work: Work, chip: Chip) -> tuple[dict[str, float], float]:
    """Cycles of each pipe outside the steps of a tile, and those that a program alone takes for them."""
    parts = [code.between] if code.between else [part for part in (code.before, code.after) if part is not None]
    step_bytes = work.step_bytes if code.step else 0
    moved = (sum(part.shared_bytes for part in parts) * code.warps + work.store_bytes) / SHARED_BYTES_A_CYCLE
    stored = (sum(part.stored_bytes for part in parts) * code.warps + work.store_bytes) / STORE_BYTES_A_CYCLE
    pipes = {"issue": sum(issue(part, code) for part in parts), "shared memory": moved, "stores": stored}
    alone = max(0.0, stored - issue(parts[-1], code))
    for part in parts:
        latency = chip.latency if part is code.after else chip.l2_latency
        waits = (max(0.0, latency * chip.clock - gap * code.warps / SCHEDULERS) for gap in part.load_gaps)
        alone += issue(part, code) + part.barriers * WAIT_CYCLES + sum(waits)
    if not code.between:
        alone += chip.launch * chip.clock
        if step_bytes:  # the first operands
            alone += chip.latency * chip.clock + step_bytes / chip.ingress * chip.clock
    return pipes, alone


def predict(code: Code, work: Work, chip: Chip) -> Prediction:
    """Predict the time of a kernel."""
    programs = programs_of(code)
    around, alone = around_the_loop(code, work, chip)
    pipes: dict[str, float] = dict.fromkeys(("tensor cores", "shared memory", "issue", "L2", "stores"), 0.0)
    costs: list[tuple[int, float]] = []
    for tile in work.tiles:
        in_tile, latency = dict(around), alone
        if code.step is not None:
            for name, cycles in step_pipes(code, work.step_bytes, chip).items():
                in_tile[name] = in_tile.get(name, 0.0) + cycles * tile.steps
            latency += step_latency(code, work, chip) * tile.steps
        for name, cycles in in_tile.items():
            pipes[name] += cycles * tile.count
        costs.append((tile.count, max(latency, programs * max(in_tile.values()))))
    limits = {name: cycles / SMS / chip.clock for name, cycles in pipes.items()}
    limits["programs"] = schedule(costs, SMS * programs) / chip.clock
    if code.between:
        start = chip.launch + chip.latency + work.step_bytes / chip.ingress + issue(code.before, code) / chip.clock
        limits["programs"] += (work.shares - 1) * start
    limits["HBM"] = work.hbm_bytes / chip.hbm
    return Prediction(max(limits.values()) + chip.kernel, programs, limits)


def schedule(costs: Iterable[tuple[int, float]], places: int) -> float:
    """Give the end of the last program, each in the place that is free first.

    Args:
        costs: Programs of equal cost, and that cost, in their order.
        places: Programs that run at a time.
    """
    free = [0.0] * places
    for count, cost in costs:
        rounds, rest = divmod(count, places)
        if rounds and max(free) - min(free) <= cost:
            free = [time + rounds * cost for time in free]  # whole rounds keep the order
            count = rest
        heapq.heapify(free)
        for _ in range(count):
            heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)
