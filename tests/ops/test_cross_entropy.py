"""Chunked linear cross entropy against ``F.cross_entropy`` over all logits, and the memory it promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefoundry.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_reference

T, D, V = 37, 8, 23
CHUNKS = [1, 5, 7, 36, 37, 38, 1024]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns while the mode is on."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


class OperationNames(TorchDispatchMode):
    """Every operation that runs while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def case(dtype: torch.dtype = torch.float64, tokens: int = T, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORE_INDEX)
    return hidden, weight, labels


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum as autograd and torch's own cross entropy give it, in float64."""
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def assert_equal_in_float64(loss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Value, and gradients of a multiple of it."""
    expected = naive(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(x * 0.3, (hidden, weight)) for x in (loss, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_gradients_equal_torch_in_float64(chunk: int) -> None:
    hidden, weight, labels = case()
    assert_equal_in_float64(linear_cross_entropy(hidden, weight, labels, chunk), hidden, weight, labels)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_with_a_bias_it_equals_torch_in_float64(chunk: int) -> None:
    hidden, weight, labels = case()
    bias = torch.randn(len(weight), dtype=torch.float64).requires_grad_()
    got = linear_cross_entropy(hidden, weight, labels, chunk, bias_V=bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    operands = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(2 * got, operands), torch.autograd.grad(2 * expected, operands), rtol=0, atol=1e-12
    )


def test_reference_equals_torch_in_float64() -> None:
    hidden, weight, labels = case()
    assert_equal_in_float64(linear_cross_entropy_reference(hidden, weight, labels), hidden, weight, labels)


def test_default_chunk_covers_more_than_one_chunk_of_tokens() -> None:
    hidden, weight, labels = case(tokens=1500)
    got, expected = linear_cross_entropy(hidden, weight, labels), naive(hidden, weight, labels)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), rtol=0, atol=1e-11
    )


def test_uniform_logits_cost_log_v_a_token() -> None:
    hidden, weight = torch.zeros(3, D), torch.randn(V, D)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 4, IGNORE_INDEX])).item() == pytest.approx(
        2 * math.log(V), rel=1e-6
    )


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_gradient_of_one_operand_alone(wanted: tuple[bool, bool]) -> None:
    hidden, weight, labels = case()
    expected = torch.autograd.grad(naive(hidden, weight, labels), (hidden, weight))
    operands = [x.detach().requires_grad_(flag) for x, flag in zip((hidden, weight), wanted, strict=True)]
    linear_cross_entropy(*operands, labels, 7).backward()
    for operand, grad, flag in zip(operands, expected, wanted, strict=True):
        if flag:
            torch.testing.assert_close(operand.grad, grad, rtol=0, atol=1e-12)
        else:
            assert operand.grad is None


@pytest.mark.parametrize("chunk", [4, 1024])
def test_all_ignored_is_zero_with_zero_gradients(chunk: int) -> None:
    hidden, weight, labels = case(ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_ignored_tokens_get_no_gradient() -> None:
    hidden, weight, labels = case()
    linear_cross_entropy(hidden, weight, labels, 5).backward()
    assert torch.equal(hidden.grad.abs().sum(dim=1) == 0, labels == IGNORE_INDEX)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_large_logits_neither_overflow_nor_lose_the_loss(chunk: int) -> None:
    hidden, weight, labels = case(torch.float32)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    loss.backward()
    torch.testing.assert_close(loss.double(), naive(hidden, weight, labels), rtol=1e-6, atol=0)
    assert loss > 1e5
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_fp32_is_near_float64(chunk: int) -> None:
    hidden, weight, labels = case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), naive(hidden, weight, labels), rtol=1e-6, atol=0)
    expected = torch.autograd.grad(naive(hidden, weight, labels), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 1024])
def test_bf16_operands_give_an_fp32_loss_near_the_exact_one(chunk: int) -> None:
    hidden, weight, labels = case(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = naive(*exact, labels)
    expected.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=5e-3, atol=0)
    for operand, oracle in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(operand.grad.double(), oracle.grad, rtol=0, atol=2**-6 * oracle.grad.abs().max())


def test_operand_dtype_rounds_the_operands_of_all_three_products() -> None:
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=5, operand_dtype=torch.bfloat16)
    grads = torch.autograd.grad(loss, (hidden, weight))
    hidden_, weight_ = bf16(hidden.detach()), bf16(weight.detach())
    logits = hidden_ @ weight_.T
    kept = labels != IGNORE_INDEX
    grad_logits = logits.softmax(dim=1) - F.one_hot(labels.where(kept, 0), V)
    grad_logits = bf16(grad_logits * kept.unsqueeze(1))
    torch.testing.assert_close(loss, naive(hidden_, weight_, labels), rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(grads, (grad_logits @ weight_, grad_logits.T @ hidden_), rtol=0, atol=1e-12)


def test_gradients_pass_gradcheck() -> None:
    hidden, weight, labels = case(tokens=6)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 4), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_never_exist(dtype: torch.dtype) -> None:
    tokens, width, vocab, chunk = 256, 16, 512, 32
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocab, width).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, chunk).backward()
    assert largest.numel == max(chunk * vocab, vocab * width, tokens * width)
    assert largest.numel < tokens * vocab


def test_the_memory_test_sees_all_logits_where_they_do_exist() -> None:
    hidden, weight, labels = case()
    with LargestTensor() as largest:
        linear_cross_entropy_reference(hidden, weight, labels).backward()
    assert largest.numel == T * V


def test_without_grad_each_chunk_is_one_product_and_nothing_is_allocated_for_gradients() -> None:
    hidden, weight, labels = case(tokens=10)
    expected = linear_cross_entropy(hidden, weight, labels, 5)
    with torch.no_grad(), OperationNames() as operations:
        loss = linear_cross_entropy(hidden, weight, labels, 5)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert sum("mm" in name for name in operations.names) == 2
    assert not {"empty_like", "zeros_like", "exp_"} & set(operations.names)


def test_operands_are_left_as_they_were() -> None:
    hidden, weight, labels = case()
    before = [x.detach().clone() for x in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels, 5).backward()
    assert all(torch.equal(x, y) for x, y in zip((hidden, weight, labels), before, strict=True))
