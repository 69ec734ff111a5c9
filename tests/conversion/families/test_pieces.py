"""Pieces cover both sides: every element of every tensor, once, in blocks of the same shape."""

from dataclasses import replace

import pytest

from moefoundry.config import MtpConfig
from moefoundry.conversion.families import FAMILIES, Piece
from moefoundry.model.transformer import MoETransformer
from tests.conversion.families.models import (
    FIRST_OF_OLDER,
    VARIANTS,
    add_prediction_module,
    assert_covered_once,
    our_tensors,
    their_tensors,
    transformers_model,
)


@pytest.mark.parametrize(("family", "variant"), FIRST_OF_OLDER)
def test_every_element_of_both_models_is_in_one_piece(family: str, variant: str) -> None:
    cfg = VARIANTS[family][variant]
    ours, theirs = our_tensors(MoETransformer(cfg)), their_tensors(transformers_model(family, cfg))
    unused = FAMILIES[family].unused_tensors(cfg)
    assert_covered_once(
        list(FAMILIES[family].pieces(cfg)),
        ours,
        {name: tensor for name, tensor in theirs.items() if name not in unused},
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_prediction_modules_are_covered_and_their_copies_are_named(tied: bool) -> None:
    cfg = replace(VARIANTS["deepseek_v3"]["plain"], mtp=MtpConfig(depth=2), tie_embeddings=tied)
    model = transformers_model("deepseek_v3", cfg)
    for _ in range(cfg.mtp.depth):
        add_prediction_module(model)
    family, theirs = FAMILIES["deepseek_v3"], their_tensors(model)
    assert_covered_once(list(family.pieces(cfg)), our_tensors(MoETransformer(cfg)), theirs)
    copies = family.copies(cfg)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert copies == ({"lm_head.weight": head} if tied else {}) | {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": head,
        "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.4.shared_head.head.weight": head,
    }
    assert not copies.keys() & theirs.keys()
    assert set(copies.values()) <= theirs.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_tied_head_is_a_copy_elsewhere(family: str) -> None:
    for cfg in VARIANTS[family].values():
        embedding = next(piece.hf_name for piece in FAMILIES[family].pieces(cfg) if piece.name == "embed_tokens.weight")
        expected = {"lm_head.weight": embedding} if cfg.tie_embeddings else {}
        assert FAMILIES[family].copies(cfg) == expected


def test_dbrx_lays_experts_out_one_below_the_other() -> None:
    """By hand: width 32, 4 heads of 8, 2 for keys; experts of width 20, whose second matrix is [F, D] there."""
    pieces = {(piece.name, piece.expert): piece for piece in FAMILIES["dbrx"].pieces(VARIANTS["dbrx"]["plain"])}
    qkv = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
    rows = {name: pieces[f"layers.1.attention.{name}.weight", None] for name in ("q_proj", "k_proj", "v_proj")}
    assert {name: (piece.hf_name, piece.rows) for name, piece in rows.items()} == {
        "q_proj": (qkv, (0, 32)),
        "k_proj": (qkv, (32, 48)),
        "v_proj": (qkv, (48, 64)),
    }
    gate, down = pieces["layers.0.ffn.experts.gate_proj", 0], pieces["layers.0.ffn.experts.down_proj", 2]
    assert gate == Piece(gate.name, "transformer.blocks.0.ffn.experts.mlp.w1", expert=0, rows=(0, 20))
    assert down == Piece(down.name, "transformer.blocks.0.ffn.experts.mlp.w2", expert=2, rows=(40, 60), transposed=True)
