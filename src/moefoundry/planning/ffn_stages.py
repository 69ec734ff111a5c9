"""Backward stages of FFNs: dense, and of experts, by :mod:`moefoundry.planning.stages`.

F is the hidden width, K the experts of a token, E all of them. A token has K rows, used evenly by all ranks. The weight
of a row is applied in SwiGLU, so no output of an expert is kept.

The backends ``triton`` and ``quack`` gather rows inside their products: of a row they keep SwiGLU's inputs alone, which
``selective`` keeps, too, and where a norm follows the sums of tokens.

With ``fp8.recipe: deepseek_v3`` an FFN is one operation, which keeps its input and SwiGLU's inputs in 129/128 bytes.
"""

from __future__ import annotations

from moefoundry.config import ModelConfig, NormPosition, SwigluConfig
from moefoundry.moe.dealing import dealt_once
from moefoundry.ops.sizes import TILE
from moefoundry.planning.stages import EXPERTS, FFN, Stage, beside, swiglu
from moefoundry.planning.units import FP32

E4M3_ROW = 129 / 128
GATHERING = ("triton", "quack")
"""Mixture backends that make no copies of tokens."""
ORDER_BYTES = 16
"""Bytes of a slot in the order of rows: its row, and the row's slot. Checkpointing does not drop the order, which also
has 8 bytes of a token. An exchange has its own order, of the ranks that a token goes to."""
INDEX_BYTES = 36
"""Bytes of a slot in all: its order, expert and weight, and the row's weight."""


def dense_stages(cfg: ModelConfig, hidden: int, c: int, fp8: bool, owns_input: bool = True) -> list[Stage]:
    """List the stages of a dense FFN; ``owns_input`` is false where another operation keeps the input, too."""
    width, plain = cfg.d_model, cfg.swiglu == SwigluConfig()
    if fp8:
        return [_fp8_feed_forward(width, hidden, c, plain, owns_input)]
    return [
        Stage(saved=c * hidden, held=c * hidden, weights=FFN, share=1 / 3),
        swiglu(hidden, c, weighted=False, plain=plain),
        Stage(held=c * (2 * hidden + width), kept=c * hidden, weights=FFN, share=1 / 3),
        Stage(
            saved=c * width if owns_input else 0,
            held=c * (hidden + 2 * width),
            kept=c * (hidden + width),
            weights=FFN,
            share=1 / 3,
        ),
    ]


def moe_stages(cfg: ModelConfig, c: int, exchanged: int, fp8: bool, rows: float) -> list[Stage]:
    """List the stages of an MoE layer whose experts are on ``exchanged`` ranks, and have ``rows`` rows each."""
    moe, width = cfg.moe, cfg.d_model
    stages, places = _rows(cfg, c, fp8, rows), ranks_of_a_token(cfg, exchanged)
    if moe.projection_bias:  # weights of slots by expert, of those on a rank
        weights = places * moe.num_experts / exchanged
        stages.append(Stage(c * weights, (c + FP32) * weights, c * places * width))
    if moe.backend in GATHERING and not fp8 and not block_ends_with_experts(cfg):  # the sums, of each rank
        stages.append(Stage(kept=c * places * width))
    if exchanged > 1:
        stages = beside(stages, (c + (E4M3_ROW if fp8 else 0)) * places * width)  # a token's gradient at its ranks
        arrived = c * places * width if moe.backend in GATHERING and not fp8 else 0  # without copies, they are kept
        received = (E4M3_ROW if fp8 else c) * places * width + 2 * FP32 * moe.top_k * places  # with experts and weights
        back = 0 if block_ends_with_experts(cfg) else c * places * width
        stages.append(Stage(arrived, held=2 * c * places * width, kept=received + back))
    if moe.num_shared_experts:
        shared = dense_stages(cfg, moe.num_shared_experts * moe.expert_hidden_size, c, fp8, owns_input=False)
        gate = [Stage(c * (width + 2), c * width)] if moe.shared_expert_gate else []
        stages += beside([*gate, *shared], c * width)  # the experts' gradient of the input
    experts = moe.num_experts
    jitter = FP32 * width if moe.router.input_jitter else 0  # each of the factors, the product and its gradient
    router = Stage(
        saved=(E4M3_ROW if fp8 else c) * width + 2 * FP32 * experts + moe.top_k * (INDEX_BYTES - 4) + 8 + 2 * jitter,
        held=3 * FP32 * experts + (FP32 + 2 * c) * width + jitter,
        kept=FP32 * experts,
    )
    return [*stages, router]


