"""The kernels; every one computes in fp32, on a tile of whole rows or, for logits, on one row part by part."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, rows, width, eps, OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute ``x / sqrt(mean(x**2) + eps) * (weight + OFFSET)``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(out + place, (values * scale[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    grad,
    x,
    weight,
    grad_x,
    grad_weight_parts,
    rows,
    width,
    eps,
    tiles,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the gradient of ``x``, and a part of that of ``weight`` from the ``tiles`` of each program."""
    column = tl.arange(0, WIDTH)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    total = tl.zeros([WIDTH], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(tiles):
        row = (first + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
        normed = values * scale
        total += tl.sum(g * normed, 0)
        g *= factor[None, :]
        mean = (tl.sum(g * normed, 1) / width)[:, None]
        tl.store(grad_x + place, ((g - normed * mean) * scale).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight_parts + tl.program_id(0) * width + column, total, mask=column < width)


@triton.jit
def rotate(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    seq_len,
    half,
    batch_stride,
    head_stride,
    token_stride,
    angle_stride,
    SIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Turn each head of each token by ``SIGN`` times its angles; a row is a head, the heads of a token in turn."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    batch = token // seq_len
    place = x + (batch * batch_stride + row % heads * head_stride + token % seq_len * token_stride)[:, None]
    target = out + (row * 2 * half)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    real = (row < rows)[:, None]
    inside = real & (pair < half)
    angle = (batch * angle_stride + token % seq_len * half)[:, None] + pair
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0) * SIGN
    dtype = out.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        whole = real & (column < 2 * half)
        pairs = tl.load(place + column, mask=whole, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (ROWS, HALF, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * HALF))
        tl.store(target + column, turned.to(dtype), mask=whole)
    else:
        a = tl.load(place + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair, (a * c - b * s).to(dtype), mask=inside)
        tl.store(target + half + pair, (b * c + a * s).to(dtype), mask=inside)


@triton.jit
def cross_entropy(logits, labels, losses, width, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the loss of each row, 0 where the label is ``IGNORED``; its gradient takes the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    kept = label != IGNORED
    column = tl.arange(0, WIDTH)
    dtype = logits.dtype.element_ty
    if kept:
        of_label = tl.load(logits + label).to(tl.float32)
        largest = tl.max(tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32), 0)
        total = 0.0
        for start in range(0, width, WIDTH):
            part = tl.load(logits + start + column, mask=start + column < width, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(part, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(part - larger), 0)
            largest = larger
        log_z = largest + tl.log(total)
        tl.store(losses + row, log_z - of_label)
        if GRADIENT:
            tl.debug_barrier()  # all threads have read the logit of the label
            for start in range(0, width, WIDTH):
                place = logits + start + column
                inside = start + column < width
                part = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
                slope = tl.exp(part - log_z) - tl.where(start + column == label, 1.0, 0.0)
                tl.store(place, slope.to(dtype), mask=inside)
    else:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, width, WIDTH):
                tl.store(logits + start + column, tl.zeros([WIDTH], dtype), mask=start + column < width)
