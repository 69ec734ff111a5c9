"""A model that attends in segments is the model that attends with masks; on a GPU it makes none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import AttentionConfig, GqaConfig, MlaConfig, ModelConfig, MtpConfig
from moefoundry.foundry import with_counts
from moefoundry.model.context import AttentionKind, Documents, attention_contexts, lengths_of_documents
from moefoundry.model.transformer import MoETransformer
from moefoundry.ops import segment_attention
from tests.flash import attention_in_segments
from tests.model.test_document_masking import IDS, KINDS, MLA, SEQUENCE_ID
from tests.model.tiny import gradients, tiny_config, tiny_model, use_attention

PADDED_ID = SEQUENCE_ID.clone()
PADDED_ID[0, 13:] = -1
SEGMENTED = ["sinks", "latent"]  # grouped queries, a window in one layer, and widths that differ


def build(attention: AttentionConfig, masking: bool = True) -> MoETransformer:
    cfg = tiny_config(backend="loop", aux_loss_weight=0.0)
    use_attention(cfg, attention)
    cfg.document_masking, cfg.mtp = masking, MtpConfig(depth=2)
    return tiny_model(cfg, dtype=torch.float64).train()


def outcome(model: MoETransformer, counted: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    told = {name: counted.get(name) for name in ("sequence_id", "tokens_of_rows", "document_lengths")}
    loss = model(counted["input_ids"], counted["labels"], **told).total
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("kind", SEGMENTED)
def test_losses_and_gradients_are_those_with_masks(kind: str) -> None:
    model = build(KINDS[kind])
    for ids in (SEQUENCE_ID, PADDED_ID):
        labels = IDS.masked_fill(ids < 0, -100)
        batch = with_counts({"input_ids": IDS, "labels": labels, "sequence_id": ids})
        assert batch["document_lengths"] == lengths_of_documents(ids)
        expected = outcome(model, batch)
        with attention_in_segments():
            found = [outcome(model, batch), outcome(model, {**batch, "document_lengths": None})]
        for got in found:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_windows_and_sinks_need_no_documents() -> None:
    model = build(KINDS["sinks"], masking=False)
    batch = {"input_ids": IDS, "labels": IDS}
    expected = outcome(model, batch)
    with attention_in_segments() as kernel:
        torch.testing.assert_close(outcome(model, batch), expected, rtol=0, atol=1e-11)
    assert len(kernel.heads) == len(model.blocks)


def test_plain_attention_and_generation_are_left_alone() -> None:
    cfg = build(KINDS["grouped_query"], masking=False).cfg
    with mock.patch("moefoundry.model.context.takes_segments", return_value=True):
        plain, narrow, wide = (AttentionKind(window) for window in (None, 3, 99))
        found = attention_contexts(cfg, [plain, narrow, wide], IDS)
        assert [found[kind].segments is None for kind in (plain, narrow, wide)] == [True, False, True]
        assert attention_contexts(cfg, [narrow], IDS[:, :1], num_cached=5)[narrow].segments is None


def test_documents_without_their_last_tokens() -> None:
    documents = Documents(SEQUENCE_ID, lengths_of_documents(SEQUENCE_ID))
    assert documents.lengths == [[5, 1, 6, 4], [16], [2, 14]]
    shorter = documents.without_last(5)
    assert shorter.lengths == lengths_of_documents(shorter.ids_BS) == [[5, 1, 5], [11], [2, 9]]


class Shapes(TorchDispatchMode):
    """Shapes of all results, and heads of the keys of each call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.heads: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._flash_attention_forward.default:
            self.heads.append(args[1].shape[1])
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)}
        return out


def in_bf16(cfg: ModelConfig) -> MoETransformer:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return MoETransformer(cfg)
    finally:
        torch.set_default_dtype(torch.float32)


GPU_KINDS = {
    "grouped_query": GqaConfig(n_heads=8, n_kv_heads=2, head_dim=8),
    "window, sinks": GqaConfig(n_heads=8, n_kv_heads=2, head_dim=8, sinks=True, sliding_window=48),
    "latent": MlaConfig(**{**MLA, "n_heads": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}),
}


@pytest.mark.parametrize("attention", GPU_KINDS.values(), ids=GPU_KINDS)
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_on_a_gpu_no_mask_and_no_copies_of_keys_are_made(attention: AttentionConfig, device: str) -> None:
    """Forward on fake tensors of a CUDA device; and, as autograd wants a real one, both passes on meta."""
    cfg = tiny_config(n_layers=2)
    use_attention(cfg, attention)
    cfg.document_masking = True
    length, lengths = 160, [[100, 60], [160]]
    with (
        mock.patch("moefoundry.ops.kernel_choice._fused", True),
        mock.patch.object(segment_attention, "has_kernel", return_value=True),
        mock.patch("moefoundry.ops.kernel_choice._can_run", return_value=False),
        FakeTensorMode() if device == "cuda" else nullcontext(),
        Shapes() as seen,
    ):
        with torch.device(device):
            model = in_bf16(cfg).train()
            ids = torch.zeros(2, length, dtype=torch.int64)
        loss = model(ids, ids, sequence_id=ids, tokens_of_rows=[length] * 2, document_lengths=lengths).total
        if device == "meta":
            loss.backward()
    assert loss.device.type == device
    assert seen.heads == [cfg.attention.n_kv_heads if isinstance(attention, GqaConfig) else 8] * 2
    assert not [shape for shape in seen.shapes if shape[-2:] == (length, length)]
    assert device == "cuda" or all(p.grad is not None for p in model.parameters())
