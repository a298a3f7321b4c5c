"""Figures of a shard folder, a file at a time: memory holds one count for each length and domain."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlpt_data.manifest import SPLITS
from rlpt_data.shards import CUT_KINDS, ShardFolder

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
NUM_DOMAINS = 20


def stats(place: Path | str) -> dict[str, Any]:
    """For each split: counts, bytes a token, cuts by kind, quantiles of lengths (tokens) and of cuts
    a document, and the domains with the most documents."""
    folder = ShardFolder.open(place)
    present = [name for name in SPLITS if folder.has(name)]
    return {
        "path": str(place),
        "hash": folder.manifest.hash,
        "splits": {name: _of_split(folder, name) for name in present},
    }


def _of_split(folder: ShardFolder, name: str) -> dict[str, Any]:
    lengths, cuts, kinds, domains = (Counter[Any]() for _ in range(4))
    for file in folder.shard_files():
        if not file.startswith(f"{name}/"):
            continue
        split = folder.file(file)
        lengths.update(split.num_tokens.tolist())
        cuts.update(split.num_cuts.tolist())
        kinds.update(split.flat_cut_kinds.tolist())
        domains.update(split.domains)
    counts = folder.manifest.counts[name]
    top = sorted(domains.items(), key=lambda pair: (-pair[1], pair[0]))[:NUM_DOMAINS]
    return {
        **counts.model_dump(),
        "bytes_per_token": counts.bytes / counts.tokens,
        "cuts": {kind: kinds[number] for number, kind in enumerate(CUT_KINDS)},
        "document_tokens": quantiles(lengths),
        "document_cuts": quantiles(cuts),
        "num_domains": len(domains),
        "domains": {domain: count / counts.documents for domain, count in top},
    }


def quantiles(counted: Mapping[int, int]) -> dict[str, int]:
    """The least value that at least a share q of all has, for each q of ``QUANTILES``."""
    values = np.array(sorted(counted))
    ends = np.cumsum([counted[value] for value in values.tolist()])
    wanted = [max(1, int(np.ceil(q * ends[-1]))) for q in QUANTILES]
    found = values[np.searchsorted(ends, wanted)]
    return {f"{q:g}": int(value) for q, value in zip(QUANTILES, found, strict=True)}


def render_stats(found: Mapping[str, Any]) -> RenderableType:
    """The dictionary of ``stats`` for the terminal."""
    splits: dict[str, Any] = found["splits"]
    counts = Table("split", "documents", "tokens", "bytes", "bytes/token", *CUT_KINDS, "domains")
    spread = Table("split", "quantile", *(f"{q:g}" for q in QUANTILES))
    top = Table("split", "domain", "share of documents")
    for name, table in splits.items():
        numbers = [f"{table[key]:,}" for key in ("documents", "tokens", "bytes")]
        ratio = f"{table['bytes_per_token']:.2f}"
        cuts = [f"{count:,}" for count in table["cuts"].values()]
        counts.add_row(name, *numbers, ratio, *cuts, f"{table['num_domains']:,}")
        for what in ("document_tokens", "document_cuts"):
            label = what.removeprefix("document_") + " a document"
            spread.add_row(name, label, *(f"{value:,}" for value in table[what].values()))
        for domain, share in list(table["domains"].items())[:5]:
            top.add_row(name, Text(domain or "(unknown)"), f"{share:.1%}")
    return Group(Text(f"{found['path']}\nhash {found['hash']}"), counts, spread, top)
