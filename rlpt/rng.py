"""Counter-based randomness: a number is a pure function of what it is for.

Nothing here has state, so neither the batch, the rank, the engine nor a restart can change a draw. Keys are blake2b
hashes of (seed, purpose, ...); draws inside a key are SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators") at a counter.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def key(seed: int, purpose: str, *parts: int | str) -> int:
    """A signed 64-bit key for (seed, purpose, parts). Parts are length-prefixed: ("a", "bc") is not ("ab", "c")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, purpose, *parts):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little", signed=True)


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for (seed, purpose, parts)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *parts) & (2**64 - 1)))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(bits: Tensor, count: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes the shift logical.
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _splitmix_(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """In place: noise for a whole vocabulary is a good part of a decoding step, and most of it is memory traffic."""
    bits.bitwise_xor_(_shift(bits, 30)).mul_(_signed(_MIX_1))
    bits.bitwise_xor_(_shift(bits, 27)).mul_(_signed(_MIX_2))
    return bits.bitwise_xor_(_shift(bits, 31))


def uniform(key_N: Int[Tensor, " N"], counter: int, width: int) -> Float[Tensor, "N V"]:
    """``width`` float64 uniforms in (0, 1) for every key, at position ``counter``."""
    start_N1 = _splitmix_(key_N + _signed(_GOLDEN * (counter + 1) % 2**64))[:, None]
    column_V = torch.arange(1, width + 1, device=key_N.device) * _signed(_GOLDEN)
    bits_NV = _shift(_splitmix_(start_N1 + column_V), 11)
    return bits_NV.double().add_(0.5).mul_(2.0**-53)


def gumbel(key_N: Int[Tensor, " N"], counter: int, width: int) -> Float[Tensor, "N V"]:
    """Standard Gumbel noise: ``argmax(logits + gumbel)`` is a sample of softmax(logits)."""
    return uniform(key_N, counter, width).log_().neg_().log_().neg_()
