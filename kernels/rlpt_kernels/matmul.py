"""Matrix products that keep float32: operands may be half precision, sums and results never are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside float32 products, whatever the process allows elsewhere."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
    """out += a @ b, inside the product where the dtypes allow it: no second matrix, no second pass."""
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
