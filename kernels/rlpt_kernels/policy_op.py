"""The one-pass policy loss as an operator: its forward leaves the gradients, its backward scales them (6NDV in all)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlpt_kernels.checks import check_values
from rlpt_kernels.chunked import CHUNKED
from rlpt_kernels.head import Head, Needs, Wanted
from rlpt_kernels.matmul import exact
from rlpt_kernels.objective import Ratio
from rlpt_kernels.ops import placed, problem_of
from rlpt_kernels.rows import Terms


@torch.library.custom_op("rlpt_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Tensor | None,
    temperature_N: Tensor | None, behaviour_logp: Tensor, advantage: Tensor, mask: Tensor, temperature: float,
    softcap: float | None, ignore_index: int, banned: Sequence[int], vocab_stop: int, trust_region: str,
    clip_low: float, clip_high: float, tv_delta: float, max_ratio: float | None, entropy: bool,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, logp, coefficient, entropy, d_hidden, d_weight, d_bias)."""
    per_row = temperature if temperature_N is None else temperature_N
    head = Head.of(per_row, softcap, banned, hidden.device)
    check_values(target, ignore_index, vocab_stop, rows, len(hidden), bias, head)
    problem = problem_of(hidden, weight, bias, target, rows, head, ignore_index, 0, vocab_stop)
    ratio = Ratio(trust_region, clip_low, clip_high, tv_delta, max_ratio)  # pyright: ignore[reportArgumentType]
    used_N = (mask != 0) & (target != ignore_index)
    terms = Terms(
        behaviour_logp, advantage, torch.where(used_N, mask, torch.zeros_like(mask)), ratio
    )
    terms, needs = terms.to(problem.dtype), Needs(need_hidden, need_weight, need_bias)
    live_K = (used_N & (advantage != 0)).nonzero()[:, 0]
    idle_K = (used_N & (advantage == 0)).nonzero()[:, 0]
    with exact(hidden.device):
        live, found = CHUNKED.policy(problem.of_rows(live_K), terms.of_rows(live_K), entropy, needs)
        # Rows that can move nothing are scored for the monitors' sake, without the matmuls of a gradient.
        idle = CHUNKED.scan(problem.of_rows(idle_K), Wanted(entropy=entropy))
    order_K, zero_N = torch.cat([live_K, idle_K]), live.logp_N.new_zeros(len(target))
    logp_N = zero_N.index_put((order_K,), torch.cat([live.logp_N, idle.logp()]))
    entropy_N = zero_N.new_empty(0)
    idle_entropy_N = idle.entropy()
    if live.entropy_N is not None and idle_entropy_N is not None:
        entropy_N = zero_N.index_put((order_K,), torch.cat([live.entropy_N, idle_entropy_N]))
    coefficient_N = zero_N.index_put((live_K,), live.coefficient_N)
    where_K = live_K if rows is None else rows[live_K]
    gradients = placed(found, hidden, weight, bias, where_K, "")
    return terms.coefficients(logp_N).loss(logp_N), logp_N, coefficient_N, entropy_N, *gradients


@linear_policy_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    real = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    entropy, need_hidden, need_weight, need_bias = rest[-4:]
    per_row = torch.empty_like(target, dtype=real)
    return (
        per_row.new_empty(()), per_row, torch.empty_like(per_row),
        torch.empty_like(per_row) if entropy else per_row.new_empty(0),
        hidden.new_empty(hidden.shape, dtype=real) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=real) if need_weight else weight.new_empty(0),
        weight.new_empty(len(weight), dtype=real) if need_bias else weight.new_empty(0),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # In float32 until they meet the gradient from above: a loss scale comes before the rounding.
    ctx.save_for_backward(*output[4:])
    ctx.count, ctx.dtypes = len(inputs), [None if x is None else x.dtype for x in inputs[:3]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * ctx.count
    needs = ctx.needs_input_grad[:3]
    scaled = [
        (gradient * d_loss).to(dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]
    return (*scaled, *(None for _ in range(ctx.count - 3)))


linear_policy_loss_op.register_autograd(_backward, setup_context=_setup)
