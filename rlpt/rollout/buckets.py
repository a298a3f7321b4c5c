"""Weights on their way: tensors packed into buckets of bounded size, in the dtype of the engine.

A bucket says itself what it holds, so that sender and receiver cannot disagree about names, shapes or order.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUCKET_BYTES = 1 << 28
"""Most bytes of one bucket or file, unless a single tensor has more: what a sender holds at once, about twice."""


class TransferError(RuntimeError):
    """Weights did not arrive; the engine itself is well and can be sent them again."""


@dataclass(frozen=True)
class Bucket:
    header: wire.Header
    payload: Shaped[Tensor, " elements"]
    """The tensors one after the other, in memory of its own."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views into the payload. Raises TransferError where its size is another than the header says."""
        sizes = [math.prod(tensor.shape) for tensor in self.header.tensors]
        if sum(sizes) != len(self.payload):
            raise TransferError(
                f"a bucket of {len(self.payload)} numbers arrived for tensors of {sum(sizes)}, the first of them "
                f"{self.header.tensors[0].name}"
            )
        for tensor, part in zip(self.header.tensors, self.payload.split(sizes), strict=True):
            yield tensor.name, part.view(tensor.shape)


def cast(named: Iterable[tuple[str, Tensor]], dtype: wire.DType) -> Iterator[tuple[str, Tensor]]:
    """Masters are float32; engines get the dtype they compute in."""
    for name, tensor in named:
        yield name, tensor.to(DTYPES[dtype]).contiguous()


def described(name: str, tensor: Tensor) -> wire.Tensor:
    return wire.Tensor(name=name, shape=tuple(tensor.shape), checksum=checksum(tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def buckets(named: Iterable[tuple[str, Tensor]], dtype: wire.DType) -> Iterator[Bucket]:
    """Cast and packed, in order."""
    held: dict[str, Tensor] = {}
    for name, tensor in cast(named, dtype):
        if held and bytes_of([*held.values(), tensor]) > BUCKET_BYTES:
            yield _packed(held, dtype)
            held = {}
        held[name] = tensor
    if held:
        yield _packed(held, dtype)


def _packed(held: dict[str, Tensor], dtype: wire.DType) -> Bucket:
    described_ones = tuple(described(name, tensor) for name, tensor in held.items())
    # Always a copy: a tensor that needed no cast is still the trainer's own.
    payload = torch.cat([tensor.view(-1) for tensor in held.values()])
    return Bucket(wire.Header(dtype=dtype, tensors=described_ones), payload)
