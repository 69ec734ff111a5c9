"""Attention on a CPU equals the softmax written out, keeps no probabilities, and runs once where it is kept."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moefoundry.config import AttentionConfig, GqaConfig, MlaConfig
from moefoundry.ops import cpu_attention as ops
from moefoundry.ops.cpu_attention import EQUAL, LONG, QUERIES, SHORTEST, cpu_attention, cpu_attention_reference
from tests.model.tiny import gradients, tiny_config, tiny_model, use_attention
from tests.test_activation_checkpointing import Operations

SCALE = 0.3
CASES = {  # heads, heads of keys, length, width of queries, width of values
    "one token": (4, 4, 1, 8, 8),
    "a block": (4, 2, QUERIES, 8, 8),
    "a token more": (6, 2, QUERIES + 1, 8, 8),
    "narrow values": (4, 4, 150, 12, 8),
    "wide values": (4, 1, 150, 4, 8),
    "long": (2, 1, LONG + 1, 4, 2),
}
MLA = MlaConfig(n_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
KINDS: dict[str, AttentionConfig] = {"gqa": GqaConfig(n_heads=4, n_kv_heads=2), "mla": MLA}


def operands(case: str, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Queries and values as a projection gives them, keys as a rotation does."""
    heads, key_heads, length, width, value_width = CASES[case]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, count, size, generator=draw, dtype=torch.float64).to(dtype)
        for count, size in ((heads, width), (key_heads, width), (key_heads, value_width))
    )
    return [x.detach().requires_grad_() for x in (q.transpose(1, 2), k.transpose(1, 2).contiguous(), v.transpose(1, 2))]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * SCALE
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (out, *torch.autograd.grad(out, inputs, incoming.to(out.dtype)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attend", [cpu_attention, cpu_attention_reference])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equals_the_softmax_written_out(case: str, attend, dtype: torch.dtype, tolerance: float) -> None:
    inputs = operands(case, dtype)
    found = with_gradients(attend(*inputs, scale=SCALE), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(found, with_gradients(written_out(*exact), exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_large_products_do_not_overflow() -> None:
    q, k, v = (x.detach() for x in operands("narrow values", torch.float32))
    out = cpu_attention(1e4 * q, 1e4 * k, v, scale=SCALE)
    assert out.isfinite().all()


@pytest.mark.parametrize("case", ["a token more", "narrow values"])
def test_is_an_operator_of_torch(case: str) -> None:
    torch.library.opcheck(ops.FORWARD, (*operands(case, torch.float32), SCALE))


def test_keeps_its_operands_alone() -> None:
    kept: list[int] = []
    inputs = operands("narrow values", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cpu_attention(*inputs)
    assert sorted(kept) == sorted(x.numel() for x in inputs)


def test_what_is_not_finite_reaches_no_query_before_it() -> None:
    q, k, v = (x.detach() for x in operands("narrow values", torch.float32))
    plain = cpu_attention(q, k, v)
    for bad in (torch.nan, torch.inf, -torch.inf):
        k[:, :, 70] = bad
        assert torch.equal(cpu_attention(q, k, v)[:, :70], plain[:, :70])


@pytest.mark.parametrize(
    ("length", "heads", "value_width", "taken"),
    [
        (EQUAL.start - 1, 2, 8, False),
        (EQUAL.start, 2, 8, True),
        (EQUAL.start, 1, 8, True),
        (EQUAL.stop - 1, 2, 8, True),
        (EQUAL.stop, 2, 8, False),
        (SHORTEST - 1, 1, 4, False),
        (SHORTEST, 1, 4, True),
        (EQUAL.stop, 1, 12, True),
    ],
)
def test_takes_what_is_faster_so(length: int, heads: int, value_width: int, taken: bool) -> None:
    q, k, v = (torch.empty(1, count, length, width) for count, width in ((heads, 8), (1, 8), (1, value_width)))
    assert ops.takes(q, k, v) == taken
    assert not ops.takes(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert not ops.takes(q[:, :, :1], k, v), "one new token sees all before it"
    assert not ops.takes(q[:0], k[:0], v[:0])
    assert not ops.takes(q.to("meta"), k.to("meta"), v.to("meta"))
    with torch.no_grad():
        assert not ops.takes(q, k, v), "an evaluation is the same whatever the batch"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_model_trains_as_with_torchs_attention(kind: str, mode: str) -> None:
    cfg = tiny_config()
    use_attention(cfg, KINDS[kind])
    ids = torch.randint(0, cfg.vocab_size, (2, EQUAL.start), generator=torch.Generator().manual_seed(0))
    found = []
    for taken in (True, False):
        model = tiny_model(cfg, activation_checkpointing=mode)
        with patch.object(ops, "takes", return_value=False) if not taken else Operations() as operations:
            model(ids, ids).total.backward()
        found.append(gradients(model))
        if taken:
            again = 2 if mode == "full" else 1
            assert operations.counts["cpu_attention"] == again * cfg.n_layers
            assert operations.counts["cpu_attention_backward"] == cfg.n_layers
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)
