"""The checks of ``test_gate_kernels.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.tools.tensor_descriptor import TensorDescriptor

from moefoundry.config import MoEConfig
from moefoundry.moe.layer import MoELayer
from moefoundry.ops import gate_kernels
from moefoundry.ops.fp8 import Tile, dequantize, fp8_kept_linear, quantize, quantize_rows_once
from moefoundry.ops.wide_linear import stack_parts, wide_linear

SINGLE, HALF = 2**-21, 2**-8
"""Relative errors of fp32, with some roundings to spare, and of a bfloat16 value."""


def check_products(device: str, tokens: int, width: int, experts: int) -> None:
    """Logits have the weight's 24 bits; the sum of gradients is rounded once; nothing is written behind the results."""
    x_TD, weight_ED = random(device, tokens, width).bfloat16(), random(device, experts, width, seed=1)
    assert gate_kernels.fits(x_TD, weight_ED)
    with kernels_on():
        logits_TE = gate_kernels.multiply_gate(x_TD, stack_parts(weight_ED, 3, dim=0))
    assert logits_TE.dtype == torch.float32
    assert_close(logits_TE, x_TD.double() @ weight_ED.double().T, SINGLE)
    grads, parts, other_TD = (
        random(device, *shape, seed=2).bfloat16()
        for shape in ((tokens, 4 * experts), (3 * experts, width), (tokens, width))
    )
    with kernels_on():
        got = gate_kernels.multiply_and_add(grads[:, experts:], parts, other_TD)
    exact = other_TD.double() + grads[:, experts:].double() @ parts.double()
    assert got.dtype == torch.bfloat16
    rounding = HALF if got.is_cuda else 2 * HALF  # the interpreter cuts bits off
    torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=1e-5 * (3 * experts) ** 0.5)


def check_gradients(device: str, kept_in_fp8: bool) -> None:
    """The tokens' gradient is the product's and the one from behind; each alone, too."""
    product = fp8_kept_linear if kept_in_fp8 else wide_linear
    x_TD, weight_ED = random(device, 70, 256).bfloat16().requires_grad_(), random(device, 24, 256, seed=1)
    weight_ED.requires_grad_()
    grad_TE, grad_TD = random(device, 70, 24, seed=2), random(device, 70, 256, seed=3).bfloat16()
    with kernels_on():
        logits_TE, again_TD = product(x_TD, weight_ED)
        assert again_TD is not x_TD
        assert torch.equal(again_TD, x_TD)
        assert quantize_rows_once(again_TD) is quantize_rows_once(x_TD)
        for outputs, grads in (
            ((logits_TE, again_TD), (grad_TE, grad_TD)),
            ((logits_TE,), (grad_TE,)),
            ((again_TD,), (grad_TD,)),
            ((again_TD,), (grad_TD[:1].expand(70, 256),)),
        ):
            got_x, got_weight = torch.autograd.grad(outputs, (x_TD, weight_ED), grads, retain_graph=True)
            of_logits = grad_TE.double() if grads[0] is grad_TE else torch.zeros_like(grad_TE, dtype=torch.double)
            of_tokens = 0 if grads[-1] is grad_TE else grads[-1].double()
            seen_TD = dequantize(quantize(x_TD.detach(), Tile.ROW)) if kept_in_fp8 else x_TD
            assert_close(got_x, of_logits @ weight_ED.double() + of_tokens, HALF)
            assert_close(got_weight, of_logits.T @ seen_TD.double(), SINGLE)


def check_where_it_cannot(device: str) -> None:
    """Tokens come back as they were given: frozen, or of widths or memory that the kernels do not take."""
    with kernels_on():
        for tokens, weight in (
            (random(device, 8, 64).bfloat16(), random(device, 16, 64)),
            (random(device, 8, 64).bfloat16().requires_grad_(), random(device, 12, 64)),
            (random(device, 8, 68).bfloat16().requires_grad_(), random(device, 16, 68)),
            (random(device, 64, 8).bfloat16().requires_grad_().T, random(device, 16, 64)),
            (random(device, 513).bfloat16().requires_grad_()[1:].view(8, 64), random(device, 16, 64)),
            (random(device, 0, 64).bfloat16().requires_grad_(), random(device, 16, 64)),
        ):
            logits_TE, again_TD = wide_linear(tokens, weight.requires_grad_())
            assert again_TD is tokens
            assert_close(logits_TE, tokens.double() @ weight.double().T, SINGLE)
            logits_TE.sum().backward()


def check_layer(device: str, jitter: float) -> None:
    """A layer with shared experts gives what it gives by operators, gradients too; tokens' gradients are one sum."""
    cfg = MoEConfig(num_experts=16, top_k=2, expert_hidden_size=32, num_shared_experts=1)
    cfg.router.input_jitter = jitter
    torch.manual_seed(0)
    layer = MoELayer(64, cfg).to(device).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in (layer.experts, layer.shared_experts):
        assert module is not None
        module.to(torch.bfloat16)
    values = random(device, 2, 19, 64).bfloat16()
    grad_BSD = random(device, 2, 19, 64, seed=1).bfloat16()

    def run(again: bool = False) -> list[Tensor]:
        torch.manual_seed(3)
        x_BSD = values.clone().requires_grad_()
        layer.zero_grad(set_to_none=True)
        out_BSD, stats = checkpoint(layer, x_BSD, use_reentrant=False) if again else layer(x_BSD)
        torch.autograd.backward([out_BSD, stats.balance_loss + 0.1 * stats.z_loss], [grad_BSD, None])
        found = [out_BSD, x_BSD.grad, *(parameter.grad for parameter in layer.parameters())]
        return [each for each in found if each is not None]

    plain = run()
    with (
        kernels_on(),
        mock.patch.object(gate_kernels, "multiply_and_add", counted(gate_kernels.multiply_and_add)) as add,
    ):
        fused, computed_again = run(), run(again=True)
    assert add.calls == (0 if jitter else 2)  # type: ignore[attr-defined]
    assert len(plain) == len(fused) == 9
    for ours, theirs in zip(fused, plain, strict=True):
        assert_close(ours, theirs.double(), 2 * HALF)
    for ours, theirs in zip(computed_again, fused, strict=True):
        assert torch.equal(ours, theirs)


def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def count(*args: Tensor) -> Tensor:
        count.calls += 1  # type: ignore[attr-defined]
        return function(*args)

    count.calls = 0  # type: ignore[attr-defined]
    return count


@contextmanager
def kernels_on() -> Iterator[None]:
    """Use these kernels, and no others; without a GPU, too, in an interpreter whose descriptors hold no bfloat16."""

    def described(tensor: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor if tensor.is_cuda else tensor.float(), list(block))

    with ExitStack() as stack:
        stack.enter_context(mock.patch("moefoundry.ops.wide_linear.kernels_run", return_value=True))
        stack.enter_context(mock.patch("moefoundry.ops.wide_linear._by_parts", by_parts))
        stack.enter_context(mock.patch("moefoundry.ops.gate_kernels._described", described))
        yield


def by_parts(x_TD: Tensor, weight_ED: Tensor) -> bool:
    return x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32


def random(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_close(got: Tensor, exact: Tensor, error: float) -> None:
    assert (got.double() - exact).norm() <= error * exact.norm()
