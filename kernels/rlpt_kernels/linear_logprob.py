"""Log-probabilities straight from hidden states and the output embedding."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from rlpt_kernels.checks import check, check_shares, check_values
from rlpt_kernels.head import Head, LogProb, Problem, Wanted
from rlpt_kernels.launch import why_not
from rlpt_kernels.notes import once
from rlpt_kernels.ops import linear_logprob_op
from rlpt_kernels.reference import linear_logprob_reference

Implementation = Literal["auto", "reference", "slabs", "slabs_bf16", "chunked", "triton"]

FULL_LOGITS = 1 << 19
"""`auto` keeps full logits on a CPU up to this many of them (2 MiB in float32) and walks slabs above."""


def linear_logprob(
    hidden_MD: Float[Tensor, "M D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    banned: Sequence[int] = (),
    rows: Int[Tensor, " N"] | None = None,
    entropy: bool = False,
    argmax: bool = False,
    rank: bool = False,
    vocab_start: int = 0,
    vocab_stop: int | None = None,
    group: ProcessGroup | None = None,
    impl: Implementation = "auto",
) -> LogProb:
    """log softmax(softcap(hidden @ weight + bias) / temperature)[target], always in float32.

    Row n is hidden[n], or hidden[rows[n]] where ``rows`` is given: context positions then never reach the
    head, and repeated rows sum their gradients. Differentiable in hidden, weight and bias through logp,
    logsumexp and entropy. An ignored target has logp 0, a banned one -inf; neither sends a gradient through
    logp. Banned ids leave the softmax: probability 0, gradient exactly 0.

    ``weight`` holds the ids [vocab_start, vocab_stop), and rows beyond them are padding. With a ``group``
    every rank holds one such share and the same hidden, gets the same answer over the whole vocabulary, and
    in the backward the whole gradient of hidden beside that of its own share. All ranks must ask for the same
    outputs.

    ``impl``: `reference` holds N x V logits and defines what is correct; `slabs` walks the vocabulary in
    torch; `triton` is one fused kernel on a GPU; `chunked` holds some rows of logits; `slabs_bf16` is inexact
    (about 1e-2 nats) and never chosen by `auto`. Raises ValueError naming the argument at fault.
    """
    head, wanted = Head(temperature, softcap, tuple(banned)), Wanted(entropy, argmax, rank)
    check(hidden_MD, weight_VD, bias, target_N, rows, head)
    stop = check_shares(weight_VD, vocab_start, vocab_stop, group is not None, head.banned)
    chosen = (
        choose(hidden_MD, weight_VD, len(target_N), group is not None) if impl == "auto" else impl
    )
    check_implementation(chosen, hidden_MD, weight_VD, group is not None)
    if chosen == "reference":
        eager: Any = torch.compiler.disable(_reference)
        return eager(hidden_MD, weight_VD, bias, target_N, rows, stop, ignore_index, head, wanted)
    per_row = temperature if isinstance(temperature, Tensor) else None
    found = linear_logprob_op(
        hidden_MD, weight_VD, bias, target_N, rows, per_row, 1.0 if per_row is not None else temperature,
        softcap, ignore_index, head.banned, entropy, argmax, rank, vocab_start, stop,
        "" if group is None else group.group_name, chosen,
    )  # fmt: skip
    extra = [x if on else None for x, on in zip(found[2:5], (entropy, argmax, rank), strict=True)]
    return LogProb(found[0], found[1], *extra)


def choose(
    hidden_MD: Tensor, weight_VD: Tensor, num_rows: int, grouped: bool = False
) -> Implementation:
    """The implementation that ``auto`` takes; says so once in the log."""
    half = hidden_MD.dtype == weight_VD.dtype and hidden_MD.dtype in (torch.float16, torch.bfloat16)
    if hidden_MD.is_cuda and half and why_not(hidden_MD.device) is None:
        chosen: Implementation = "triton"
    elif hidden_MD.is_cuda or grouped or torch.compiler.is_compiling():
        # A compiled graph would break at the reference, whose products must stay exact.
        chosen = "slabs"
    else:
        chosen = "slabs" if num_rows * len(weight_VD) > FULL_LOGITS else "reference"
    once(f"linear_logprob: auto takes {chosen} for {hidden_MD.dtype} on {hidden_MD.device.type}")
    return chosen


def check_implementation(name: str, hidden_MD: Tensor, weight_VD: Tensor, grouped: bool) -> None:
    """Refuse what an implementation cannot do, with what can."""
    known = get_args(Implementation)
    if name not in known:
        raise ValueError(f"impl = {name!r} is unknown; choose one of {', '.join(known)}")
    if name == "reference" and grouped:
        raise ValueError(
            "impl = 'reference' holds the whole vocabulary; with a group choose slabs or triton"
        )
    if name == "triton":
        if torch.float64 in (hidden_MD.dtype, weight_VD.dtype):
            raise ValueError(
                "impl = 'triton' computes in float32; for float64 choose slabs or reference"
            )
        reason = why_not(hidden_MD.device)
        if reason is not None:
            raise ValueError(f"impl = 'triton': {reason}")


def _reference(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, rows: Tensor | None,
    stop: int, ignore_index: int, head: Head, wanted: Wanted,
) -> LogProb:  # fmt: skip
    ignored_N = target_N == ignore_index
    head = Head.of(head.temperature, head.softcap, head.banned, hidden_MD.device)
    check_values(target_N, ignore_index, stop, rows, len(hidden_MD), bias_V, head)
    local_N = torch.where(ignored_N, -1, target_N.long())
    hidden_ND = hidden_MD if rows is None else hidden_MD.index_select(0, rows)
    problem = Problem(
        hidden_ND, weight_VD[:stop], None if bias_V is None else bias_V[:stop], local_N, head
    )
    return linear_logprob_reference(problem, ignored_N, wanted)
