"""A 64-bit checksum of a tensor's bits and their places, computed where the tensor lives: no copy to the host.

sum over i of (bits_i + 1) * mix(i) modulo 2**64, mix odd: one changed element always changes it, and so do two that
are swapped unless they are equal (elements of up to 32 bits, less than 2**32 places apart). It finds mistakes, not
forgeries.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor

_CHUNK = 1 << 22
"""Elements at a time: the products take eight bytes each."""
_GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15 as a signed integer."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Shaped[Tensor, "..."]) -> int:
    """The checksum of a dense tensor, in row-major order; an unsigned 64-bit integer."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = 0
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        # An odd factor has an inverse modulo 2**64: no change of one element can be lost.
        total += int(((part + 1) * (place * _GOLDEN * 2 + 1)).sum())
    return total % 2**64
