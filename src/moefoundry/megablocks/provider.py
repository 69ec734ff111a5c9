"""Make the package ``megablocks`` import and run where its extensions are absent."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
import triton

from moefoundry.megablocks import extension, grouped_gemm, on_cpu
from moefoundry.ops.block_sparse import kernels

MEGABLOCKS_VERSION = "0.10.0"
INSTALL = (
    "TORCH_CUDA_ARCH_LIST=9.0 pip install --no-deps --no-build-isolation --config-settings=--global-option=build_py "
    f"--config-settings=--build-option=--skip-build megablocks=={MEGABLOCKS_VERSION} "
    f"stanford-stk=={kernels.STK_VERSION}"
)
"""Installs both packages without building MegaBlocks' extension: its setup asks a GPU for its capability where nvcc is
found, unless the variable is set, and the extension does not compile with CUDA 13."""


@cache
def provide() -> None:
    """Make ``import megablocks`` work, with what its package lacks here.

    Extensions that are installed and can be imported stay in use. In place of those that cannot: ``megablocks_ops`` and
    ``grouped_gemm`` on torch. stk's kernels get indices that do not overflow, so ``mlp_impl: sparse`` is allowed with
    every Triton. ``Arguments.device`` is the CPU where there is no GPU, and kernels of MegaBlocks and stk have plain
    functions in their place for tensors on the CPU. Calling it again does nothing.

    Raises:
        ImportError: A package is missing, or of another version.
    """
    check_versions()
    _unless_installed("megablocks_ops", {"megablocks_ops": extension})
    _unless_installed("grouped_gemm", _grouped_gemm())
    stk = importlib.import_module("stk.backend.triton_kernels")
    for name in ("sdd", "dsd", "dds"):
        setattr(stk, name, getattr(kernels.widened(), name))
    on_cpu.stand_in(stk, on_cpu.OF_STK)
    groups: Any = importlib.import_module("megablocks.grouped_gemm_util")
    if groups.backend is None:  # imported when there was no grouped_gemm yet
        groups.backend, groups.ops = sys.modules["grouped_gemm"].backend, sys.modules["grouped_gemm"].ops
        groups._grouped_gemm_is_available = True
    of_megablocks = importlib.import_module("megablocks.backend.kernels")
    on_cpu.stand_in(of_megablocks, on_cpu.OF_MEGABLOCKS)
    if triton.knobs.runtime.interpret:
        _keep_first_config(of_megablocks)
    _change_arguments(importlib.import_module("megablocks.layers.arguments").Arguments)


def check_versions() -> None:
    """Make sure that MegaBlocks and stk are installed in the versions that are known.

    Raises:
        ImportError: One is not.
    """
    try:
        found = version("megablocks")
    except PackageNotFoundError:
        raise ImportError(f"megablocks is not installed: {INSTALL}", name="megablocks") from None
    if found != MEGABLOCKS_VERSION:
        raise ImportError(f"megablocks {found} is installed, and only {MEGABLOCKS_VERSION} is known: {INSTALL}")
    if found := kernels.missing():
        raise ImportError(found, name="stk")


def _unless_installed(name: str, modules: dict[str, ModuleType]) -> None:
    """Put ``modules`` where they are imported from, unless ``name`` can be imported already."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == name):
            warnings.warn(f"{name} is installed and cannot be imported ({error}): torch is used", stacklevel=3)
        sys.modules.update(modules)


def _grouped_gemm() -> dict[str, ModuleType]:
    package, backend, ops = (ModuleType(f"grouped_gemm{part}") for part in ("", ".backend", ".ops"))
    vars(backend).update(gmm=grouped_gemm.multiply)
    vars(ops).update(gmm=grouped_gemm.multiply_with_gradient)
    vars(package).update(backend=backend, ops=ops)
    return {module.__name__: module for module in (package, backend, ops)}


def _keep_first_config(of_megablocks: ModuleType) -> None:
    """Leave one configuration of each kernel: Triton's interpreter cannot time several."""
    for kernel in vars(of_megablocks).values():
        if isinstance(kernel, triton.runtime.Autotuner):
            kernel.configs = kernel.configs[:1]


def _change_arguments(arguments: Any) -> None:
    """Give ``Arguments`` a default device that there is, and let it take ``mlp_impl: sparse``."""
    init, check = arguments.__init__, arguments.__post_init__

    @functools.wraps(init)
    def init_anywhere(self: Any, *args: Any, **options: Any) -> None:
        position = list(arguments.__dataclass_fields__).index("device")
        if len(args) <= position and not torch.cuda.is_available():
            options.setdefault("device", torch.device("cpu"))
        init(self, *args, **options)

    @functools.wraps(check)
    def check_the_rest(self: Any) -> None:
        # It refuses `sparse` by comparing Triton's version as text; what was wrong there is cured.
        chosen, self.mlp_impl = self.mlp_impl, "grouped" if self.mlp_impl == "sparse" else self.mlp_impl
        try:
            check(self)
        finally:
            self.mlp_impl = chosen

    arguments.__init__, arguments.__post_init__ = init_anywhere, check_the_rest
