"""Machine code of a compiled kernel: what its main loop does in one step, and what comes before and after it.

Read from ``cuobjdump -sass``. The main loop is the innermost one with tensor-core instructions. Everything is counted
once, whatever branches are taken; so are both sides of a branch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHARED_BYTES_A_CYCLE = 128
"""Bytes that a multiprocessor reads or writes."""
CLASSES = {
    "tensor": ("HGMMA", "QGMMA", "HMMA"),
    "copies": ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "global": ("LDG", "STG", "RED", "ATOMG"),
    "conversions": ("F2FP", "F2F", "I2F", "F2I", "I2FP"),
    "fp32": ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "MUFU"),
}
"""Instructions by class, by their first names; the rest is ``integer and control``."""
STORES = ("STG", "STS", "STSM", "LDGSTS", "BRA", "EXIT")
"""Instructions whose first register is read."""
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"\b(R\d+)\b")


class Instruction(NamedTuple):
    """One line of machine code.

    Attributes:
        address: Bytes from the kernel's beginning.
        predicate: Register that it depends on, or an empty text.
        name: With its modifiers.
        operands: As written, destination first.
    """

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes_a_thread(self) -> int:
        """Width of a load or store."""
        found = re.search(r"\.(16|64|128|U8|S8|U16|S16)\b", self.name)
        width = found.group(1).lstrip("US") if found else "32"
        if self.base in ("LDSM", "STSM"):
            return 4 * int(self.name[-1]) if self.name[-1].isdigit() else 4  # a matrix has 128 bytes
        return int(width) // 8

    @property
    def columns(self) -> int:
        """N of a 64 x N x 16 product."""
        return int(self.name.split("x")[1])


class Phase(NamedTuple):
    """Code of a part of a kernel, as one warp executes it.

    Attributes:
        classes: Instructions by class.
        columns: N of each product of a warp group.
        operand_bytes: Shared memory that these products read.
        shared_bytes: Shared memory that the warp's own loads and stores, and its copies, move.
        stored_bytes: Global memory that the warp writes.
        load_gaps: For each time that it waits for loads from global memory, instructions since they were issued.
        barriers: Waits for the other warps.
        product_waits: Waits for all products that were begun.
    """

    classes: Counter[str]
    columns: tuple[int, ...]
    operand_bytes: int
    shared_bytes: int
    stored_bytes: int
    load_gaps: tuple[int, ...]
    barriers: int
    product_waits: int

    @property
    def instructions(self) -> int:
        return self.classes.total()


class Code(NamedTuple):
    """A compiled kernel.

    Attributes:
        warps: Of a program.
        registers: Of a thread.
        shared: Bytes of a program.
        before, step, after: What a warp executes before the main loop, in one round of it, and then. Without a main
            loop everything is ``before``.
        between: What it executes between two tiles, in a loop that goes through the steps of all tiles of a program:
            the parts of the loop that branches skip. None where a program has one tile.
    """

    warps: int
    registers: int
    shared: int
    before: Phase
    step: Phase | None
    after: Phase | None
    between: Phase | None = None


def read_code(kernel: Any, any_loop: bool = False) -> Code:
    """Disassemble a kernel that Triton has compiled; see :func:`split`."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return split(parse(text), kernel.metadata.num_warps, int(registers.group(1)), kernel.metadata.shared, any_loop)


def parse(text: str) -> list[Instruction]:
    """Read the instructions of a disassembly up to the kernel's end."""
    found = [_LINE.match(line) for line in text.splitlines()]
    code = [Instruction(int(line[1], 16), line[2] or "", line[3], line[4]) for line in found if line]
    return [line for line in code if line.base != "NOP"]


def split(code: Sequence[Instruction], warps: int, registers: int, shared: int, any_loop: bool = False) -> Code:
    """Cut a kernel at its main loop: the innermost one with products, or with ``any_loop`` the innermost one."""
    loops = [
        (target, line.address)
        for line in code
        if line.base == "BRA" and (target := branch_target(line)) is not None and target < line.address
    ]
    products = [line.address for line in code if line.base == "HGMMA"]
    ends = [line.address for line in code if line.base == "EXIT"]  # behind them, waits that go back into a loop
    loops = [loop for loop in loops if not holds(loop, ends) and (any_loop or holds(loop, products))]
    if not loops:
        return Code(warps, registers, shared, phase(code), None, None)
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    step = [line for line in code if first <= line.address <= last]
    skipped = [line for line in step if any(start < line.address < end for start, end in skips(step))]
    once = {line.address for line in skipped}
    return Code(
        warps,
        registers,
        shared,
        phase([line for line in code if line.address < first]),
        phase([line for line in step if line.address not in once]),
        phase([line for line in code if line.address > last]),
        phase(skipped) if any(line.base in ("STG", "UTMASTG") for line in skipped) else None,
    )


def holds(loop: tuple[int, int], addresses: Iterable[int]) -> bool:
    """Tell whether one of the addresses is in a loop."""
    return any(loop[0] <= address <= loop[1] for address in addresses)


def skips(step: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Give the beginning and end of the parts of a loop that a branch skips."""
    branches = [(line.address, branch_target(line)) for line in step if line.base == "BRA"]
    return [(start, end) for start, end in branches if end is not None and start < end <= step[-1].address]


def branch_target(line: Instruction) -> int | None:
    """Give the address that a branch goes to."""
    found = re.search(r"0x([0-9a-f]+)\s*$", line.operands)
    return int(found.group(1), 16) if found else None


def phase(code: Sequence[Instruction]) -> Phase:
    """Count what a warp executes."""
    products = [line for line in code if line.base == "HGMMA"]
    return Phase(
        classes=Counter(class_of(line) for line in code),
        columns=tuple(line.columns for line in products),
        operand_bytes=sum(32 * line.columns + (0 if has_registers(line) else 32 * 64) for line in products),
        shared_bytes=sum(
            32 * line.bytes_a_thread for line in code if line.base in CLASSES["shared"] and line.operands != "RZ, [RZ]"
        ),
        stored_bytes=sum(32 * line.bytes_a_thread for line in code if line.base == "STG"),
        load_gaps=gaps_of_loads(code),
        barriers=sum(line.name.startswith("BAR.SYNC") for line in code),
        product_waits=sum(line.name == "WARPGROUP.DEPBAR.LE" and line.operands.endswith(" 0x0") for line in code),
    )


def class_of(line: Instruction) -> str:
    """Name the class of an instruction."""
    return next((name for name, bases in CLASSES.items() if line.base in bases), "integer and control")


def has_registers(product: Instruction) -> bool:
    """True if the left operand of a product is in registers."""
    return "gdesc" not in product.operands.split(",")[1]


def gaps_of_loads(code: Iterable[Instruction]) -> tuple[int, ...]:
    """Count the instructions between global loads and the first use of one, for loads that are under way at a time."""
    loaded: set[str] = set()
    gaps: list[int] = []
    since = 0
    for line in code:
        names = _REGISTER.findall(line.operands)
        if loaded.intersection(names if line.base in STORES else names[1:]):
            gaps.append(since)
            loaded = set()
        since += 1
        if line.base == "LDG":
            first = int(names[0][1:])
            loaded |= {f"R{number}" for number in range(first, first + -(-line.bytes_a_thread // 4))}
            since = 0
    return tuple(gaps)
