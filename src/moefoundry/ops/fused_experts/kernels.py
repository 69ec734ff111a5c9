"""Triton kernels of a mixture of SwiGLU experts on rows in expert order.

N routed rows, D model width, F expert hidden width, E experts. Every product sums in fp32. A tile is ``M`` rows of one
expert; tables have the rows of each tile, so that no product searches for its rows. Rows after the end of an expert
are read somewhere harmless and never stored. The weights come as tensor descriptors [E, O, I], whose edges read as
zeros; so widths need only be multiples of 8.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from moefoundry.ops.fp8 import triton_codec as codec


@triton.jit
def place_tiles(
    sizes, group_of_tile, first_of_tile, end_of_tile, num_tiles, num_groups, MAX_GROUPS: tl.constexpr, M: tl.constexpr
):
    """Write the expert, first row and end of rows of each tile; ``num_groups`` and no rows after the last.

    Write the number of tiles before that, too.
    """
    tile = tl.program_id(0)
    group, first, end = codec.rows_of_tile(sizes, tile, num_groups, MAX_GROUPS, M)
    following, _, _ = codec.rows_of_tile(sizes, tile + 1, num_groups, MAX_GROUPS, M)
    if (group < num_groups) & (following == num_groups):
        tl.store(num_tiles, tile + 1)
    tl.store(group_of_tile + tile, group)
    tl.store(first_of_tile + tile, first)
    tl.store(end_of_tile + tile, end)


@triton.jit
def find_tile(number, group_of_tile, first_of_tile, end_of_tile, columns, N: tl.constexpr):
    """Find the expert, first row and end of rows of a tile, and the tile across; tiles across go first.

    The three loads are under way at a time.
    """
    tiles_across = tl.cdiv(columns, N)
    tile = number // tiles_across
    group = tl.load(group_of_tile + tile)
    first = tl.load(first_of_tile + tile)
    end = tl.load(end_of_tile + tile)
    return group, first, end, number % tiles_across


@triton.jit
def in_eights(width):
    """Give ``width``, a multiple of 8, so that the compiler knows it: it copies 16 bytes at a time then."""
    return width // 8 * 8


@triton.jit
def up_swiglu(
    tokens,
    token_of_row,
    both,
    gate_bias,
    up_bias,
    row_weights,
    gate_up,
    hidden,
    group_of_tile,
    first_of_tile,
    end_of_tile,
    num_tiles,
    inner,
    columns,
    UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Gather tokens [T, D], multiply by gate and up [E, F, D]; keep both products and their weighted SwiGLU.

    ``both`` has gate and up, or up and gate, [2, E, F, D]; ``gate_up`` is [N, 2 F], gate first; ``hidden`` [N, F].
    Biases are [E, F], or None; the constants are those of :class:`~moefoundry.ops.swiglu.Activation`.
    """
    inner, columns = in_eights(inner), in_eights(columns)
    # one loop through the steps of all tiles, see weight_gradient
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.load(num_tiles) * tl.cdiv(columns, N)
    number, steps_left = program - programs, 0
    group, first, end, across, start = 0, 0, 0, 0, 0
    token = tl.zeros([M], tl.int32)
    total = tl.zeros([M, 2 * N], tl.float32)
    for _ in range(tl.cdiv(tl.maximum(tiles - program, 0), programs) * tl.cdiv(inner, K)):
        if steps_left == 0:
            number += programs
            group, first, end, across = find_tile(number, group_of_tile, first_of_tile, end_of_tile, columns, N)
            row = first + tl.arange(0, M)
            token = tl.load(token_of_row + row, mask=row < end, other=0)
            start = 0
            steps_left = tl.cdiv(inner, K) - 1
        else:
            start += K
            steps_left -= 1
        k = start + tl.arange(0, K)
        x = tl.load(tokens + token.to(tl.int64)[:, None] * inner + k[None, :], mask=(k < inner)[None, :], other=0.0)
        weights = both.load([0, group, across * N, start]).reshape(2 * N, K)
        total = tl.dot(x, weights.T, total)
        if steps_left == 0:
            a, b = halves(total, M, 2 * N)
            g = b if UP_FIRST else a
            u = a if UP_FIRST else b
            row = first + tl.arange(0, M)
            column = across * N + tl.arange(0, N)
            inside = row < end
            real = column < columns
            if gate_bias is not None:
                g += tl.load(gate_bias + group * columns + column, mask=real, other=0.0).to(tl.float32)[None, :]
                u += tl.load(up_bias + group * columns + column, mask=real, other=0.0).to(tl.float32)[None, :]
            keep = inside[:, None] & real[None, :]
            dtype = hidden.dtype.element_ty
            place = gate_up + row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
            tl.store(place, g.to(dtype), mask=keep)
            tl.store(place + columns, u.to(dtype), mask=keep)
            weight = tl.load(row_weights + row, mask=inside, other=0.0)
            g, u, sigmoid = activated(g.to(dtype).to(tl.float32), u.to(dtype).to(tl.float32), ALPHA, LIMIT, OFFSET)
            out = g * sigmoid * u * weight[:, None]
            tl.store(hidden + row.to(tl.int64)[:, None] * columns + column[None, :], out.to(dtype), mask=keep)
            total = tl.zeros([M, 2 * N], tl.float32)


