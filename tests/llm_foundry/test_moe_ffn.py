"""``ffn_type: moefoundry_moe``, piece by piece, without LLM Foundry's trainer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.llm_foundry import recipes


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


def padding() -> None:
    """Raise if padding changes what an MPT computes of the tokens, or is counted in the balance loss."""
    import torch

    from moefoundry.llm_foundry.mpt import MoEMPTCausalLM

    torch.manual_seed(0)
    small = recipes.mpt(init_device="cpu", max_seq_len=16, loss_fn="torch_crossentropy", ffn_config=recipes.OURS)
    model = MoEMPTCausalLM(tokenizer=None, attn_config={"attn_impl": "torch"}, **small)
    lengths = [16, 5, 9]
    mask = torch.arange(16) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(384, (3, 16))

    def run(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}
        outputs = model(batch)
        losses = model.loss(outputs, batch)
        return outputs.logits, torch.stack([losses["balance"], losses["z"]])

    logits, losses = run(ids, mask)
    losses.sum().backward()
    gate = model.model.transformer.blocks[0].ffn.moe.router.gate.weight
    grad, gate.grad = gate.grad, None
    expected = torch.zeros(2)
    for row, length in enumerate(lengths):
        alone = run(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(logits[row, :length], alone[0][0], rtol=0, atol=1e-5)
        expected = expected + alone[1] * length / sum(lengths)
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, gate.grad, rtol=1e-4, atol=1e-7)
    counted = run(ids, torch.ones_like(mask))[1]
    assert not torch.allclose(counted, losses, rtol=1e-3)


def both() -> None:
    """One after the other: the imports take long."""
    pieces()
    padding()


def test_pieces() -> None:
    run_distributed(both, 1, timeout=120)
