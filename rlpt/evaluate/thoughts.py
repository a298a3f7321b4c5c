"""What thoughts look like: lengths, how they end, entropy, templates, naming. Diagnostics, never a gate. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpt.evaluate.records import Record

OPENING = 4
"""Tokens of a thought that make its opening."""


def thought_statistics(records: Sequence[Record]) -> dict[str, Any]:
    """Of all thoughts together. Lengths in tokens; ``entropy`` in nats a token (`entropy`); the others are shares."""
    length_N = np.array([len(record.thought_ids) for record in records])
    named_N = np.array([record.named_prefix for record in records])
    masses = [record.opener_mass for record in records if record.opener_mass is not None]
    thoughts = [record.thought_ids.tolist() for record in records]
    return {
        "mean_len": float(length_N.mean()),
        "std_len": float(length_N.std()),
        "max_len": int(length_N.max()),
        "len_histogram": np.bincount(length_N).tolist(),
        "closer_rate": float(np.mean([record.finish == "closer" for record in records])),
        "empty_rate": float((length_N == 0).mean()),
        "entropy": entropy(records),
        "distinct_rate": len({*map(tuple, thoughts)}) / len(records),
        "distinct_1": distinct(thoughts, 1),
        "distinct_2": distinct(thoughts, 2),
        "template_rate": template_rate(thoughts),
        "named_answer_rate": float((named_N >= 1).mean()),
        "named_prefix_mean": float(named_N.mean()),
        "opener_mass": float(np.mean(masses)) if masses else None,
    }


def entropy(records: Sequence[Record]) -> float | None:
    """-sum(log p) / tokens of what was sampled, closers included: the cross-entropy of the policy with its own samples.

    An estimate without bias of the entropy of a token, in nats, at the sampling temperature and at the positions that
    the thoughts came by. None where nothing was sampled.
    """
    actions = sum(record.thought_actions for record in records)
    return sum(record.thought_nats for record in records) / actions if actions else None


def template_rate(thoughts: Sequence[Sequence[int]]) -> float:
    """Share of the thoughts that begin with the most common opening of all.

    A thought shorter than an opening is its own one; an empty thought has none.
    """
    openings = Counter(tuple(thought[:OPENING]) for thought in thoughts if len(thought))
    return max(openings.values(), default=0) / len(thoughts)


def distinct(thoughts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of the thoughts (distinct-n, Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(thought[i : i + n]) for thought in thoughts for i in range(len(thought) - n + 1)]
    return len({*grams}) / len(grams) if grams else None
