"""Stages of a backward pass, from which the memory of activations follows.

A stage is an operation's backward pass, or that of a few together. All figures are bytes a token, with ``c`` the bytes
of the compute dtype. Stages are listed in the order in which they run; what a stage frees was kept by the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

EXPERTS, FFN, ATTENTION = "experts", "ffn", "attention"
"""Groups of a block's weights: routed experts; router, shared experts and dense FFN; attention."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        saved: Bytes kept from the forward pass until this stage has run.
        held: Further bytes that exist in it: gradients that come in and go out, and what it computes with.
        kept: Bytes of results of products, attention and exchanges, which ``selective`` keeps from the forward pass.
        weights: Group of the weights whose gradients it computes; empty if there are none.
        share: Share of the group's elements that these are.
    """

    saved: float = 0.0
    held: float = 0.0
    kept: float = 0.0
    weights: str = ""
    share: float = 0.0


def beside(stages: Iterable[Stage], held: float) -> list[Stage]:
    """Hold further bytes in each of these stages."""
    return [replace(stage, held=stage.held + held) for stage in stages]


def norm(width: int, c: int) -> Stage:
    """Norm of ``width`` elements; what is narrower than fp32 is computed in four tensors of fp32."""
    wide = 0 if c == 4 else 4 * 4 * width
    return Stage(saved=c * width, held=2 * c * width + wide)


def swiglu(width: int, c: int, weighted: bool, plain: bool) -> Stage:
    """SwiGLU of ``width`` elements; others than the plain one are computed in fp32."""
    held = (5 if weighted else 4) * c * width
    if not plain:
        held = c * width + (0 if c == 4 else 4 * width) + 7 * 4 * width
    return Stage(saved=2 * c * width + (4 if weighted else 0), held=held)
