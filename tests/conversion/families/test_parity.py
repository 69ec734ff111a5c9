"""The same weights give the same logits, loss and gradients in transformers' own models, in fp32."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefoundry.config import MtpConfig
from moefoundry.conversion.families import FAMILIES
from tests.conversion.families.models import (
    FIRST_OF_OLDER,
    OLDER,
    VARIANTS,
    add_prediction_module,
    blocks,
    our_model,
    our_tensors,
    their_tensors,
    transformers_model,
)
from tests.conversion.transformers5 import sample

RELATIVE = 2e-5  # of a tensor's largest entry: both compute in fp32, in different orders; 4e-6 is seen
ABSOLUTE = 3e-5  # of logits of about 1; 7e-6 is seen


def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of those that have one; zeros for an expert without tokens."""
    return {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in tensors.items()
        if tensor.requires_grad
    }


@pytest.mark.parametrize(("family", "variant"), FIRST_OF_OLDER)
def test_logits_and_gradients_equal_those_of_transformers(family: str, variant: str) -> None:
    cfg, ids = VARIANTS[family][variant], sample()
    model = transformers_model(family, cfg)
    theirs = their_tensors(model)
    ours = our_model(family, cfg, theirs)
    expected = model(ids, labels=ids)
    assert expected.logits.std() > 0.1  # there is something to compare
    torch.testing.assert_close(ours(ids), expected.logits, rtol=0, atol=ABSOLUTE)
    loss = ours(ids, ids).lm
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    loss.backward()
    expected.loss.backward()
    our_grads, their_grads = gradients(our_tensors(ours)), gradients(theirs)
    pieces = (piece for piece in FAMILIES[family].pieces(cfg) if piece.name in our_grads)
    for piece, our, their in blocks(pieces, our_grads, their_grads):
        scale = our_grads[piece.name].abs().max().item()
        assert scale > 0, piece
        torch.testing.assert_close(our, their, rtol=0, atol=RELATIVE * scale, msg=lambda text, p=piece: f"{p}: {text}")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("llama", "deepseek_v3") else pytest.mark.slow) for name in OLDER]
)
def test_the_fused_attention_of_transformers_gives_the_same(family: str) -> None:
    cfg, ids = next(iter(VARIANTS[family].values())), sample()
    model = transformers_model(family, cfg, attention="sdpa")
    torch.testing.assert_close(
        our_model(family, cfg, their_tensors(model))(ids), model(ids).logits, rtol=0, atol=ABSOLUTE
    )


@torch.no_grad()
def test_longrope_of_texts_beyond_the_original_length() -> None:
    """Transformers 5 has the short factors there, with the magnitude of the long ones."""
    cfg = VARIANTS["phimoe"]["longrope"]
    longrope = replace(cfg.attention.longrope, original_max_seq_len=16)
    cfg, ids = replace(cfg, attention=replace(cfg.attention, longrope=longrope)), sample()
    model = transformers_model("phimoe", cfg)
    ours = our_model("phimoe", cfg, their_tensors(model))
    for length in (16, 17, 24):
        expected = model(ids[:, :length]).logits
        torch.testing.assert_close(ours(ids[:, :length]), expected, rtol=0, atol=ABSOLUTE)


def test_prediction_of_further_tokens_equals_deepseeks() -> None:
    """Transformers leaves these modules out; here they are put together from its layers, as DeepSeek's report says."""
    cfg, ids = replace(VARIANTS["deepseek_v3"]["plain"], mtp=MtpConfig(depth=2, loss_weight=0.3)), sample()
    model = transformers_model("deepseek_v3", cfg)
    for _ in range(cfg.mtp.depth):
        add_prediction_module(model)
    theirs = their_tensors(model)
    ours = our_model("deepseek_v3", cfg, theirs).train()
    hidden = model.model(ids).last_hidden_state
    embedded, expected = model.model.embed_tokens(ids), 0.0
    for depth, layer in enumerate(model.model.layers[cfg.n_layers :], start=1):
        hidden = layer.eh_proj(torch.cat([layer.enorm(embedded[:, depth:]), layer.hnorm(hidden[:, :-1])], dim=-1))
        length = hidden.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        rotation = model.model.rotary_emb(hidden, torch.arange(length)[None])
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotation)[0]
        logits = model.lm_head(layer.shared_head.norm(hidden))[:, :-1]
        targets = ids[:, depth + 1 :]
        expected += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    losses = ours(ids, ids)
    torch.testing.assert_close(losses.mtp, expected * 0.3 / 2 / losses.num_targets, rtol=1e-5, atol=0)
