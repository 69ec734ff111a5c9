"""Triton kernels of ``stanford-stk`` 0.7.1, with indices that do not overflow.

stk multiplies int16 block indices by the block size. Triton 3.2 stopped promoting ``int16 * constexpr``, so that row
256 of 128-row blocks became row -256. Here every index that is multiplied is an int64. Products of fp32 operands are
those of IEEE, where Triton's default on a GPU is TF32. stk's source is read where it is installed and rewritten, so
that none of it is copied here and stk itself stays as it is.
"""

from __future__ import annotations

import importlib.util
import linecache
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

STK_VERSION = "0.7.1"
INSTALL = f"pip install --no-deps stanford-stk=={STK_VERSION}"
BLOCK = 128
"""Rows and columns of a block."""

_SWIZZLE = "pid_n, pid_m = tl.swizzle2d(pid_n, pid_m, num_pid_n, num_pid_m, GROUP_M)\n"
_REWRITES = {
    "tl.load(row_indices + pid)": "tl.load(row_indices + pid).to(tl.int64)",
    "tl.load(column_indices + pid)": "tl.load(column_indices + pid).to(tl.int64)",
    "pid * BLOCK_ELEMENTS": "pid.to(tl.int64) * BLOCK_ELEMENTS",
    _SWIZZLE: _SWIZZLE + "    pid_n, pid_m = pid_n.to(tl.int64), pid_m.to(tl.int64)\n",
    "tl.load(column_indices + start_inx + block_inx)": "tl.load(column_indices + start_inx + block_inx).to(tl.int64)",
    "tl.load(block_offsets_t + start_inx + block_inx)": "tl.load(block_offsets_t + start_inx + block_inx).to(tl.int64)",
    "(start_inx + block_inx) * BLOCK_ELEMENTS": "(start_inx + block_inx).to(tl.int64) * BLOCK_ELEMENTS",
    "tl.dot(a, b)": 'tl.dot(a, b, input_precision="ieee")',
}


def missing() -> str:
    """Say why there are no kernels, and what to install; empty if there are."""
    try:
        found = version("stanford-stk")
    except PackageNotFoundError:
        return f"stanford-stk is not installed: {INSTALL}"
    if found != STK_VERSION:
        return f"stanford-stk {found} is installed, and only {STK_VERSION} is known to be right: {INSTALL}"
    return ""


@cache
def widened() -> ModuleType:
    """Make a module like ``stk.backend.triton_kernels``, with ``sdd``, ``dsd`` and ``dds`` of any size.

    Raises:
        ImportError: stk is missing, of another version, or not what that version is.
    """
    if found := missing():
        raise ImportError(found)
    spec = importlib.util.find_spec("stk")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"stanford-stk {STK_VERSION} has no package stk: {INSTALL} --force-reinstall")
    path = Path(spec.submodule_search_locations[0], "backend", "triton_kernels.py")
    source = path.read_text()
    for old, new in _REWRITES.items():
        if old not in source:
            raise ImportError(f"{path} is not that of stanford-stk {STK_VERSION}: {INSTALL} --force-reinstall")
        source = source.replace(old, new)
    name = f"<{path}, widened>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # Triton reads sources by inspect
    module = ModuleType(f"{__package__}.stk_kernels")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(source, name, "exec"), module.__dict__)
    return module
