"""Estimate of the memory of activations, from the tensors that each operation keeps and makes.

A block's backward pass runs through stages. In each there are what the forward pass has kept for it and for those
after it, and what it computes with. With checkpointing a block keeps its input and the order of its rows, ``selective``
also results of products, attention and exchanges; the forward pass is run again before the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from moefoundry.config import ActivationCheckpointing, MlaConfig, ModelConfig, NormPosition
from moefoundry.planning.attention_stages import NO_INDEXER, attention_stages
from moefoundry.planning.ffn_stages import dense_stages, moe_stages, order_bytes
from moefoundry.planning.indexer_stages import indexer_bytes
from moefoundry.planning.stages import Stage, beside, norm


@dataclass(frozen=True)
class Moment:
    """One stage of a block's backward pass.

    Attributes:
        alive: Bytes a token of the block's activations and gradients of activations.
        weights: Group of the weights whose gradients the stage computes; empty if there are none.
        share: Share of the group's elements that these are.
    """

    alive: float
    weights: str
    share: float


@dataclass(frozen=True)
class BlockActivations:
    """Activations of one block.

    Attributes:
        saved: Bytes a token from its forward pass to its backward pass.
        moments: Stages of its backward pass.
        forward: Bytes a token that exist for a moment of its forward pass, where these may be most.
    """

    saved: int
    moments: tuple[Moment, ...]
    forward: float = 0.0


def block_activations(
    cfg: ModelConfig,
    sparse: bool,
    mode: ActivationCheckpointing,
    c: int,
    exchanged: int = 1,
    fp8: bool = False,
    linear: bool = False,
    masked: bool = False,
    rows: float = inf,
    seq_len: int = 0,
) -> BlockActivations:
    """Estimate the activations of a block.

    Args:
        cfg: The recipe's ``model``.
        sparse: The block has an MoE layer, not a dense FFN.
        mode: The recipe's ``activation_checkpointing``.
        c: Bytes of the compute dtype.
        exchanged: Ranks among which experts are divided.
        fp8: The FP8 recipe is ``deepseek_v3``.
        linear: The block has linear attention.
        masked: Its attention takes a mask.
        rows: Rows of an expert.
        seq_len: Tokens of a sequence; only the memory of indexers and masks depends on it.
    """
    width = cfg.d_model
    ffn = moe_stages(cfg, c, exchanged, fp8, rows) if sparse else dense_stages(cfg, cfg.dense_width, c, fp8)
    indexer = indexer_bytes(cfg.attention, width, seq_len, c) if isinstance(cfg.attention, MlaConfig) else NO_INDEXER
    alone = mode == ActivationCheckpointing.none
    attention = attention_stages(cfg, c, fp8, linear, masked, alone, indexer, seq_len)
    of_norm = norm(width, c)
    after = [of_norm] if cfg.norm.position in (NormPosition.after, NormPosition.both) else []
    before = [of_norm] if cfg.norm.position != NormPosition.after else []
    halves = [[*after, *half, *before] for half in (ffn, attention)]
    stages = beside([*halves[0], *halves[1]], c * width)  # the gradient of the residual stream
    everything = sum(stage.saved for stage in stages)
    saved = everything
    if mode == ActivationCheckpointing.none and indexer.compared:
        saved = indexer.factors + indexer.compared
        return BlockActivations(round(saved), (Moment(saved + indexer.learning, "", 0.0),), everything)
    if mode != ActivationCheckpointing.none:
        saved = c * width + (order_bytes(cfg, exchanged) if sparse else 0)
        saved += sum(stage.kept for stage in stages) if mode == ActivationCheckpointing.selective else 0
    moments = _moments(stages, everything)
    if mode != ActivationCheckpointing.none and indexer.choice:
        moments.insert(0, Moment(saved + c * width + indexer.choice, "", 0.0))  # the forward pass again
    return BlockActivations(round(saved), tuple(moments), indexer.choice)


def _moments(stages: list[Stage], alive: float) -> list[Moment]:
    moments = []
    for stage in stages:
        moments.append(Moment(alive + stage.held, stage.weights, stage.share))
        alive -= stage.saved
    return moments
