"""Scaled dot-product attention by each of torch's kernels, causal, for the heads of three models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.figures import Figures, Part
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import tflops, timed


class Heads(NamedTuple):
    """Sizes of an attention: sequences, heads of queries and of keys, tokens, and widths of keys and of values."""

    batch: int
    queries: int
    keys: int
    tokens: int
    key_width: int
    value_width: int

    @property
    def operations(self) -> float:
        """Of a causal forward pass."""
        widths = self.key_width + self.value_width
        return self.batch * self.queries * self.tokens**2 * widths


MODELS = {
    "olmoe": Heads(4, 16, 16, 4096, 128, 128),
    "gqa": Heads(4, 32, 8, 4096, 128, 128),
    "mla": Heads(4, 16, 16, 4096, 192, 128),
}
TINY = {"gqa": Heads(1, 4, 2, 64, 16, 16), "mla": Heads(1, 2, 2, 64, 24, 16)}
BACKENDS = (None, "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
"""What torch chooses, then each by name."""


def run(figures: Figures, options: Options) -> None:
    """Every model's heads with every kernel."""
    for name, heads in (TINY if options.tiny else MODELS).items():
        for backend in BACKENDS if options.device == "cuda" else BACKENDS[:1]:
            figures.run(f"{name}, {backend or 'default'}", measure, heads, backend, options)


def measure(part: Part, heads: Heads, backend: str | None, options: Options) -> None:
    """Forward and backward; backward is counted as 2.5 times a forward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    widths = ((heads.queries, heads.key_width), (heads.keys, heads.key_width), (heads.keys, heads.value_width))
    dtype = torch.bfloat16

    def random(number: int, width: int) -> Tensor:
        x = torch.randn(heads.batch, heads.tokens, number, width, device=options.device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = (random(number, width) for number, width in widths)

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.queries != heads.keys)

    chosen: Any = nullcontext() if backend is None else sdpa_kernel(SDPBackend[backend])
    with chosen:
        out = attend()
        grad = torch.randn_like(out)
        part.put(node=out.grad_fn.name() if out.grad_fn else None)
        ahead = timed(attend, options.device)
        whole = timed(lambda: torch.autograd.grad(attend(), (q, k, v), grad), options.device)
    backward_ms = max(whole["ms"] - ahead["ms"], 1e-6)
    part.put(
        tflops_forward=tflops(heads.operations, ahead["ms"]),
        tflops_backward=tflops(2.5 * heads.operations, backward_ms),
        forward=ahead,
        both=whole,
    )
