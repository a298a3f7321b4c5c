"""What the thoughts that are trained on look like, and the signs that a reward is gamed rather than earned: thoughts
that say the held-out text, lengths that win. Pure. Diagnostics, no gate: naming the answer is what a good thought does.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from numpy.lib.stride_tricks import sliding_window_view

from rlpt.types import Group, Sums, concat

GRAM = 4
"""Tokens in a row that a thought does not share with the text it has not seen by chance."""
_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64
)
"""A gram's key is its ids times these, modulo 2^64: two different ones agree once in so many."""


def thought_sums(groups: Sequence[Group], advantage_PG: Float[np.ndarray, "P G"]) -> Sums:
    """Of this rank's thoughts: lengths in tokens, how they end, -log p of an action in nats; and `signs`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = float(len(rollouts))
    actions = sum(rollout.num_actions for rollout in rollouts)
    closed = sum(rollout.finish == "closer" for rollout in rollouts)
    nats = -float(sum(rollout.logp.sum(dtype=np.float64) for rollout in rollouts))
    return signs(groups, advantage_PG) | {
        "thought/length": (float(sum(rollout.thought_len for rollout in rollouts)), count),
        "thought/closer_rate": (float(closed), count),
        "thought/nll": (nats, float(actions)),
        "tokens/rollout": (float(sum(len(rollout.ids) for rollout in rollouts)), 1.0),
    }


def signs(groups: Sequence[Group], advantage_PG: Float[np.ndarray, "P G"]) -> Sums:
    """`thought/leak_rate` of the groups whose text can leak, and mean lengths of thoughts above and below their group.

    A hinted group was shown the text; one whose grams are all in its context has none to give away.
    """
    leaks = [leaking(group) for group in groups if not group.hinted]
    known = [leak_G for leak_G in leaks if leak_G is not None]
    length_PG = np.array([[r.thought_len for r in group.rollouts] for group in groups], float)
    length_PG = length_PG.reshape(advantage_PG.shape)
    sums = {
        "thought/leak_rate": (
            float(sum(leak_G.sum() for leak_G in known)),
            float(sum(len(leak_G) for leak_G in known)),
        )
    }
    for name, side_PG in (("positive", advantage_PG > 0), ("negative", advantage_PG < 0)):
        sums[f"thought/length_{name}"] = (float(length_PG[side_PG].sum()), float(side_PG.sum()))
    return sums


def leaking(group: Group) -> Bool[np.ndarray, " G"] | None:
    """Thoughts with GRAM tokens in a row of the held-out text that the context does not have; None: it has them all."""
    prompt = group.prompt
    secret = np.setdiff1d(_keys(prompt.continuation_ids), _keys(prompt.context_ids))
    if not len(secret):
        return None
    thoughts = [rollout.thought_ids for rollout in group.rollouts]
    owner = np.repeat(np.arange(len(thoughts)), [len(thought) for thought in thoughts])
    found = np.isin(_keys(concat(*thoughts)), secret)
    # A gram that begins in one thought and ends in the next is nobody's.
    whole = owner[: len(found)] == owner[GRAM - 1 :]
    return np.bincount(owner[: len(found)][found & whole], minlength=len(thoughts)) > 0


def _keys(ids: Int[np.ndarray, " T"]) -> UInt64[np.ndarray, " K"]:
    """Of every gram, where it begins."""
    if len(ids) < GRAM:
        return np.zeros(0, np.uint64)
    return sliding_window_view(ids.astype(np.uint64), GRAM) @ _ODD
