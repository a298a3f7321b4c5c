"""Matrix products that keep float32: operands may be half precision, sums and results never are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_lock = threading.Lock()
_inside: list[list[str]] = []
"""What the process had chosen, once for each thread that is inside `exact`."""


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside float32 products, whatever the process allows elsewhere.

    The setting is the process's: the first thread in saves it and the last one out restores it.
    """
    with _lock:
        _inside.append(_inside[0] if _inside else _precisions())
        _set_precisions(["ieee", "ieee"])
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                _set_precisions(before)


def _precisions() -> list[str]:
    return [backend.fp32_precision for backend in _backends()]


def _set_precisions(precisions: list[str]) -> None:
    for backend, precision in zip(_backends(), precisions, strict=True):
        backend.fp32_precision = precision


def _backends() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore


def product(
    a_NK: Float[Tensor, "N K"], b_KS: Float[Tensor, "K S"], dtype: torch.dtype
) -> Float[Tensor, "N S"]:
    """a @ b, summed and returned in ``dtype``. Half precision multiplies exactly; only CUDA can sum it wider."""
    if a_NK.dtype == b_KS.dtype == dtype:
        return a_NK @ b_KS
    if a_NK.is_cuda and a_NK.dtype == b_KS.dtype:
        return torch.mm(a_NK, b_KS, out_dtype=dtype)
    return a_NK.to(dtype) @ b_KS.to(dtype)


def add_product(
    out_NS: Float[Tensor, "N S"], a_NK: Float[Tensor, "N K"], b_KS: Float[Tensor, "K S"]
) -> None:
    """out += a @ b, inside the product where all are of one dtype; half precision on a GPU takes a second pass."""
    if a_NK.dtype == b_KS.dtype == out_NS.dtype:
        out_NS.addmm_(a_NK, b_KS)
    else:
        out_NS += product(a_NK, b_KS, out_NS.dtype)


def rounded_product(
    a_NK: Float[Tensor, "N K"], b_KS: Float[Tensor, "K S"], dtype: torch.dtype
) -> Float[Tensor, "N S"]:
    """a @ b of bfloat16 operands, rounded to bfloat16 before it is returned in ``dtype``: fast and inexact."""
    return (a_NK.bfloat16() @ b_KS.bfloat16()).to(dtype)


def add_rounded_product(
    out_NS: Float[Tensor, "N S"], a_NK: Float[Tensor, "N K"], b_KS: Float[Tensor, "K S"]
) -> None:
    """out += a @ b of bfloat16 operands: the product is rounded, the sum is not."""
    out_NS += a_NK.bfloat16() @ b_KS.bfloat16()
