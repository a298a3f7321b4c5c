"""Mistakes are named here, before they become a silent NaN, a broadcast or an illegal memory access."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlpt_kernels.head import Head

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int32, torch.int64)
_COLDEST, _HOTTEST = 1e-30, 1e30
"""Temperatures whose inverse float32 holds."""


def check(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    rows_N: Tensor | None,
    head: Head,
) -> None:
    """Shapes, devices, dtypes and settings, no values. Raises ValueError naming the argument and what it holds."""
    _check_matrices(hidden_MD, weight_VD)
    count = len(hidden_MD) if rows_N is None else len(rows_N)
    device = hidden_MD.device
    if rows_N is not None:
        check_vector("rows", rows_N, count, device, _WHOLE)
    check_vector("target", target_N, count, device, _WHOLE)
    if bias_V is not None:
        check_vector("bias", bias_V, len(weight_VD), device, _FLOATS)
    if isinstance(head.temperature, Tensor):
        check_vector("temperature", head.temperature, count, device, _FLOATS)
    _check_settings(head)


def check_shares(
    weight_VD: Tensor, vocab_start: int, stop: int | None, grouped: bool, banned: Sequence[int]
) -> int:
    """[start, stop) against the weight; bans against the vocabulary where one rank holds it all. Returns the stop."""
    vocab_stop = vocab_start + len(weight_VD) if stop is None else stop
    if not 0 <= vocab_start < vocab_stop:
        raise ValueError(f"vocab_start = {vocab_start} and vocab_stop = {vocab_stop} hold no ids")
    if vocab_stop - vocab_start > len(weight_VD):
        raise ValueError(
            f"vocab_stop = {vocab_stop} - vocab_start = {vocab_start} is more than the {len(weight_VD)} rows of weight"
        )
    if vocab_start and not grouped:
        raise ValueError(
            f"vocab_start = {vocab_start} without a group: the ids before it are missing"
        )
    outside = [v for v in banned if v < 0 or (v >= vocab_stop and not grouped)]
    if outside:
        raise ValueError(f"banned holds {outside[0]}, outside the vocabulary [0, {vocab_stop})")
    if not grouped and len(set(banned)) == vocab_stop:
        raise ValueError(f"banned holds all {vocab_stop} ids; no distribution is left")
    return vocab_stop


def check_values(
    target_N: Tensor,
    ignore_index: int,
    vocab: int | None,
    rows_N: Tensor | None,
    height: int,
    bias_V: Tensor | None,
    head: Head,
) -> None:
    """What only values can tell, in one look (one device synchronisation). ``vocab`` None: not known yet.

    Without a softcap a bias may be -inf, but not for every id: the row would have no distribution.
    """
    stray_N = target_N < 0 if vocab is None else (target_N < 0) | (target_N >= vocab)
    stray_N &= target_N != ignore_index
    checks = {"target": stray_N.any()}
    if rows_N is not None:
        checks["rows"] = ((rows_N < 0) | (rows_N >= height)).any()
    if isinstance(head.temperature, Tensor):
        inside_N = (head.temperature >= _COLDEST) & (head.temperature <= _HOTTEST)
        checks["temperature"] = ~inside_N.all()
    if bias_V is not None:
        checks["bias"] = (bias_V.isnan() | bias_V.isposinf()).any()
        checks["every"] = bias_V.isneginf().all() if head.softcap is None else checks["bias"]
        if head.banned_B is not None and head.softcap is None:
            checks["every"] = bias_V.index_fill(0, head.banned_B, -torch.inf).isneginf().all()
    found = dict(zip(checks, torch.stack(list(checks.values())).tolist(), strict=True))
    if not any(found.values()):
        return
    if found["target"]:
        row = int(stray_N.nonzero()[0, 0])
        raise ValueError(
            f"target[{row}] = {int(target_N[row])} is outside [0, {vocab}) and is not ignore_index = {ignore_index}"
        )
    if rows_N is not None and found["rows"]:
        row = int(((rows_N < 0) | (rows_N >= height)).nonzero()[0, 0])
        raise ValueError(f"rows[{row}] = {int(rows_N[row])} is outside the {height} rows of hidden")
    if isinstance(head.temperature, Tensor) and found["temperature"]:
        least, most = head.temperature.aminmax()
        raise ValueError(
            f"temperature must be > 0 and neither below {_COLDEST} nor above {_HOTTEST}; "
            f"its least is {float(least)}, its most {float(most)}"
        )
    if found["bias"]:
        raise ValueError("bias holds NaN or +inf; only finite values and -inf make a distribution")
    raise ValueError("bias is -inf for every id that is not banned; nothing is left")


def check_scores(logsumexp_N: Tensor) -> None:
    """After a merge of shares: a row without any finite score in any of them has no distribution."""
    empty_N = torch.isneginf(logsumexp_N)
    if bool(empty_N.any()):
        row = int(empty_N.nonzero()[0, 0])
        raise ValueError(
            f"row {row} has no distribution: bias is -inf for every id that is not banned"
        )


def check_vector(
    name: str, value: Tensor, length: int, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    """One value a row, on the device of hidden."""
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},); got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, hidden on {device}")
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {known}; got {value.dtype}")


def _check_matrices(hidden_MD: Tensor, weight_VD: Tensor) -> None:
    for name, value in (("hidden", hidden_MD), ("weight", weight_VD)):
        if isinstance(value, DTensor):
            raise ValueError(
                f"{name} is a DTensor; pass its local or full tensor (FSDP2 gathers it inside a forward)"
            )
    if hidden_MD.ndim != 2 or weight_VD.ndim != 2 or hidden_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D) must share D; got {tuple(hidden_MD.shape)} and {tuple(weight_VD.shape)}"
        )
    if weight_VD.shape[0] == 0 or weight_VD.shape[1] == 0:
        raise ValueError(f"weight {tuple(weight_VD.shape)} is empty: V and D must be 1 or more")
    if weight_VD.device != hidden_MD.device:
        raise ValueError(f"weight is on {weight_VD.device}, hidden on {hidden_MD.device}")
    for name, value in (("hidden", hidden_MD), ("weight", weight_VD)):
        if value.dtype not in _FLOATS:
            raise ValueError(f"{name} must be floating point of 16 to 64 bits; got {value.dtype}")


def _check_settings(head: Head) -> None:
    if isinstance(head.temperature, Tensor):
        if head.temperature.requires_grad:
            raise ValueError("temperature requires grad, but gets none here; detach it")
    elif not _COLDEST <= head.temperature <= _HOTTEST:
        raise ValueError(
            f"temperature must be > 0 and neither below {_COLDEST} nor above {_HOTTEST}; got {head.temperature}"
        )
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"softcap must be > 0 and finite, or None; got {head.softcap}")
