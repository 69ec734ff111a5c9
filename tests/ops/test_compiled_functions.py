"""Functions with a backward pass of their own have the same gradients where a compiler traces them.

The compiler of torch 2.11 drops the gradient of a result that an operator gave back as it was, or wrote in place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from moefoundry.model.norm import LayerNorm, RMSNorm
from moefoundry.ops import rounding, wide_linear
from moefoundry.ops.attention_sinks import attend_with_sinks
from moefoundry.ops.expert_bias import add_bias
from moefoundry.ops.fp8.coarse import Granularity, coarse_linear
from moefoundry.ops.fp8.feed_forward import fp8_feed_forward
from moefoundry.ops.fp8.linear import fp8_kept_linear, fp8_linear
from moefoundry.ops.rounding import round_gradient, round_operand
from moefoundry.ops.swiglu import Activation, swiglu

ROWS, WIDTH = 8, 16
SQUARE = (ROWS, WIDTH), (WIDTH, WIDTH)
HEADS = (1, 2, ROWS, 4)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "swiglu": (swiglu, ((ROWS, WIDTH), (ROWS, WIDTH))),
    "swiglu with weights": (swiglu, ((ROWS, WIDTH), (ROWS, WIDTH), (ROWS,))),
    "clamped swiglu": (
        lambda gate, up: swiglu(gate, up, None, Activation(1.702, 0.5, 1.0)),
        ((ROWS, WIDTH), (ROWS, WIDTH)),
    ),
    "wide linear": (lambda *operands: wide_linear.wide_linear(*operands)[0], SQUARE),
    "FP8 linear": (lambda *operands: fp8_linear(*operands), SQUARE),
    "FP8 linear that keeps FP8": (lambda *operands: fp8_kept_linear(*operands)[0], SQUARE),
    "FP8 network": (
        lambda *operands: fp8_feed_forward(*operands),
        ((ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)),
    ),
    "tensorwise linear": (lambda x, weight: coarse_linear(x, weight, Granularity.TENSOR), SQUARE),
    "rowwise linear": (lambda x, weight: coarse_linear(x, weight, Granularity.ROW), SQUARE),
    "rounded operand": (lambda x: round_operand(x, torch.bfloat16), ((ROWS, WIDTH),)),
    "rounded gradient": (lambda x: round_gradient(x, torch.bfloat16), ((ROWS, WIDTH),)),
    "biases of experts": (lambda x, bias: add_bias(x, bias, torch.tensor([3, 5])), ((ROWS, WIDTH), (2, WIDTH))),
    "attention with sinks": (
        lambda *operands: attend_with_sinks(*operands, is_causal=True),
        (HEADS, HEADS, HEADS, (2,)),
    ),
}


def compare(function: Callable[..., Tensor], inputs: list[Tensor], backend: str = "eager") -> None:
    torch._dynamo.reset()
    eager, compiled = function(*inputs), torch.compile(function, backend=backend)(*inputs)
    incoming = torch.randn(eager.shape, generator=torch.Generator().manual_seed(1)).to(eager.dtype)
    grads, compiled_grads = (torch.autograd.grad(out, inputs, incoming) for out in (eager, compiled))
    rounding = 4 * torch.finfo(eager.dtype).eps
    for one, other in zip((eager, *grads), (compiled, *compiled_grads), strict=True):
        assert (one - other).norm() <= rounding * one.norm()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_without_a_compiler(case: str) -> None:
    function, shapes = CASES[case]
    draw = torch.Generator().manual_seed(0)
    compare(function, [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes])


@pytest.mark.parametrize("case", ["rounded operand", "rounded gradient", "wide linear"])
def test_a_compiler_leaves_no_rounding_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compiler does so for two casts that follow each other; parts of a weight were zero, all but one."""
    monkeypatch.setattr("moefoundry.ops.wide_linear._by_parts", lambda x_TD, weight_ED: True)
    function, shapes = CASES[case]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw) for shape in shapes]
    if case == "wide linear":
        inputs[0] = inputs[0].bfloat16()
    compare(function, [x.requires_grad_() for x in inputs], "inductor")


@pytest.mark.parametrize("operator", [rounding.OPERATOR, wide_linear.PARTS])
def test_what_rounds_is_an_operator_of_torch(operator: CustomOpDef) -> None:
    x = torch.randn(3, 5)
    torch.library.opcheck(operator, (x, torch.bfloat16) if operator is rounding.OPERATOR else (x, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "zero_centered", "bias"), [(RMSNorm, False, False), (RMSNorm, True, False), (LayerNorm, False, True)]
)
def test_norms(kind: type[RMSNorm | LayerNorm], zero_centered: bool, bias: bool, dtype: torch.dtype) -> None:
    module = kind(WIDTH, 1e-6, zero_centered, bias).to(dtype)
    x = torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    parameters = list(module.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    compare(lambda x, *_: module(x), [x, *parameters])