@triton.jit
def activated(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """Give the clamped gate, the factor beside it, and the gate's sigmoid."""
    if LIMIT is not None:
        g = tl.minimum(g, LIMIT)
        u = tl.maximum(tl.minimum(u, LIMIT), -LIMIT)
    sigmoid = tl.sigmoid(g) if ALPHA == 1.0 else tl.sigmoid(ALPHA * g)
    if OFFSET != 0.0:
        u += OFFSET
    return g, u, sigmoid


@triton.jit
def down(
    hidden,
    weight,
    out,
    group_of_tile,
    first_of_tile,
    end_of_tile,
    num_tiles,
    inner,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Multiply rows [N, F] by the transposed down [E, D, F]."""
    # a program takes one tile after the other, and copies the operands of the next while it stores a result
    columns = in_eights(columns)
    tiles = tl.load(num_tiles) * tl.cdiv(columns, N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not cuda_capability_geq(10)):
        group, first, end, across = find_tile(number, group_of_tile, first_of_tile, end_of_tile, columns, N)
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, inner, K):
            h = hidden.load([first, start])
            total = tl.dot(h, weight.load([group, across * N, start]).reshape(N, K).T, total)
        store_tile(out, total, first, end, across, columns, M, N)


@triton.jit
def up_backward(
    grad_gate_up,
    both,
    out,
    group_of_tile,
    first_of_tile,
    end_of_tile,
    num_tiles,
    inner,
    columns,
    UP_FIRST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Multiply gradients [N, 2 F] by gate and up and add: the gradient of each row's token, [N, D].

    ``both`` has gate and up, or up and gate, [2, E, F, D].
    """
    # Gate's half and up's in turn, one product a step. Two in a step, into one sum, are compiled wrongly for compute
    # capability 10.0 (triton issue 10821), and on 9.0 each waits for the one before.
    columns = in_eights(columns)
    tiles = tl.load(num_tiles) * tl.cdiv(columns, N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not cuda_capability_geq(10)):
        group, first, end, across = find_tile(number, group_of_tile, first_of_tile, end_of_tile, columns, N)
        total = tl.zeros([M, N], tl.float32)
        for step in range(2 * tl.cdiv(inner, K)):
            half, start = step % 2, step // 2 * K
            # up's half follows gate's: beyond the end of gate's half the weights read zeros
            grad = grad_gate_up.load([first, half * inner + start])
            weight = both.load([1 - half if UP_FIRST else half, group, start, across * N]).reshape(K, N)
            total = tl.dot(grad, weight, total)
        store_tile(out, total, first, end, across, columns, M, N)


@triton.jit
def store_tile(out, values, first, end, across, columns, M: tl.constexpr, N: tl.constexpr):
    """Store the rows and columns of a tile that exist."""
    row = first + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    keep = (row < end)[:, None] & (column < columns)[None, :]
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=keep)


@triton.jit
def down_backward_swiglu(
    grad,
    token_of_row,
    weight,
    gate_up,
    row_weights,
    grad_gate_up,
    hidden,
    grad_weight_parts,
    group_of_tile,
    first_of_tile,
    end_of_tile,
    num_groups,
    num_rows,
    inner,
    columns,
    EVEN: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Multiply gathered gradients [T, D] by down [E, D, F]; compute SwiGLU's backward pass, and its output again.

    Each tile across writes its part of the gradient of the row weights, [tiles across, N].
    """
    inner, columns = in_eights(inner), in_eights(columns)
    group, first, end, across = find_tile(tl.program_id(0), group_of_tile, first_of_tile, end_of_tile, columns, N)
    if group == num_groups:
        return
    in_tile = tl.arange(0, M)
    row = first + in_tile
    inside = row < end
    gate_up += first.to(tl.int64) * (2 * columns)
    token = tl.load(token_of_row + row, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, K)
    place = grad + token[:, None] * inner + k[None, :]
    dh = tl.zeros([M, N], tl.float32)
    for start in range(0, inner, K):
        dy = tl.load(place) if EVEN else tl.load(place, mask=k[None, :] < inner - start, other=0.0)
        dh = tl.dot(dy, weight.load([group, start, across * N]).reshape(K, N), dh)
        place += K
    hidden += first.to(tl.int64) * columns
    grad_gate_up += first.to(tl.int64) * (2 * columns)
    # an eighth of the columns at a time: SwiGLU's backward needs five values of each, and registers are few
    left, right = halves(dh, M, N)
    a, b = halves(left, M, N // 2)
    c, d = halves(right, M, N // 2)
    s = tl.load(row_weights + row, mask=inside, other=0.0)
    grad_weight = tl.zeros([M], tl.float32)
    g_next, u_next = load_pair(gate_up, in_tile, across * N, inside, columns, N // 8)
    for part in tl.static_range(8):
        quarter = a if part // 2 == 0 else b if part // 2 == 1 else c if part // 2 == 2 else d
        first_half, second_half = halves(quarter, M, N // 4)
        dh = first_half if part % 2 == 0 else second_half
        g, u = g_next, u_next
        if part < 7:  # the next part's loads are under way while this part is computed
            g_next, u_next = load_pair(gate_up, in_tile, across * N + (part + 1) * (N // 8), inside, columns, N // 8)
        column = across * N + part * (N // 8) + tl.arange(0, N // 8)
        grad_weight += swiglu_backward(
            dh, g, u, s, in_tile, column, inside, columns, hidden, grad_gate_up, ALPHA, LIMIT, OFFSET
        )
    tl.store(grad_weight_parts + across.to(tl.int64) * num_rows + row, grad_weight, mask=inside)


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """Split [M, N] into its left and its right half."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def load_pair(gate_up, in_tile, column, inside, columns, N: tl.constexpr):
    """Load ``N`` columns of gate's and of up's outputs, of rows counted from ``gate_up``."""
    column += tl.arange(0, N)
    keep = inside[:, None] & (column < columns)[None, :]
    place = gate_up + in_tile[:, None] * (2 * columns) + column[None, :]
    return tl.load(place, mask=keep, other=0.0), tl.load(place + columns, mask=keep, other=0.0)


@triton.jit
def swiglu_backward(
    dh,
    g,
    u,
    weight,
    row,
    column,
    inside,
    columns,
    hidden,
    grad_gate_up,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Store SwiGLU's gradients and output for some columns; return their part of the row weights' gradient."""
    # rows are counted from the pointers
    keep = inside[:, None] & (column < columns)[None, :]
    dtype = hidden.dtype.element_ty
    wide = row[:, None] * (2 * columns) + column[None, :]
    g = g.to(tl.float32)
    u = u.to(tl.float32)
    if LIMIT is not None:
        gate_moves = g < LIMIT
        up_moves = tl.abs(u) < LIMIT
    g, u, sigmoid = activated(g, u, ALPHA, LIMIT, OFFSET)
    silu = g * sigmoid
    grad_weight = tl.sum(dh * silu * u, 1)
    dh *= weight[:, None]
    place = hidden + row[:, None] * columns + column[None, :]
    tl.store(place, (silu * u * weight[:, None]).to(dtype), mask=keep)
    grad_u = dh * silu
    if LIMIT is not None:
        grad_u = tl.where(up_moves, grad_u, 0.0)
    tl.store(grad_gate_up + wide + columns, grad_u.to(dtype), mask=keep)
    slope = sigmoid + silu * (1 - sigmoid) if ALPHA == 1.0 else sigmoid + ALPHA * silu * (1 - sigmoid)
    grad_g = dh * u * slope
    if LIMIT is not None:
        grad_g = tl.where(gate_moves, grad_g, 0.0)
    tl.store(grad_gate_up + wide, grad_g.to(dtype), mask=keep)
    return grad_weight


@triton.jit
def weight_gradient(
    left,
    right,
    token_of_row,
    ends,
    out,
    out_behind,
    rows,
    columns,
    groups,
    MAX_GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Sum left^T right over the rows of each expert, [E, rows, columns].

    ``left`` has ``rows`` columns for ``out``; with two outputs, as many follow for ``out_behind``. In the last step of
    an expert, rows of the next one are multiplied by the gathered operand's zeros.
    """
    rows, columns = in_eights(rows), in_eights(columns)
    # One loop goes through the steps of all tiles of a program, so that the operands of the next tile are copied while
    # one is stored. The compiler makes such a loop of two itself where all tiles have as many steps; here they do not.
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_down, tiles_across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    tiles = tiles_down * tiles_across  # of an output of a group
    each = tl.arange(0, MAX_GROUPS)
    real = each < groups
    sizes = tl.load(ends + each, mask=real, other=0) - tl.load(ends + each - 1, mask=real & (each > 0), other=0)
    after, before = (each + 1) * tiles * OUTPUTS - program, each * tiles * OUTPUTS - program
    tiles_here = tl.cdiv(tl.maximum(after, 0), programs) - tl.cdiv(tl.maximum(before, 0), programs)
    steps = tl.sum(tl.where(real, tiles_here * tl.maximum(tl.cdiv(sizes, K), 1), 0), 0)  # without rows: one, of zeros
    number, steps_left = program - programs, 0
    group, half, tile_down, across, start, end = 0, 0, 0, 0, 0, 0
    total = tl.zeros([M, N], tl.float32)
    for _ in range(steps):
        if steps_left == 0:
            number += programs
            group = number // (tiles * OUTPUTS)
            half = number // tiles % OUTPUTS  # both halves run together, and share the gathered operand in the cache
            tile = number % tiles
            # 8 tiles down, then the next across: programs that run together share operands in the cache
            tile_down, across = tl.swizzle2d(tile // tiles_across, tile % tiles_across, tiles_down, tiles_across, 8)
            start = tl.load(ends + group - 1, mask=group > 0, other=0)
            end = tl.load(ends + group)
            steps_left = tl.maximum(tl.cdiv(end - start, K), 1) - 1
        else:
            start += K
            steps_left -= 1
        if GATHER_LEFT:
            a = gathered(left, token_of_row, start, end, tile_down * M, rows, M, K)
            b = right.load([start, across * N])
        else:
            a = left.load([start, half * rows + tile_down * M])
            b = gathered(right, token_of_row, start, end, across * N, columns, N, K)
        total = tl.dot(a.T, b, total)
        if steps_left == 0:
            result = total.to(out.dtype).reshape(1, M, N)
            if half == 0:
                out.store([group, tile_down * M, across * N], result)
            else:
                out_behind.store([group, tile_down * M, across * N], result)
            total = tl.zeros([M, N], tl.float32)


@triton.jit
def gathered(tokens, token_of_row, start, end, first, width, N: tl.constexpr, K: tl.constexpr):
    """Load ``N`` columns from ``first`` on of the tokens of ``K`` rows, [K, N]; zeros from the row ``end`` on."""
    row = start + tl.arange(0, K)
    column = first + tl.arange(0, N)
    inside = row < end
    token = tl.load(token_of_row + row, mask=inside, other=0).to(tl.int64)
    keep = inside[:, None] & (column < width)[None, :]
    return tl.load(tokens + token[:, None] * width + column[None, :], mask=keep, other=0.0)


@triton.jit
def gather_sum(rows, row_of_slot, first_of_token, row_weights, out, width, SLOTS: tl.constexpr, N: tl.constexpr):
    """Add up the rows of each token's slots, at most ``SLOTS``, in fp32; times ``row_weights``, if not None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    slot = tl.load(first_of_token + token) + tl.arange(0, SLOTS)
    inside = slot < tl.load(first_of_token + token + 1)
    row = tl.load(row_of_slot + slot, mask=inside, other=0).to(tl.int64)
    values = tl.load(
        rows + row[:, None] * width + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0
    )
    values = values.to(tl.float32)
    if row_weights is not None:
        values *= tl.load(row_weights + row, mask=inside, other=0.0)[:, None]
    total = tl.sum(values, 0)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
