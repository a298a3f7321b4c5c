"""Log-probabilities straight from hidden states and the output embedding."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from rlpt_kernels.head import Head, LogProb, Wanted, check
from rlpt_kernels.reference import linear_logprob_reference
from rlpt_kernels.slabs import linear_logprob_slabs

Implementation = Literal["auto", "reference", "slabs"]
_IMPLEMENTATIONS = {"reference": linear_logprob_reference, "slabs": linear_logprob_slabs}

FULL_LOGITS = 1 << 21
"""`auto` keeps full logits up to this many of them (8 MiB in float32) and walks slabs above."""


def linear_logprob(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    banned: Sequence[int] = (),
    entropy: bool = False,
    argmax: bool = False,
    rank: bool = False,
    vocab_start: int = 0,
    vocab_stop: int | None = None,
    group: object | None = None,
    impl: Implementation = "auto",
) -> LogProb:
    """log softmax(softcap(hidden @ weight + bias) / temperature)[target], always in float32.

    Differentiable in hidden, weight and bias through logp, logsumexp and entropy. An ignored target
    has logp 0, a banned one -inf; neither sends a gradient through logp. Banned ids leave the
    softmax: probability 0, gradient exactly 0. `reference` holds N x V logits, `slabs` N x 2048 of
    them. Raises ValueError naming the argument at fault.
    """
    _refuse_vocabulary_shards(len(weight_VD), vocab_start, vocab_stop, group)
    head = Head(temperature, softcap, ignore_index, tuple(banned))
    check(hidden_ND, weight_VD, bias, target_N, head)
    chosen = choose(len(hidden_ND), len(weight_VD)) if impl == "auto" else impl
    if chosen not in _IMPLEMENTATIONS:
        known = ", ".join(("auto", *_IMPLEMENTATIONS))
        raise ValueError(f"impl = {impl!r} is unknown; choose one of {known}")
    return _IMPLEMENTATIONS[chosen](
        hidden_ND, weight_VD, bias, target_N, head, Wanted(entropy, argmax, rank)
    )


def choose(num_rows: int, vocab: int) -> Literal["reference", "slabs"]:
    """The implementation that ``auto`` takes."""
    return "slabs" if num_rows * vocab > FULL_LOGITS else "reference"


def _refuse_vocabulary_shards(
    vocab: int, vocab_start: int, vocab_stop: int | None, group: object | None
) -> None:
    if group is not None:
        raise ValueError("group: vocabulary-parallel heads are not supported; gather the weight")
    if vocab_start != 0 or vocab_stop not in (None, vocab):
        raise ValueError(
            f"vocab_start = {vocab_start}, vocab_stop = {vocab_stop}: a part of the vocabulary is "
            f"not supported; pass the whole weight"
        )
