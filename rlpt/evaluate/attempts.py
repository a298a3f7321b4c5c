"""How far several thoughts of one prompt get: mean@k, best@k and pass@k, all without bias. Pure numpy.

Of n thoughts every choice of k is as likely as any other; what is given is the mean over all of them. best@k chooses by
the held-out text itself: it says what is within reach of the samples, never what a policy can deliver.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def pass_at_k(right_PG: Float[np.ndarray, "P G"], k: int) -> Float[np.ndarray, " P"]:
    """Probability that one of k thoughts is right: 1 - C(n - c, k) / C(n, k) with c of n right.

    Chen et al. 2021, arXiv 2107.03374, Eq. 1. ``right`` is 0 or 1.
    """
    n = right_PG.shape[1]
    return np.array(
        [1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in right_PG.sum(axis=1)]
    )


def best_at_k(value_PG: Float[np.ndarray, "P G"], k: int) -> Float[np.ndarray, " P"]:
    """Expected largest of k of the n values: sum_i C(i - 1, k - 1) / C(n, k) times the i-th smallest, i from 1."""
    n = value_PG.shape[1]
    share_G = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return np.sort(value_PG, axis=1) @ np.array(share_G)


def majority(votes: Sequence[int | None]) -> int | None:
    """What most thoughts say; among equals what was said first. A thought without a prediction has no vote."""
    cast = [vote for vote in votes if vote is not None]
    return max(cast, key=cast.count, default=None)
