"""The numbers of a datasheet: counts by stage and reason, lengths, languages, domains, contamination."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from rlpt_data.choosing import LanguageConfig, resiliparse_detector
from rlpt_data.contamination import CONTAMINATED, FILE, Index
from rlpt_data.manifest import Manifest
from rlpt_data.shards import CUT_KINDS, SPLITS, ShardFolder, Split, read_drop_samples
from rlpt_data.strict import UserError

LANGUAGE_SAMPLE = 2_000
"""Documents whose language is asked for; the order of the shards is random, so the first ones do."""
DOMAINS_SHOWN = 20
LANGUAGES_SHOWN = 12


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart."""

    label: str
    count: int
    share: float
    """Of the total, 0 to 1."""
    width: float
    """Of the longest bar, in percent."""


def bars(counts: Iterable[tuple[str, int]], total: int) -> list[Bar]:
    """(label, count) pairs as they are to be drawn."""
    rows = list(counts)
    longest = max((count for _, count in rows), default=0)
    return [
        Bar(label, count, count / max(1, total), 100 * count / max(1, longest))
        for label, count in rows
    ]


def present(folder: ShardFolder) -> list[Split]:
    """The splits that hold documents."""
    counts = folder.manifest.counts
    return [folder.split(name) for name in SPLITS if name in counts and counts[name].documents]


def tiles(folder: ShardFolder) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the first row of the page."""
    manifest = folder.manifest
    counts = list(manifest.counts.values())
    documents = sum(count.documents for count in counts)
    tokens = sum(count.tokens for count in counts)
    size = sum(count.bytes for count in counts)
    cuts = sum(len(split.flat_cuts) for split in present(folder))
    rows = [
        ("Documents", f"{documents:,}", f"{tokens / max(1, documents):,.0f} tokens each"),
        ("Tokens", f"{tokens:,}", f"vocabulary of {manifest.vocab_size:,}"),
        ("Text", f"{size / 1e6:,.1f} MB", f"{size / max(1, tokens):.2f} bytes a token"),
        ("Candidate cuts", f"{cuts:,}", f"{cuts / max(1, documents):.1f} a document"),
    ]
    if manifest.stages:
        entered = manifest.stages[0]["in"]
        rows.append(("Kept", f"{documents / max(1, entered):.1%}", f"of {entered:,} records read"))
    return rows


def splits(folder: ShardFolder) -> list[dict[str, Any]]:
    """Counts of every split, with its cuts by kind."""
    return [
        {
            "name": split.name,
            **folder.manifest.counts[split.name].model_dump(),
            "cuts": kinds(split),
        }
        for split in present(folder)
    ]


def kinds(split: Split) -> dict[str, int]:
    """Cuts of a split by kind."""
    counts = np.bincount(split.flat_cut_kinds, minlength=len(CUT_KINDS))
    return dict(zip(CUT_KINDS, counts.tolist(), strict=True))


def funnel(manifest: Manifest) -> list[dict[str, Any]]:
    """Every stage with what came in and went out, and both as a share of what was read."""
    stages = manifest.stages or ()
    read = max(1, stages[0]["in"]) if stages else 1
    return [
        row | {"left": row["in"] - row["out"], "kept": 100 * row["out"] / read} for row in stages
    ]


def dropped(folder: ShardFolder) -> list[dict[str, Any]]:
    """Every reason with its count and samples, the most frequent first."""
    drops = sorted(folder.manifest.drops.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"reason": reason, "count": count, "samples": read_drop_samples(folder, reason)}
        for reason, count in drops
    ]


def contamination(folder: ShardFolder) -> dict[str, Any]:
    """The index, its evaluation sets and every hit; empty where nothing was compared."""
    path = folder.path / FILE
    if not path.is_file():
        return {}
    names = Index.from_bytes(path.read_bytes(), str(path)).names
    drops = folder.manifest.drops
    rows = read_drop_samples(folder, CONTAMINATED) if drops.get(CONTAMINATED) else []
    hits = list(_hits(rows))
    found = Counter(_benchmark(hit["item"]) for hit in hits)
    items = Counter(_benchmark(name) for name in names)
    return {
        "index": next(entry.blake2b for entry in folder.manifest.files if entry.path == FILE),
        "documents": len(rows),
        "sets": [(name, count, found[name]) for name, count in sorted(items.items())],
        "hits": hits,
    }


def _hits(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """A line of a detail is one hit: item by rule: words."""
    for row in rows:
        for line in row["detail"].splitlines():
            # Words hold no punctuation, rules no number sign; the name of a set may hold anything.
            name, _, rest = line.rpartition("#")
            number, _, rest = rest.partition(" by ")
            rule, _, words = rest.partition(": ")
            found = {"item": f"{name}#{number}", "rule": rule, "words": words}
            yield {"where": row["where"]} | found


def _benchmark(item: str) -> str:
    return item.rpartition("#")[0]


def lengths(folder: ShardFolder) -> list[Bar]:
    """Documents by their number of tokens; a class ends where the next power of two begins."""
    found = np.concatenate([split.num_tokens for split in present(folder)])
    classes = np.bincount(np.log2(np.maximum(found, 1)).astype(int))
    first = int(np.flatnonzero(classes)[0])
    labels = [f"{1 << n:,} to {(2 << n) - 1:,}" for n in range(first, len(classes))]
    return bars(zip(labels, classes[first:].tolist(), strict=True), len(found))


def languages(folder: ShardFolder) -> dict[str, Any]:
    """Of the first documents; ``missing`` says why when nobody could tell."""
    try:
        detect = resiliparse_detector(LanguageConfig.model_fields["max_distance"].default)
    except UserError as error:
        return {"missing": str(error)}
    first = islice(chain.from_iterable(present(folder)), LANGUAGE_SAMPLE)
    found = Counter(detect(document.text) for document in first)
    return {"bars": most(found, LANGUAGES_SHOWN), "sample": found.total()}


def domains(folder: ShardFolder) -> dict[str, Any]:
    """The domains with the most documents, and how many there are."""
    found = Counter(chain.from_iterable(split.domains for split in present(folder)))
    unknown = found.pop("", 0)
    return {"bars": most(found, DOMAINS_SHOWN), "count": len(found), "unknown": unknown}


def most(found: Counter[str], number: int) -> list[Bar]:
    """The most frequent ones, ties by name, and the others together."""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    others = ordered[number:]
    drawn = bars(ordered[:number], found.total())
    if others:
        count = sum(n for _, n in others)
        drawn.append(Bar(f"{len(others):,} others", count, count / found.total(), 0.0))
    return drawn
