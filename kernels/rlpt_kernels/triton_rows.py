"""Row kernels over logits that a matmul has written: softmax statistics, and the gradient that goes back into
two matmuls.

One program per row walks it in blocks; nothing is shared between rows, so a row's numbers depend on that row
alone.
"""

# Device code: Triton's own types do not describe what its compiler accepts.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from rlpt_kernels.triton_kernels import LN2, _pull, _scores


@triton.jit
def _row_statistics(
    raw_ptr, bias_ptr, keep_ptr, scale, target, V, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(max, sum, target's score, moment, argmax) of one row, base 2, by an online softmax over blocks."""
    row_max = tl.full((), float("-inf"), tl.float32)
    row_sum, moment = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    argmax = tl.zeros((), tl.int32)
    found = tl.full((), float("-inf"), tl.float32)
    for first in range(0, V, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        raw_B = tl.load(raw_ptr + column_B, mask=column_B < V, other=0.0)
        score_1B, _ = _scores(
            raw_B[None, :], bias_ptr, keep_ptr, scale, column_B, V, softcap, BIAS, SOFTCAP, BANNED
        )
        score_B = tl.where(column_B < V, tl.reshape(score_1B, (BLOCK,)), float("-inf"))
        found = tl.maximum(
            found, tl.max(tl.where(column_B == target, score_B, float("-inf")), axis=0)
        )
        best, where = tl.max(score_B, axis=0, return_indices=True)
        argmax = tl.where(best > row_max, where + first, argmax)
        new_max = tl.maximum(row_max, best)
        floor = tl.where(new_max == float("-inf"), 0.0, new_max)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - floor)
        shifted_B = score_B - floor
        weight_B = tl.exp2(shifted_B)
        if ENTROPY:
            finite_B = tl.where(shifted_B == float("-inf"), 0.0, shifted_B)
            moment = tl.exp2(shift) * (moment + shift * row_sum) + tl.sum(
                weight_B * finite_B, axis=0
            )
        row_sum = tl.exp2(shift) * row_sum + tl.sum(weight_B, axis=0)
        row_max = new_max
    return row_max, row_sum, found, moment, argmax


@triton.jit
def _write_gradient(
    raw_ptr, out_ptr, bias_ptr, keep_ptr, scale, target, V, softcap,
    row_max, log2_sum, factor, live, entropy_factor, entropy,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row of logits, read once more."""
    for first in range(0, V, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        raw_B = tl.load(raw_ptr + column_B, mask=column_B < V, other=0.0)
        score_1B, bent_1B = _scores(
            raw_B[None, :], bias_ptr, keep_ptr, scale, column_B, V, softcap, BIAS, SOFTCAP, BANNED
        )
        d_1B = _pull(score_1B, bent_1B, row_max, log2_sum, factor, entropy_factor, entropy, ENTROPY)
        d_1B += tl.where(column_B == target, live, 0.0)[None, :]
        if SOFTCAP:
            d_1B *= 1.0 - bent_1B * bent_1B
        d_B = tl.reshape(d_1B, (BLOCK,)) * (scale * LN2)
        tl.store(out_ptr + column_B, d_B.to(out_ptr.dtype.element_ty), mask=column_B < V)


@triton.jit
def scan_rows_kernel(
    raw_ptr, raw_stride, target_ptr, scale_ptr, bias_ptr, keep_ptr, N, V, softcap, out_ptr, argmax_ptr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """raw[N, V] -> out[4, N] (max, sum, target, moment; base 2) and argmax[N]."""
    row = tl.program_id(0)
    row_max, row_sum, found, moment, argmax = _row_statistics(
        raw_ptr + row.to(tl.int64) * raw_stride, bias_ptr, keep_ptr, tl.load(scale_ptr + row),
        tl.load(target_ptr + row).to(tl.int32), V, softcap, BIAS, SOFTCAP, BANNED, ENTROPY, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + row, row_max)
    tl.store(out_ptr + N + row, row_sum)
    tl.store(out_ptr + 2 * N + row, found)
    tl.store(out_ptr + 3 * N + row, moment)
    tl.store(argmax_ptr + row, argmax.to(tl.int64))


@triton.jit
def pull_rows_kernel(
    raw_ptr, raw_stride, target_ptr, scale_ptr, bias_ptr, keep_ptr, N, V, softcap, row_ptr, out_ptr, out_stride,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of raw[N, V] -> out[N, V]; row[6, N] as in `pull_kernel`."""
    row = tl.program_id(0)
    at = row_ptr + row
    _write_gradient(
        raw_ptr + row.to(tl.int64) * raw_stride, out_ptr + row.to(tl.int64) * out_stride, bias_ptr, keep_ptr,
        tl.load(scale_ptr + row), tl.load(target_ptr + row).to(tl.int32), V, softcap,
        tl.load(at), tl.load(at + N), tl.load(at + 2 * N), tl.load(at + 3 * N), tl.load(at + 4 * N),
        tl.load(at + 5 * N), BIAS, SOFTCAP, BANNED, ENTROPY, BLOCK,
    )  # fmt: skip


@triton.jit
def _coefficient(
    logp, behaviour_logp, advantage, weight, log_low, log_high, tv_delta, log_cap,
    TRUST: tl.constexpr,
):  # fmt: skip
    """weight M min(ratio, cap) advantage, as in `objective.coefficients`. TRUST: its place in `TRUST_REGIONS`."""
    log_ratio = logp - behaviour_logp
    away = ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))
    masked = log_ratio < float("-inf")
    if TRUST == 1:
        masked = ((advantage > 0) & (log_ratio > log_high)) | (
            (advantage < 0) & (log_ratio < log_low)
        )
    if TRUST == 2:
        distance = tl.abs(tl.exp(logp) - tl.exp(behaviour_logp))
        masked = away & (distance > tv_delta)
    # Not a minimum, which may pass over a NaN.
    ratio = tl.exp(tl.where(log_ratio > log_cap, log_cap, log_ratio))
    kept = (weight != 0) & (advantage != 0) & (masked == 0)
    # Select, never multiply by 0: a row that is left out may hold anything.
    return tl.where(kept, weight * ratio * advantage, 0.0)


@triton.jit
def policy_rows_kernel(
    raw_ptr, raw_stride, target_ptr, scale_ptr, bias_ptr, keep_ptr, N, V, softcap,
    behaviour_ptr, advantage_ptr, weight_ptr, logp_ptr, coefficient_ptr, entropy_ptr, out_ptr, out_stride,
    log_low, log_high, tv_delta, log_cap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr,
    TRUST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, start to end: log p, its policy-gradient coefficient, and the loss's gradient of its logits."""
    row = tl.program_id(0)
    raw = raw_ptr + row.to(tl.int64) * raw_stride
    scale, target = tl.load(scale_ptr + row), tl.load(target_ptr + row).to(tl.int32)
    row_max, row_sum, found, moment, _ = _row_statistics(
        raw, bias_ptr, keep_ptr, scale, target, V, softcap, BIAS, SOFTCAP, BANNED, ENTROPY, BLOCK
    )
    log2_sum = tl.log2(row_sum)
    logp = (found - row_max - log2_sum) * LN2
    coefficient = _coefficient(
        logp, tl.load(behaviour_ptr + row), tl.load(advantage_ptr + row), tl.load(weight_ptr + row),
        log_low, log_high, tv_delta, log_cap, TRUST,
    )  # fmt: skip
    tl.store(logp_ptr + row, logp)
    tl.store(coefficient_ptr + row, coefficient)
    if ENTROPY:
        tl.store(entropy_ptr + row, (log2_sum - moment / row_sum) * LN2)
    _write_gradient(
        raw, out_ptr + row.to(tl.int64) * out_stride, bias_ptr, keep_ptr, scale, target, V, softcap,
        row_max, log2_sum, coefficient, -coefficient, 0.0, 0.0, BIAS, SOFTCAP, BANNED, False, BLOCK,
    )  # fmt: skip