def block_ends_with_experts(cfg: ModelConfig) -> bool:
    """Tell if nothing after the experts' last product is kept: then it is not computed again, nor sent back again."""
    return cfg.norm.position == NormPosition.before and cfg.moe.dispatch_chunks == 1


def order_bytes(cfg: ModelConfig, exchanged: int) -> float:
    """Count the bytes of the order of rows, which every mode keeps."""
    of_exchange = ranks_of_a_token(cfg, exchanged) * ORDER_BYTES + 8 if exchanged > 1 else 0
    return cfg.moe.top_k * ORDER_BYTES + 8 + of_exchange


def ranks_of_a_token(cfg: ModelConfig, ranks: int) -> float:
    """Mean number of ranks that have an expert of a token."""
    moe, router = cfg.moe, cfg.moe.router
    dealt = dealt_once(moe.top_k, moe.num_experts, router.num_groups, router.top_k_groups)
    return sum(len({expert // (moe.num_experts // ranks) for expert in ids}) for ids in dealt) / len(dealt)


def _rows(cfg: ModelConfig, c: int, fp8: bool, rows: float) -> list[Stage]:
    """List the stages of a token's rows, from their sum to the copies of the token."""
    moe, width, hidden, slots = cfg.moe, cfg.d_model, cfg.moe.expert_hidden_size, cfg.moe.top_k
    plain, out = cfg.swiglu == SwigluConfig(), 0 if block_ends_with_experts(cfg) else c * width
    if fp8:
        stages = [_times(_fp8_feed_forward(width, hidden, c, plain, rows=rows, out=out), slots)]
    elif moe.backend in GATHERING:
        of_row = 2 * FP32  # its token and its weight
        stages = [
            Stage(held=3 * c * hidden + FP32, weights=EXPERTS, share=1 / 3),
            Stage(2 * c * hidden + of_row, c * (2 * hidden + width), 2 * c * hidden, EXPERTS, 2 / 3),
        ]
        stages = [_times(stage, slots) for stage in stages]
    else:
        stages = [
            Stage(c * hidden, c * (width + hidden), out, EXPERTS, 1 / 3),
            swiglu(hidden, c, weighted=True, plain=plain),
            Stage(0, c * (2 * hidden + width), c * hidden, EXPERTS, 1 / 3),
            Stage(c * width, c * (hidden + 2 * width), c * hidden, EXPERTS, 1 / 3),
            Stage(0, c * width),
        ]
        stages = [_times(stage, slots) for stage in stages]
    return stages


def _times(stage: Stage, rows: int) -> Stage:
    return Stage(rows * stage.saved, rows * stage.held, rows * stage.kept, stage.weights, stage.share)


def _fp8_feed_forward(
    width: int,
    hidden: int,
    c: int,
    plain: bool,
    owns_input: bool = True,
    rows: float | None = None,
    out: float | None = None,
) -> Stage:
    """Describe a whole FFN, of one row. Its gradients come in FP8, too.

    Operands of gradients of weights are in tiles of 128 rows; those of an expert begin with a new tile. ``rows`` are
    those of an expert, or None for a dense FFN, whose output's gradient is the block's. ``out`` are the bytes of the
    output that ``selective`` keeps; None is all of it.
    """
    incoming = 0 if rows is None else c * width
    padded = 1.0 if rows is None else 1 + (TILE - 1) / rows
    held = max(
        2 * c * hidden + swiglu(hidden, c, rows is not None, plain).held + padded * hidden,
        c * (5 * hidden + 2 * width) + (1 + padded) * hidden,  # gradient of the input
        c * (5 * hidden + width) + padded * (2 * hidden + width),  # gradients of gate and up
    )
    return Stage(
        saved=E4M3_ROW * ((width if owns_input else 0) + 2 * hidden) + (0 if rows is None else 4),
        held=incoming + E4M3_ROW * width + held,
        kept=c * 2 * hidden + (c * width if out is None else out),
        weights=FFN if rows is None else EXPERTS,
        share=1.0,
    )
