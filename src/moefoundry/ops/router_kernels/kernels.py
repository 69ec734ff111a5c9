"""The kernels; each has a tile of whole rows [T, E] at a time, and computes in fp32."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1e-20)
"""Added to sums of scores, as by the router."""
TAKEN = tl.constexpr(-(2**31))
"""Key of an expert that cannot be chosen, below that of every logit."""


@triton.jit
def exponential(x):
    """Compute exp to fp32's rounding: ``exp2`` of the product's rounded part, times that of its rest. Keeps NaN."""
    x = tl.where(x < -200.0, -200.0, tl.where(x > 200.0, 200.0, x))
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950216293335, -high) + x * 1.925963033500e-8
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def softmax(x, real):
    """Give softmax over the columns, and logsumexp of each row, [rows, 1]."""
    largest = tl.max(tl.where(real, x, -float("inf")), 1)[:, None]
    powers = tl.where(real, exponential(x - largest), 0.0)
    total = tl.sum(powers, 1)[:, None]
    return powers * (1.0 / total), largest + tl.log(total)


@triton.jit
def sigmoid(x, real):
    """Give sigmoids, and 0 where there is no column."""
    return tl.where(real, 1.0 / (1.0 + exponential(-x)), 0.0)


@triton.jit
def sortable(x):
    """Map fp32 to int32 that are in the same order, with NaN above all and -0 equal to 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """Map a key of :func:`sortable` back to fp32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_column(is_it, column, E: tl.constexpr):
    """Mark the first marked column of each row."""
    return column == tl.min(tl.where(is_it, column, E), 1)[:, None]


@triton.jit
def keep_groups(key, column, size, GROUPS: tl.constexpr, KEPT: tl.constexpr, VOTES: tl.constexpr, E: tl.constexpr):
    """Take away the keys of experts outside the best groups; a group is as good as the sum of its best scores."""
    group = column // size
    of_group = tl.full(key.shape, TAKEN, tl.int32)  # in each column, the key of its group's sum
    for g in tl.static_range(GROUPS):
        left = tl.where(group == g, key, TAKEN)
        best = tl.max(left, 1)[:, None]
        votes = value_of(best)
        for _ in tl.static_range(VOTES - 1):
            left = tl.where(first_column(left == best, column, E), TAKEN, left)
            best = tl.max(left, 1)[:, None]
            votes += value_of(best)
        of_group = tl.where(group == g, sortable(votes), of_group)
    kept = tl.full(key.shape, TAKEN, tl.int32)
    for _ in tl.static_range(KEPT):
        first = first_column(of_group == tl.max(of_group, 1)[:, None], column, E)
        chosen = group == tl.sum(tl.where(first, group, 0), 1)[:, None]
        kept = tl.where(chosen, key, kept)
        of_group = tl.where(chosen, TAKEN, of_group)
    return kept


@triton.jit(do_not_specialize=["tiles"])
def route(
    logits,
    bias,
    scores,
    weights,
    ids,
    sums,
    counts,
    experts,
    rows,
    tiles,
    scale,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    VOTES: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Route the tokens of ``tiles`` tiles of a segment."""
    program, segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, token = tl.arange(0, E)[None, :], tl.arange(0, ROWS)[:, None]
    real, place = column < experts, token * experts + column
    all_probs, loads = tl.zeros([ROWS, E], tl.float32), tl.zeros([ROWS, E], tl.int32)
    all_z, all_entropy = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    for tile in range(tiles):
        first = (program * tiles + tile) * ROWS
        here, row = token < rows - first, segment * rows + first
        inside = here & real
        x = tl.load(logits + row * experts + place, mask=inside, other=0.0)
        probs, log_total = softmax(x, real)
        if SOFTMAX:
            score = probs
            entropy = tl.sum(probs * (log_total - tl.maximum(x, -1e30)), 1)[:, None]  # no infinity times 0
        else:
            score = sigmoid(x, real)
            probs = score * (1.0 / (tl.sum(score, 1)[:, None] + TINY))
            entropy = -tl.sum(probs * tl.log(probs + TINY), 1)[:, None]
        tl.store(scores + row * experts + place, score, mask=inside)
        compared = x
        if bias is not None:
            compared = score + tl.load(bias + column, mask=real, other=0.0)
        key = tl.where(real, sortable(compared), TAKEN)
        if GROUPS > 1:
            key = keep_groups(key, column, experts // GROUPS, GROUPS, KEPT, VOTES, E)
        rank = tl.full([ROWS, E], K, tl.int32)
        for k in tl.static_range(K):
            chosen = first_column(key == tl.max(key, 1)[:, None], column, E)
            rank = tl.where(chosen, k, rank)
            key = tl.where(chosen, TAKEN, key)
        has_slot = (rank < K) & inside
        weight = tl.where(rank < K, score, 0.0)
        if NORMALIZE:
            weight *= 1.0 / (tl.sum(weight, 1)[:, None] + TINY)
        tl.store(weights + row * K + (token * K + rank), weight * scale, mask=has_slot)
        tl.store(ids + row * K + (token * K + rank), tl.broadcast_to(column, [ROWS, E]).to(tl.int64), mask=has_slot)
        loads += has_slot.to(tl.int32)
        all_probs += tl.where(inside, probs, 0.0)
        all_z += tl.where(here, log_total * log_total, 0.0)
        all_entropy += tl.where(here, entropy, 0.0)
    part = segment * tl.num_programs(0) + program
    one = tl.arange(0, E)
    tl.store(counts + part * experts + one, tl.sum(loads, 0), mask=one < experts)
    sums += part * (experts + 2)
    tl.store(sums + one, tl.sum(all_probs, 0), mask=one < experts)
    tl.store(sums + experts, tl.sum(tl.sum(all_z, 1), 0))
    tl.store(sums + experts + 1, tl.sum(tl.sum(all_entropy, 1), 0))


@triton.jit
def route_backward(
    logits,
    ids,
    grad_weights,
    grad_scores,
    grad_probs,
    grad_z_loss,
    grad_logits,
    experts,
    rows,
    scale,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the logits' gradient from those that there are of the results."""
    first, segment = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column, token = tl.arange(0, E)[None, :], tl.arange(0, ROWS)[:, None]
    real, place = column < experts, token * experts + column
    here, row = token < rows - first, segment * rows + first
    inside = here & real
    x = tl.load(logits + row * experts + place, mask=inside, other=0.0)
    probs, log_total = softmax(x, real)
    score = probs if SOFTMAX else sigmoid(x, real)
    slope = tl.zeros([ROWS, E], tl.float32)
    if grad_weights is not None:
        rank = tl.full([ROWS, E], K, tl.int32)
        for k in tl.static_range(K):
            chosen = tl.load(ids + row * K + (token * K + k), mask=here, other=-1).to(tl.int32)
            rank = tl.where(column == chosen, k, rank)
        slope = tl.load(grad_weights + row * K + (token * K + rank), mask=rank < K, other=0.0)
        if NORMALIZE:
            weight = tl.where(rank < K, score, 0.0)
            factor = 1.0 / (tl.sum(weight, 1)[:, None] + TINY)
            mean = tl.sum(slope * weight, 1)[:, None] * factor
            slope = tl.where(rank < K, (slope - mean) * factor, 0.0)
        slope *= scale
    if grad_scores is not None:
        slope += tl.load(grad_scores + row * experts + place, mask=inside, other=0.0)
    if grad_probs is not None:
        of_probs = tl.load(grad_probs + segment * experts + column, mask=real, other=0.0) / rows
        if not SOFTMAX:
            factor = 1.0 / (tl.sum(score, 1)[:, None] + TINY)
            of_probs = (of_probs - tl.sum(of_probs * score, 1)[:, None] * factor) * factor
        slope += of_probs
    grad = score * (slope - tl.sum(slope * score, 1)[:, None]) if SOFTMAX else slope * score * (1.0 - score)
    if grad_z_loss is not None:
        grad += 2.0 * tl.load(grad_z_loss + segment) / rows * log_total * probs
    tl.store(grad_logits + row * experts + place, grad, mask=inside)
