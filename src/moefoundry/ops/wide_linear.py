"""Product in fp32 of operands that may be narrower, for the router's gate (float64 operands: in float64).

A GPU multiplies fp32 without tensor cores, which would take a tenth of the layer's time. For bfloat16 tokens the weight
is therefore split into three bfloat16 parts that add up to its 24 bits, and multiplied on the tensor cores, which sum
in fp32. The backward pass does the same: three parts of the gradient for the weight's gradient, two parts for the
tokens' gradient, which is rounded to bfloat16 in the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.kernel_choice import kernels_run


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``x @ weight.T``, [T, E], in fp32 or wider, and give ``x`` for what comes behind.

    ``x`` is kept for backward in its own dtype. Where kernels run, the second result is a view of ``x``: the gradient
    that it has from all that comes behind is added by the product of this function's, and needs no pass of its own.
    """
    return or_as_it_came(_WideLinear.apply(x_TD, weight_ED), x_TD)


def or_as_it_came(results: tuple[Tensor, ...], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Complete the results of a function that ends with :func:`multiply_and_return`."""
    logits_TE, *again = results
    return logits_TE, again[0] if again else x_TD


def widened(x: Tensor) -> Tensor:
    """Cast ``x`` to fp32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parts_of(x: Tensor, number: int) -> list[Tensor]:
    """Split fp32 into bfloat16 parts, largest first; each adds 8 bits to the sum."""
    parts = []
    for _ in range(number):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


def stack_parts(x: Tensor, number: int, dim: int) -> Tensor:
    """Concatenate bfloat16 parts of an fp32 matrix: the first ``number``, 3 to 5, of rest, low, high, high, low.

    Compiled code has an operator for it: a compiler that left out the rounding would find all but the first to be zero.
    """
    return PARTS(x, number, dim) if torch.compiler.is_compiling() else _stack_parts(x, number, dim)


def _stack_parts(x: Tensor, number: int, dim: int) -> Tensor:
    if kernels_run(x.device):
        from moefoundry.ops.split_kernel import stack_parts_triton

        return stack_parts_triton(x, number, dim)
    high, low, rest = parts_of(x, 3)
    return torch.cat([rest, low, high, high, low][:number], dim)


PARTS = torch.library.custom_op("moefoundry::stack_parts", _stack_parts, mutates_args=())


@PARTS.register_fake
def _(x: Tensor, number: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= number
    return x.new_empty(shape, dtype=torch.bfloat16)


def multiply_parts(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply bfloat16 [M, K] x [K, N], on tensor cores if there are any, which sum in fp32."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a.float(), b.float()).to(dtype)


def multiply(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` in fp32 or wider."""
    if _by_parts(x_TD, weight_ED):
        return PRODUCT(x_TD, weight_ED)
    wide_TD = widened(x_TD)
    return F.linear(wide_TD, weight_ED.to(wide_TD.dtype))


def multiply_and_return(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
    """Multiply in a function's forward pass, and give ``x`` as a second result, where :func:`adds` and it trains."""
    logits_TE = multiply(x_TD, weight_ED)
    if ctx.needs_input_grad[0] and adds(x_TD, weight_ED):
        return logits_TE, x_TD.view_as(x_TD)
    return (logits_TE,)


def product_by_parts(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` in fp32 from bfloat16 ``x`` and fp32 ``weight``."""
    parts = stack_parts(weight_ED, 3, dim=0)
    if adds(x_TD, weight_ED):
        from moefoundry.ops.gate_kernels import multiply_gate

        return multiply_gate(x_TD, parts)
    return sum_of_thirds(multiply_parts(x_TD, parts.T), dim=1)


PRODUCT = torch.library.custom_op("moefoundry::product_by_parts", product_by_parts, mutates_args=())
PRODUCT_OP = torch.ops.moefoundry.product_by_parts.default
"""The product as one operator of torch, whose result selective activation checkpointing keeps."""


@PRODUCT.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(len(x_TD), len(weight_ED), dtype=torch.float32)


def gradients(
    grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, other_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``x`` and of ``weight`` in their dtypes.

    Bfloat16 ``x`` on a GPU has its own from 16 bits, and that of fp32 ``weight`` from 24 bits.

    Args:
        grad_TE: Gradient of the product.
        x_TD: Its first operand.
        weight_ED: Its second.
        other_TD: Another gradient of ``x`` to add, where :func:`adds`.
    """
    if not _by_parts(x_TD, weight_ED):
        grad_x_TD, grad_weight_ED = grad_TE @ weight_ED.to(grad_TE.dtype), grad_TE.T @ widened(x_TD)
        return grad_x_TD.to(x_TD.dtype), grad_weight_ED.to(weight_ED.dtype)
    num_experts = len(weight_ED)
    grads = stack_parts(grad_TE, 4, dim=1)
    weights = stack_parts(weight_ED, 5, dim=0)[2 * num_experts :]  # high, high, low; to be multiplied by
    low_high_high = grads[:, num_experts:]
    grad_weight_ED = sum_of_thirds(multiply_parts(grads[:, : 3 * num_experts].T, x_TD), dim=0)
    if other_TD is None:
        return multiply_parts(low_high_high, weights, torch.bfloat16), grad_weight_ED
    from moefoundry.ops.gate_kernels import multiply_and_add

    return multiply_and_add(low_high_high, weights, other_TD.contiguous()), grad_weight_ED


def adds(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Tell whether a kernel computes the product, and its gradient, and adds another gradient of ``x`` to that."""
    if not (_by_parts(x_TD, weight_ED) and kernels_run(x_TD.device)):
        return False
    from moefoundry.ops.gate_kernels import fits

    return fits(x_TD, weight_ED)


def sum_of_thirds(x: Tensor, dim: int) -> Tensor:
    """Add the three equal parts of a dimension, the smallest first, which comes first."""
    rest, low, high = x.chunk(3, dim)
    return rest + low + high


def _by_parts(x_TD: Tensor, weight_ED: Tensor) -> bool:
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32


class _WideLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, weight_ED)
        return multiply_and_return(ctx, x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor, other_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        return gradients(grad_TE, x_TD, weight_ED, other_TD)
