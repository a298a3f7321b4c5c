"""Records cut into parts: domains, tiers and quantiles of entropy, lengths of thoughts; a table for each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlpt.curriculum import EntropyCurriculum
from rlpt.evaluate.blocks import Table, block, brief
from rlpt.evaluate.quantities import Resampling, Sheet
from rlpt.evaluate.records import NO_THINK, Record

MAX_DOMAINS = 24
QUANTILES = 4
TIERS = dict(zip(("easy", "medium", "hard"), EntropyCurriculum().tiers, strict=True))
"""Nats. A position is of a tier where its entropy is above: RPT's tiers nest, hard is in medium is in easy."""


def per_domain(sheet: Sheet, resampling: Resampling) -> Table:
    """Blocks of the largest domains. Inside one, documents are resampled: it is a single domain."""
    inside = replace(resampling, unit="document")
    domain_N = np.array([record.domain for record in sheet.records])
    counts = Counter(domain_N.tolist())
    largest = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_DOMAINS]
    return {name: block(sheet.part(np.flatnonzero(domain_N == name)), inside) for name in largest}


def by_entropy(sheet: Sheet, resampling: Resampling) -> dict[str, Any]:
    """``entropy_tiers`` (RPT, arXiv 2506.08007) and ``entropy_quantiles`` of the prompts.

    ``source`` says whose entropy of the first continuation token it is: annotations, by the proxy of the shards; or
    policy, its own without a thought, which another checkpoint does not share. Nothing where neither is known.
    """
    source, entropy_N = _entropy(sheet.records)
    if entropy_N is None:
        return {}
    tiers: Table = {"source": source, "nested": True}
    for name, least in TIERS.items():
        chosen = np.flatnonzero(entropy_N > least)
        part = block(sheet.part(chosen), resampling) if len(chosen) else {"prompts": 0}
        tiers[name] = {"above": least, **part}
    parts = []
    for members, low, high in buckets(entropy_N, QUANTILES):
        parts.append({"from": low, "to": high, **block(sheet.part(members), resampling)})
    return {"entropy_tiers": tiers, "entropy_quantiles": {"source": source, "parts": parts}}


def _entropy(records: Sequence[Record]) -> tuple[str, Float[np.ndarray, " N"] | None]:
    proxy = [r.annotated_entropy for r in records if r.annotated_entropy is not None]
    if len(proxy) == len(records):
        return "annotations", np.array(proxy)
    firsts = [record.firsts[NO_THINK].entropy for record in records]
    own = [entropy for entropy in firsts if entropy is not None]
    return "policy", np.array(own) if len(own) == len(records) else None


def by_thought_length(sheet: Sheet, resampling: Resampling) -> list[Table]:
    """A brief table for each quarter of the thoughts by length, in tokens; thoughts of one length stay together."""
    length_N = np.array([float(len(record.thought_ids)) for record in sheet.records])
    return [
        {"from": int(low), "to": int(high), **brief(sheet.part(members), resampling)}
        for members, low, high in buckets(length_N, QUANTILES)
    ]


def buckets(
    value_N: Float[np.ndarray, " N"], count: int
) -> list[tuple[Int[np.ndarray, " M"], float, float]]:
    """Up to ``count`` parts of about equal size in the order of their values: members, least and largest value.

    Equal values share a part, so that a part may be empty, and is then left out.
    """
    edges = np.quantile(value_N, np.linspace(0, 1, count + 1)[1:-1])
    part_N = np.searchsorted(edges, value_N, side="left")
    members = [np.flatnonzero(part_N == part) for part in range(count)]
    return [
        (each, float(value_N[each].min()), float(value_N[each].max()))
        for each in members
        if len(each)
    ]
