"""``ffn_type: moefoundry_moe``, piece by piece, without LLM Foundry's trainer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed


def pieces() -> None:
    """Raise where a piece is wrong; LLM Foundry is imported once for all."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from moefoundry.llm_foundry.mpt import MoEFFN, build_moe_ffn, init_moe

    def build(**moe: Any) -> MoEFFN:
        torch.manual_seed(0)
        layer = build_moe_ffn(16, 2, device="meta", **{"num_experts": 4, "top_k": 2} | moe)
        assert isinstance(layer, MoEFFN)
        layer.to_empty(device="cpu")
        for module in layer.modules():
            if not init_moe(module, nn.init.kaiming_normal_, 2.0, True) and isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        return layer

    x = torch.randn(2, 8, 16, requires_grad=True)
    layer = build(num_shared_experts=1)
    experts = layer.moe.experts
    assert experts.gate_proj.shape == (4, 32, 16)
    assert experts.gate_proj.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.1), "each expert's own fan-in"
    assert experts.down_proj.std().item() == pytest.approx((2 / 32) ** 0.5 / 2, rel=0.1), "divided as residual"
    with pytest.raises(RuntimeError, match=r"only model\.name mpt_causal_lm adds its balance loss"):
        layer(x)
    layer.eval()
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])
    assert layer.losses is None, "evaluation leaves nothing behind"

    layer.train().taken = True
    out = checkpoint(layer, x, use_reentrant=False)
    taken, layer.losses = layer.losses, None
    assert taken is not None
    (out.sum() + taken[0]).backward()
    assert layer.losses is None, "neither does a recomputation"
    checkpointed, layer.moe.router.gate.weight.grad = layer.moe.router.gate.weight.grad, None
    (layer(x).sum() + layer.losses[0]).backward()
    torch.testing.assert_close(layer.moe.router.gate.weight.grad, checkpointed)

    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    got.sum().backward()
    assert experts.gate_proj.grad is not None
    assert experts.gate_proj.grad.dtype == torch.float32
    biased = build(router={"score_function": "sigmoid"})
    assert biased.moe.router.expert_bias is not None
    assert not biased.moe.router.expert_bias.any(), "to_empty leaves it undefined"


def test_pieces() -> None:
    run_distributed(pieces, 1, timeout=120)
