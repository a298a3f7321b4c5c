"""The operators that PyTorch sees: opaque to `torch.compile`, with fake kernels for shapes and registered backwards.

An operator's outputs are fixed, so those that nobody asked for are empty.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlpt_kernels.checks import check_scores, check_values
from rlpt_kernels.chunked import CHUNKED
from rlpt_kernels.fused import Fused
from rlpt_kernels.head import Gradients, Head, Needs, Problem, Wanted
from rlpt_kernels.matmul import exact
from rlpt_kernels.shards import merge, summed
from rlpt_kernels.slabs import SLABS, SLABS_BF16
from rlpt_kernels.softmax import Pull, Softmax


@runtime_checkable
class Implementation(Protocol):
    """How one share of the vocabulary is walked."""

    def unit(self, problem: Problem, wanted: Wanted) -> float:
        """In how many nats `scan` counts scores."""
        ...

    def scan(self, problem: Problem, wanted: Wanted) -> Softmax:
        """The softmax of every row."""
        ...

    def count(self, problem: Problem, threshold_N: Tensor) -> Tensor:
        """How many scores are above a threshold that `scan` has found."""
        ...

    def pull(self, problem: Problem, pull: Pull, needs: Needs) -> Gradients:
        """From the gradients of the outputs to those of the inputs."""
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    "slabs": SLABS,
    "slabs_bf16": SLABS_BF16,
    "chunked": CHUNKED,
    "triton": Fused(),
}


@torch.library.custom_op("rlpt_kernels::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Tensor | None,
    temperature_N: Tensor | None, temperature: float, softcap: float | None, ignore_index: int,
    banned: Sequence[int], entropy: bool, argmax: bool, rank: bool, vocab_start: int, vocab_stop: int,
    group: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, logsumexp, entropy, argmax, rank, max, sum); the last two are for the backward."""
    head = Head.of(_either(temperature, temperature_N), softcap, banned, hidden.device)
    vocab = None if group else vocab_stop
    check_values(target, ignore_index, vocab, rows, len(hidden), None if group else bias, head)
    problem = problem_of(
        hidden, weight, bias, target, rows, head, ignore_index, vocab_start, vocab_stop
    )
    implementation, wanted = IMPLEMENTATIONS[impl], Wanted(entropy, argmax, rank)
    with exact(hidden.device):
        softmax = implementation.scan(problem, wanted)
        if group:
            softmax, vocab = merge(softmax, vocab_start, vocab_stop, wanted, group)
            check_values(target, ignore_index, vocab, None, 0, None, Head())
            check_scores(softmax.logsumexp())
        above_N = target.new_empty(0).long()
        if rank:
            above_N = implementation.count(problem, softmax.target_N)
    if rank and group:
        summed(above_N, group)
    ignored_N = target == ignore_index
    empty = softmax.max_N.new_empty(0)
    entropy_N, argmax_N = softmax.entropy(), softmax.argmax_N
    return (
        softmax.logp().masked_fill(ignored_N, 0.0),
        softmax.logsumexp(),
        empty if entropy_N is None else entropy_N,
        empty.long() if argmax_N is None else argmax_N.clone(),
        above_N.masked_fill(ignored_N, -1) if rank else above_N,
        softmax.max_N.clone(),
        softmax.sum_N.clone(),
    )


