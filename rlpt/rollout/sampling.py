"""One token from logits: Gumbel-max with counter-based noise, so that a draw belongs to its rollout and position."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt import rng


class Draw(NamedTuple):
    ids_N: Int[Tensor, " N"]
    logp_N: Float[Tensor, " N"]
    """fp32 log-probability under the distribution that was sampled: at its temperature, banned ids removed."""


def sample(
    logits_NV: Float[Tensor, "N V"],
    banned: tuple[int, ...],
    key_N: Int[Tensor, " N"],
    position: int,
    temperature: float = 1.0,
) -> Draw:
    """argmax(log p + Gumbel noise keyed by (rollout, position)); ``banned`` ids have probability 0.

    Temperature 0 takes the likeliest id, the lowest of equals, and gives its log-probability at 1.
    """
    logits_NV = logits_NV.float()
    if temperature not in (0.0, 1.0):
        logits_NV = logits_NV / temperature
    for banned_id in banned:
        logits_NV[:, banned_id] = -torch.inf
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    noisy_NV = logp_NV
    if temperature > 0.0:
        noisy_NV = rng.gumbel(key_N, position, logp_NV.shape[-1]).add_(logp_NV)
    # Three times as fast as argmax on a CPU.
    ids_N = noisy_NV.max(dim=-1).indices
    return Draw(ids_N, logp_NV.gather(1, ids_N[:, None])[:, 0])
