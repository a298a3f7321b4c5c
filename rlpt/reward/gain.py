"""Gain: how much a thought raised the held-out text's log-probability, per continuation token."""

import numpy as np
from jaxtyping import Float, Real


def gain(
    thought_total_PG: Float[np.ndarray, "P G"],
    baseline_total_P: Float[np.ndarray, " P"] | None,
    num_tokens_P: Real[np.ndarray, " P"],
) -> Float[np.ndarray, "P G"]:
    """[log p(y | x, opener, z, closer) - log p(y | x)] / |y| in nats per continuation token.

    Without a baseline the first term alone. It is called gain only where one model gives both terms.
    Raises FloatingPointError naming a prompt whose total is not finite.
    """
    if (num_tokens_P <= 0).any():
        prompt = int(np.argmax(num_tokens_P <= 0))
        raise ValueError(f"prompt {prompt} of the batch has no continuation to score")
    reward_PG = thought_total_PG.astype(np.float64)
    if baseline_total_P is not None:
        reward_PG = reward_PG - baseline_total_P.astype(np.float64)[:, None]
    _check_finite(reward_PG)
    return reward_PG / num_tokens_P[:, None]


def _check_finite(total_PG: Float[np.ndarray, "P G"]) -> None:
    if not np.isfinite(total_PG).all():
        prompt, rollout = (int(i) for i in np.argwhere(~np.isfinite(total_PG))[0])
        raise FloatingPointError(
            f"the score of prompt {prompt}, rollout {rollout} is {total_PG[prompt, rollout]}"
        )