@torch.library.custom_op("rlpt_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Tensor | None,
    temperature_N: Tensor | None, temperature: float, softcap: float | None, ignore_index: int,
    banned: Sequence[int], entropy: bool, argmax: bool, rank: bool, vocab_start: int, vocab_stop: int,
    group: str, impl: str, logp: Tensor, entropy_N: Tensor, max_N: Tensor, sum_N: Tensor,
    d_logp: Tensor | None, d_logsumexp: Tensor | None, d_entropy: Tensor | None,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_hidden, d_weight, d_bias). Rows without any gradient are dropped before the first matmul, which is exact."""
    head = Head.of(_either(temperature, temperature_N), softcap, banned, hidden.device)
    problem = problem_of(
        hidden, weight, bias, target, rows, head, ignore_index, vocab_start, vocab_stop
    )
    implementation, needs = IMPLEMENTATIONS[impl], Needs(need_hidden, need_weight, need_bias)
    live_N = torch.zeros_like(max_N)
    if d_logp is not None:
        live_N = torch.where((target != ignore_index) & ~torch.isneginf(logp), d_logp, 0.0)
    factor_N = -live_N if d_logsumexp is None else d_logsumexp - live_N
    pull = Pull(
        problem.target_N, max_N, sum_N, factor_N, live_N, d_entropy, None if d_entropy is None else entropy_N,
        implementation.unit(problem, Wanted(entropy, argmax, rank)),
    )  # fmt: skip
    moved_N = (live_N != 0) | (factor_N != 0)
    if d_entropy is not None:
        moved_N |= d_entropy != 0
    index_K = moved_N.nonzero()[:, 0]
    if len(index_K) < len(moved_N):
        problem, pull = problem.of_rows(index_K), pull.of_rows(index_K)
        rows = index_K if rows is None else rows[index_K]
    with exact(hidden.device):
        found = implementation.pull(problem, pull, needs)
    d_hidden, d_weight, d_bias = placed(found, hidden, weight, bias, rows, group)
    d_bias = d_bias if bias is None else d_bias.to(bias.dtype)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _either(temperature: float, temperature_N: Tensor | None) -> float | Tensor:
    return temperature if temperature_N is None else temperature_N


def problem_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Tensor | None,
    head: Head, ignore_index: int, vocab_start: int, vocab_stop: int,
) -> Problem:  # fmt: skip
    """This rank's share: rows gathered, padding cut off, ids counted from the share's first."""
    count = vocab_stop - vocab_start
    inside_N = (target != ignore_index) & (target >= vocab_start) & (target < vocab_stop)
    local_N = torch.where(inside_N, target.long() - vocab_start, -1)
    hidden_ND = hidden if rows is None else hidden.index_select(0, rows)
    local = tuple(v - vocab_start for v in head.banned if vocab_start <= v < vocab_stop)
    head = replace(head, banned=local, banned_B=head.columns(vocab_start, count))
    return Problem(hidden_ND, weight[:count], None if bias is None else bias[:count], local_N, head)


def placed(
    found: Gradients,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the places of the inputs, in the dtypes they were summed in: dH of repeated rows is summed."""
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if found.hidden_ND is not None:
        d_hidden = (
            found.hidden_ND if rows is None else _scattered(found.hidden_ND, rows, len(hidden))
        )
        d_hidden = summed(d_hidden, group) if group else d_hidden
    if found.weight_VD is not None:
        d_weight = _padded(found.weight_VD, len(weight))
    if found.bias_V is not None and bias is not None:
        d_bias = _padded(found.bias_V, len(bias))
    return d_hidden, d_weight, d_bias


def _scattered(value_ND: Tensor, rows_N: Tensor, height: int) -> Tensor:
    """Rows put where they came from, repeated ones summed in a fixed order: the choice differs by device."""
    whole_MD = value_ND.new_zeros(height, value_ND.shape[1])
    if value_ND.is_cuda:
        return whole_MD.index_put_((rows_N,), value_ND, accumulate=True)
    return whole_MD.index_add_(0, rows_N, value_ND)


def _padded(gradient: Tensor, length: int) -> Tensor:
    missing = length - len(gradient)
    return (
        torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])])
        if missing
        else gradient
    )


# ---- what autograd and the compiler are told ---------------------------------------------------


@linear_logprob_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Any, temperature_N: Any,
    temperature: Any, softcap: Any, ignore_index: Any, banned: Any, entropy: bool, argmax: bool, rank: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    real = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    (count,), device = target.shape, hidden.device

    def made(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(count if wanted else 0, dtype=dtype, device=device)

    whole = (True, torch.long)
    return (
        made(True, real), made(True, real), made(entropy, real), made(argmax, whole[1]), made(rank, whole[1]),
        made(True, real), made(True, real),
    )  # fmt: skip


@linear_logprob_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if need_hidden
        else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if need_weight
        else weight.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else weight.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, _, entropy_N, _, _, max_N, sum_N = output
    ctx.save_for_backward(*inputs[:6], logp, entropy_N, max_N, sum_N)
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    entropy = ctx.settings[4]
    d_entropy = grads[2] if entropy else None
    found = linear_logprob_backward_op(
        *tensors[:6], *ctx.settings, *tensors[6:], grads[0], grads[1], d_entropy, *needs
    )
    asked = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    return (*asked, *(None for _ in range(3 + len(ctx.settings))))


linear_logprob_op.register_autograd(_backward, setup_context=_setup)
