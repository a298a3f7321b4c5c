"""From log-probabilities of the held-out tokens to one number per thought. Pure, float64, one group at a time."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Logp = Float[np.ndarray, "G C"]
"""Natural-log probabilities of the C held-out tokens after each of G thoughts."""
Values = Float[np.ndarray, " G"]


def mean(logp_GC: Logp) -> Values:
    """(1 / C) sum_c log p_c, nats per token: with a baseline of the same model, the gain (MEASURING, section 1)."""
    return logp_GC.mean(axis=1)


def total(logp_GC: Logp) -> Values:
    """sum_c log p_c = log p(y | x, z): RLP with C = 1 (arXiv 2510.01265, Eq. 5), LaTRO (2411.04282)."""
    return logp_GC.sum(axis=1)


def product(logp_GC: Logp) -> Values:
    """prod_c p_c = p(y | x, z): VeriFree (arXiv 2505.21493). Vanishes on long continuations."""
    return np.exp(logp_GC.sum(axis=1))


def mean_probability(logp_GC: Logp) -> Values:
    """(1 / C) sum_c p_c: RLPR (arXiv 2506.18254)."""
    return np.exp(logp_GC).mean(axis=1)


def geometric_mean(logp_GC: Logp) -> Values:
    """exp((1 / C) sum_c log p_c), the inverse of the perplexity: one of NRT's aggregations (arXiv 2602.11549)."""
    return np.exp(logp_GC.mean(axis=1))


def discounted(logp_GC: Logp, gamma: float) -> Values:
    """sum_k gamma^k log p_k, k from 0: a horizon that fades."""
    return logp_GC @ gamma ** np.arange(logp_GC.shape[1], dtype=np.float64)


def hardness_weighted(logp_GC: Logp, base_logp_C: Float[np.ndarray, " C"]) -> Values:
    """sum_c w_c p_c with w_c = -log p_base,c / sum: NRT's best aggregation (arXiv 2602.11549).

    Where the base is certain of every token there is nothing to weigh: all weigh the same.
    """
    hard_C = -base_logp_C
    weight_C = hard_C / hard_C.sum() if hard_C.sum() > 0 else np.full(len(hard_C), 1 / len(hard_C))
    return np.exp(logp_GC) @ weight_C


def log_mean_exp_share(logp_GC: Logp) -> Values:
    """L - v_i, L = log mean_j p_j, v_i the same over the others: JEPO's signal (arXiv 2503.19618), p_j = p(y | x, z_j).

    It is centred by construction: take it as an advantage, without a baseline.
    """
    total_G = logp_GC.sum(axis=1)
    count = len(total_G)
    others_GG = np.where(np.eye(count, dtype=bool), -np.inf, total_G[None, :])
    return _log_mean_exp(total_G[None, :], count) - _log_mean_exp(others_GG, count - 1)


def _log_mean_exp(value_NM: Float[np.ndarray, "N M"], count: int) -> Float[np.ndarray, " N"]:
    top_N = value_NM.max(axis=1)
    return top_N + np.log(np.exp(value_NM - top_N[:, None]).sum(axis=1) / count)


PLAIN: dict[str, Callable[[Logp], Values]] = {
    "mean": mean,
    "sum": total,
    "product": product,
    "mean_probability": mean_probability,
    "geometric_mean": geometric_mean,
}
"""Those that need nothing but the log-probabilities."""
