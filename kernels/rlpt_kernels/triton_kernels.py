"""The Triton kernels themselves: device code, launched by `fused` and `rows`.

Scores live in base 2: score * log2(e) / temperature is one multiplication, and exp2 is what the hardware has.
No kernel uses atomics, a carried state between tiles, or a shape that depends on N: a row's numbers depend on
that row alone, bit for bit.

Offsets that could pass 2^31 (row x vocabulary, row x width) are 64-bit: `.to(tl.int64)` on the row before it
is multiplied.
"""

# Device code: Triton's own types do not describe what its compiler accepts.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile_of(step, k_tiles, tiles_m, tiles_v, GROUP: tl.constexpr):
    """(row tile, id tile, k tile) of a program's step: row tiles run fastest inside groups of GROUP, so that
    both stay in L2.
    """
    tile = tl.program_id(0) + (step // k_tiles) * tl.num_programs(0)
    group = tile // (GROUP * tiles_v)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile - group * GROUP * tiles_v
    return first + within % height, within // height, step % k_tiles


@triton.jit
def _load(
    matrix, stride, row, k, rows, width, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr
):
    """A (ROWS, BK) tile; zeros outside the matrix."""
    if TMA:
        tile = matrix.load([row, k])
    else:
        # 64 bits for the tile's corner, 32 inside it: a tensor of 64-bit offsets would spill.
        corner = matrix + tl.cast(row, tl.int64) * stride + k
        row_R, k_K = tl.arange(0, ROWS), tl.arange(0, BK)
        inside_RK = (row + row_R < rows)[:, None] & (k + k_K < width)[None, :]
        tile = tl.load(corner + row_R[:, None] * stride + k_K[None, :], mask=inside_RK, other=0.0)
    return tile


@triton.jit
def _tanh(x):
    """No libdevice: the interpreter has none. Near 0, where 2 sigmoid(2x) - 1 cancels, the series up to x^9."""
    y = x * x
    series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(y < 0.09, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _scores(
    raw, bias_ptr, keep_ptr, scale, column_V, V, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr,
):  # fmt: skip
    """softcap * tanh((raw + bias) / softcap) * scale, and the tanh (raw without a softcap).

    BANNED, a score is -inf where keep is 0 or its id beyond the last; else that is the caller's to mask.
    """
    inside_V = column_V < V
    if BIAS:
        raw += tl.load(bias_ptr + column_V, mask=inside_V, other=0.0).to(tl.float32)[None, :]
    bent = raw
    score = raw
    if SOFTCAP:
        bent = _tanh(raw / softcap)
        score = softcap * bent
    score = score * scale
    if BANNED:
        keep_V = tl.load(keep_ptr + column_V, mask=inside_V, other=0)
        score = tl.where((keep_V != 0)[None, :], score, float("-inf"))
    return score, bent


@triton.jit
def scan_kernel(
    hidden, weight, hidden_stride, weight_stride,
    target_ptr, scale_ptr, bias_ptr, banned_ptr, border_ptr, threshold_ptr, partial_ptr, index_ptr,
    N, V, D, softcap,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, COUNT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T tile by tile, each tile reduced to a partial softmax (or, COUNT, to the scores above
    a threshold).

    One flat persistent loop over (tile, k): both indices are computed at its top, so the loads of the next
    tile are issued before the epilogue of this one. Counters carried across iterations would lose that
    prefetch.
    """
    tiles_m, tiles_v, k_tiles = tl.cdiv(N, BM), tl.cdiv(V, BN), tl.cdiv(D, BK)
    mine = tl.cdiv(tiles_m * tiles_v - tl.program_id(0), tl.num_programs(0))
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in tl.range(0, mine * k_tiles):
        m, v, k = _tile_of(step, k_tiles, tiles_m, tiles_v, GROUP)
        a = _load(hidden, hidden_stride, m * BM, k * BK, N, D, BM, BK, TMA)
        b = _load(weight, weight_stride, v * BN, k * BK, V, D, BN, BK, TMA)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if k == k_tiles - 1:
            row_M = m * BM + tl.arange(0, BM)
            column_V = v * BN + tl.arange(0, BN)
            inside_M = row_M < N
            scale_M = tl.load(scale_ptr + row_M, mask=inside_M, other=1.0)
            score, _ = _scores(
                acc, bias_ptr, bias_ptr, scale_M[:, None], column_V, V, softcap, BIAS, SOFTCAP,
                False,
            )  # fmt: skip
            edge = v == tiles_v - 1
            if BANNED:
                first, last = tl.load(border_ptr + v), tl.load(border_ptr + v + 1)
                edge = edge | (first < last)
            if edge:
                score = tl.where((column_V < V)[None, :], score, float("-inf"))
                if BANNED:
                    # One id at a time: a mask of a whole tile's columns would not fit beside the scores.
                    for place in range(first, last):
                        score = tl.where(
                            (column_V == tl.load(banned_ptr + place))[None, :], float("-inf"), score
                        )
            target_M = tl.load(target_ptr + row_M, mask=inside_M, other=-1).to(tl.int32)
            if COUNT:
                _store_count(score, row_M, v, N, threshold_ptr, index_ptr)
            else:
                _store_partial(
                    score, row_M, column_V, target_M, v, N, partial_ptr, index_ptr, ENTROPY, ARGMAX,
                    BN,
                )  # fmt: skip
            acc = tl.zeros((BM, BN), dtype=tl.float32)


@triton.jit
def _store_count(score, row_M, v, N, threshold_ptr, index_ptr):
    """How many scores of one tile are above the threshold -> index[v, rows]."""
    inside_M = row_M < N
    bar_M = tl.load(threshold_ptr + row_M, mask=inside_M, other=0.0)
    # The target's own score comes from the same tile and rounds to the same bits: it is not above itself.
    count_M = tl.sum((score > bar_M[:, None]).to(tl.int32), axis=1)
    tl.store(index_ptr + v.to(tl.int64) * N + row_M, count_M, mask=inside_M)


@triton.jit
def _store_partial(
    score, row_M, column_V, target_M, v, N, partial_ptr, index_ptr,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(max, sum, target's score[, moment]) of one tile -> partial[v, :, rows]."""
    inside_M = row_M < N
    COLUMNS: tl.constexpr = 4 if ENTROPY else 3
    base = partial_ptr + v.to(tl.int64) * COLUMNS * N + row_M
    if ARGMAX:
        max_M, where_M = tl.max(score, axis=1, return_indices=True)
        tl.store(index_ptr + v.to(tl.int64) * N + row_M, where_M + v * BN, mask=inside_M)
    else:
        max_M = tl.max(score, axis=1)
    # A tile without any finite score: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    floor_M = tl.where(max_M == float("-inf"), 0.0, max_M)
    hit_M = (target_M >= v * BN) & (target_M < v * BN + BN)
    found_M = tl.full(target_M.shape, float("-inf"), tl.float32)
    if tl.max(hit_M.to(tl.int32), axis=0) > 0:
        found_M = tl.max(
            tl.where(column_V[None, :] == target_M[:, None], score, float("-inf")), axis=1
        )
    shifted = score - floor_M[:, None]
    weight = tl.exp2(shifted)
    tl.store(base, max_M, mask=inside_M)
    tl.store(base + N, tl.sum(weight, axis=1), mask=inside_M)
    tl.store(base + 2 * N, found_M, mask=inside_M)
    if ENTROPY:
        finite = tl.where(shifted == float("-inf"), 0.0, shifted)
        tl.store(base + 3 * N, tl.sum(weight * finite, axis=1), mask=inside_M)


@triton.jit
def combine_kernel(
    partial_ptr, index_ptr, out_ptr, argmax_ptr, N, tiles,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """partial[tiles, columns, N] -> out[columns, N], in an order that depends on the number of tiles alone."""
    COLUMNS: tl.constexpr = 4 if ENTROPY else 3
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < N
    max_R = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    target_R = tl.full((ROWS,), float("-inf"), tl.float32)
    moment_R = tl.zeros((ROWS,), tl.float32)
    argmax_R = tl.zeros((ROWS,), tl.int32)
    for first in range(0, tiles, TILES):
        tile_T = first + tl.arange(0, TILES)
        inside = (tile_T < tiles)[:, None] & inside_R[None, :]
        offset = tile_T.to(tl.int64)[:, None] * COLUMNS * N + row_R[None, :]
        max_TR = tl.load(partial_ptr + offset, mask=inside, other=float("-inf"))
        sum_TR = tl.load(partial_ptr + offset + N, mask=inside, other=0.0)
        target_TR = tl.load(partial_ptr + offset + 2 * N, mask=inside, other=float("-inf"))
        block_R = tl.max(max_TR, axis=0)
        if ARGMAX:
            index_TR = tl.load(
                index_ptr + tile_T.to(tl.int64)[:, None] * N + row_R[None, :], mask=inside, other=0
            )
            # The lowest of equals: within the block by taking the least index, before it by `>`.
            best_TR = tl.where(max_TR == block_R[None, :], index_TR, 2147483647)
            argmax_R = tl.where(block_R > max_R, tl.min(best_TR, axis=0), argmax_R)
        new_R = tl.maximum(max_R, block_R)
        floor_R = tl.where(new_R == float("-inf"), 0.0, new_R)
        shift_R = tl.where(max_R == float("-inf"), 0.0, max_R - floor_R)
        shift_TR = tl.where(max_TR == float("-inf"), 0.0, max_TR - floor_R[None, :])
        if ENTROPY:
            moment_TR = tl.load(partial_ptr + offset + 3 * N, mask=inside, other=0.0)
            moved_TR = tl.exp2(shift_TR) * (moment_TR + shift_TR * sum_TR)
            moment_R = tl.exp2(shift_R) * (moment_R + shift_R * sum_R) + tl.sum(moved_TR, axis=0)
        sum_R = tl.exp2(shift_R) * sum_R + tl.sum(tl.exp2(shift_TR) * sum_TR, axis=0)
        target_R = tl.maximum(target_R, tl.max(target_TR, axis=0))
        max_R = new_R
    tl.store(out_ptr + row_R, max_R, mask=inside_R)
    tl.store(out_ptr + N + row_R, sum_R, mask=inside_R)
    tl.store(out_ptr + 2 * N + row_R, target_R, mask=inside_R)
    if ENTROPY:
        tl.store(out_ptr + 3 * N + row_R, moment_R, mask=inside_R)
    if ARGMAX:
        tl.store(argmax_ptr + row_R, argmax_R.to(tl.int64), mask=inside_R)


@triton.jit
def _pull(
    score, bent, max_R1, log2_sum_R1, softmax_factor_R1, entropy_factor_R1, entropy_R1,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """p (g_lse - g_logp - g_H (log p + H)): the gradient of a row's scores, but for the target's own term."""
    log2_p = score - max_R1 - log2_sum_R1
    factor = softmax_factor_R1
    if ENTROPY:
        finite = tl.where(log2_p == float("-inf"), 0.0, log2_p)
        factor = factor - entropy_factor_R1 * (finite * LN2 + entropy_R1)
    return tl.exp2(log2_p) * factor


@triton.jit
def pull_kernel(
    hidden, weight, hidden_stride, weight_stride,
    target_ptr, scale_ptr, bias_ptr, row_ptr, out, out_stride,
    N, V, D, softcap,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of one slab of logits -> out[N, V]: the scores once more, then `_pull`, softcap and temperature.

    row[6, N] holds max, log2 sum, softmax factor, live (the target's own term), entropy factor and entropy.
    """
    tiles_m, tiles_v, k_tiles = tl.cdiv(N, BM), tl.cdiv(V, BN), tl.cdiv(D, BK)
    mine = tl.cdiv(tiles_m * tiles_v - tl.program_id(0), tl.num_programs(0))
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in tl.range(0, mine * k_tiles):
        m, v, k = _tile_of(step, k_tiles, tiles_m, tiles_v, GROUP)
        a = _load(hidden, hidden_stride, m * BM, k * BK, N, D, BM, BK, TMA)
        b = _load(weight, weight_stride, v * BN, k * BK, V, D, BN, BK, TMA)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if k == k_tiles - 1:
            row_M = m * BM + tl.arange(0, BM)
            column_V = v * BN + tl.arange(0, BN)
            inside_M = row_M < N
            scale_M = tl.load(scale_ptr + row_M, mask=inside_M, other=1.0)
            d_raw = _slab_gradient(
                acc, row_ptr + row_M, inside_M, N, target_ptr + row_M, scale_M, bias_ptr,
                column_V, V, softcap, BIAS, SOFTCAP, ENTROPY,
            )  # fmt: skip
            if TMA:
                out.store([m * BM, v * BN], d_raw.to(out.dtype))
            else:
                corner = out + tl.cast(m * BM, tl.int64) * out_stride + v * BN
                offset = tl.arange(0, BM)[:, None] * out_stride + tl.arange(0, BN)[None, :]
                inside = inside_M[:, None] & (column_V < V)[None, :]
                tl.store(corner + offset, d_raw.to(out.dtype.element_ty), mask=inside)
            acc = tl.zeros((BM, BN), dtype=tl.float32)


@triton.jit
def _slab_gradient(
    raw, row_ptr, inside_M, N, target_ptr, scale_M, bias_ptr, column_V, V, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    score, bent = _scores(
        raw, bias_ptr, bias_ptr, scale_M[:, None], column_V, V, softcap, BIAS, SOFTCAP, False
    )
    max_M = tl.load(row_ptr, mask=inside_M, other=0.0)
    log2_sum_M = tl.load(row_ptr + N, mask=inside_M, other=0.0)
    factor_M = tl.load(row_ptr + 2 * N, mask=inside_M, other=0.0)
    live_M = tl.load(row_ptr + 3 * N, mask=inside_M, other=0.0)
    entropy_factor_M = factor_M
    entropy_M = factor_M
    if ENTROPY:
        entropy_factor_M = tl.load(row_ptr + 4 * N, mask=inside_M, other=0.0)
        entropy_M = tl.load(row_ptr + 5 * N, mask=inside_M, other=0.0)
    target_M = tl.load(target_ptr, mask=inside_M, other=-1).to(tl.int32)
    d_score = _pull(
        score, bent, max_M[:, None], log2_sum_M[:, None], factor_M[:, None],
        entropy_factor_M[:, None], entropy_M[:, None], ENTROPY,
    )  # fmt: skip
    d_score += tl.where(column_V[None, :] == target_M[:, None], live_M[:, None], 0.0)
    if SOFTCAP:
        d_score *= 1.0 - bent * bent
    # scale = log2(e) / T, and a gradient is divided by T.
    return d_score * (scale_M * LN2)[:, None]
