"""How hidden states become scores: the one definition that every implementation shares.

score = softcap * tanh((hidden @ weight + bias) / softcap) / temperature, and -inf where an id is
banned. All of it happens in float32 (float64 where an input is float64), under autocast too: a
reward is a difference of log-probabilities, and bfloat16 logits are wrong by more than many rewards
are large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LogProb(NamedTuple):
    """What is known of N targets. Everything is natural-log, float32 unless an input is float64."""

    logp: Float[Tensor, " N"]
    """log softmax(score)[target]; 0 where the target is ignored, -inf where it is banned."""
    logsumexp: Float[Tensor, " N"]
    """log sum_v exp(score_v), defined for every row: it does not depend on the target."""
    entropy: Float[Tensor, " N"] | None
    """-sum_v p_v log p_v in nats, for every row."""
    argmax: Int[Tensor, " N"] | None
    """The likeliest id that is not banned; the lowest of equals."""
    rank: Int[Tensor, " N"] | None
    """How many ids score strictly above the target: 0 is the best, -1 means ignored."""


@dataclass(frozen=True)
class Head:
    """What happens to ``hidden @ weight`` on its way to the softmax."""

    temperature: float | Float[Tensor, " N"] = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    banned: tuple[int, ...] = ()
    """Ids outside the softmax: probability 0, and no gradient from it."""


@dataclass(frozen=True)
class Wanted:
    """Which optional outputs were asked for."""

    entropy: bool = False
    argmax: bool = False
    rank: bool = False


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input is: logits are never kept in half precision."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def logits(
    hidden_ND: Float[Tensor, "N D"],
    weight_SD: Float[Tensor, "S D"],
    bias_S: Float[Tensor, " S"] | None,
) -> Float[Tensor, "N S"]:
    """``hidden @ weight + bias``; hidden is already upcast, the others follow it."""
    raw_NS = hidden_ND @ weight_SD.to(hidden_ND.dtype).T
    return raw_NS if bias_S is None else raw_NS + bias_S.to(hidden_ND.dtype)


def scores(raw_NS: Float[Tensor, "N S"], head: Head, start: int) -> Float[Tensor, "N S"]:
    """Logits after softcap, temperature and bans: what the softmax sees."""
    score_NS = raw_NS
    if head.softcap is not None:
        score_NS = head.softcap * torch.tanh(score_NS / head.softcap)
    score_NS = over_temperature(score_NS, head.temperature)
    banned = [v - start for v in head.banned if 0 <= v - start < score_NS.shape[1]]
    if banned:
        columns = torch.tensor(banned, device=score_NS.device)
        score_NS = score_NS.index_fill(1, columns, -torch.inf)
    return score_NS


def over_temperature(
    value_NS: Float[Tensor, "N S"], temperature: float | Float[Tensor, " N"]
) -> Float[Tensor, "N S"]:
    """Divide rows by their temperature."""
    if isinstance(temperature, Tensor):
        return value_NS / temperature.to(value_NS.dtype)[:, None]
    return value_NS if temperature == 1.0 else value_NS / temperature


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, head: Head
) -> None:
    """Refuse what would otherwise be a silent NaN, a broadcast or an illegal memory access.

    Values are looked at once per call (a device synchronisation), not at all while compiling.
    Raises ValueError naming the argument and what it holds.
    """
    _check_matrices(hidden_ND, weight_VD)
    rows, vocab = len(hidden_ND), len(weight_VD)
    _check_vector("target", target_N, rows, hidden_ND.device, (torch.int32, torch.int64))
    if bias_V is not None:
        _check_vector("bias", bias_V, vocab, hidden_ND.device, _FLOATS)
    if isinstance(head.temperature, Tensor):
        _check_vector("temperature", head.temperature, rows, hidden_ND.device, _FLOATS)
    _check_settings(head, vocab)
    if not torch.compiler.is_compiling():
        _check_values(bias_V, target_N, head, vocab)


def _check_matrices(hidden_ND: Tensor, weight_VD: Tensor) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D) must share D; "
            f"got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if len(weight_VD) == 0:
        raise ValueError("weight holds no vocabulary: V = 0")
    if weight_VD.device != hidden_ND.device:
        raise ValueError(f"weight is on {weight_VD.device}, hidden on {hidden_ND.device}")
    for name, value in (("hidden", hidden_ND), ("weight", weight_VD)):
        if value.dtype not in _FLOATS:
            raise ValueError(f"{name} must be floating point of 16 to 64 bits; got {value.dtype}")


def _check_vector(
    name: str, value: Tensor, length: int, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},); got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, hidden on {device}")
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {known}; got {value.dtype}")


def _check_settings(head: Head, vocab: int) -> None:
    if isinstance(head.temperature, Tensor):
        if head.temperature.requires_grad:
            raise ValueError("temperature requires grad, but gets none here; detach it")
    elif not head.temperature > 0:
        raise ValueError(f"temperature must be > 0; got {head.temperature}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be > 0 or None; got {head.softcap}")
    outside = [v for v in head.banned if not 0 <= v < vocab]
    if outside:
        raise ValueError(f"banned holds {outside[0]}, outside the vocabulary [0, {vocab})")
    if len(set(head.banned)) == vocab:
        raise ValueError(f"banned holds all {vocab} ids; no distribution is left")


def _check_values(bias_V: Tensor | None, target_N: Tensor, head: Head, vocab: int) -> None:
    wrong_N = ((target_N < 0) | (target_N >= vocab)) & (target_N != head.ignore_index)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0, 0])
        raise ValueError(
            f"target[{row}] = {int(target_N[row])} is outside [0, {vocab}) and is not "
            f"ignore_index = {head.ignore_index}"
        )
    if isinstance(head.temperature, Tensor) and not bool((head.temperature > 0).all()):
        raise ValueError(f"temperature must be > 0; its least is {float(head.temperature.min())}")
    if bias_V is not None and head.softcap is None:
        open_V = ~torch.isneginf(bias_V)
        open_V[list(head.banned)] = False
        if not bool(open_V.any()):
            raise ValueError("bias is -inf for every id that is not banned; nothing is left")
