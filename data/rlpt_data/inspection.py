"""A look at a shard folder: as a dictionary for machines, as tables for people."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlpt_data.datasheet.figures import funnel, kinds
from rlpt_data.manifest import SPLITS
from rlpt_data.shards import CUT_KINDS, Document, ShardFolder, read_drop_samples

NUM_DOCUMENTS = 3
EXCERPT_TOKENS = 160
MARK = "\u2502"


def inspect(path: Path) -> dict[str, Any]:
    """Counts, drops with samples, cuts by kind and a few documents with their cuts marked."""
    folder = ShardFolder.open(path)
    manifest = folder.manifest
    present = [
        name for name in SPLITS if manifest.counts.get(name) and manifest.counts[name].documents
    ]
    return {
        "path": str(path),
        "hash": manifest.hash,
        "tokenizer_hash": manifest.tokenizer_hash,
        "vocab_size": manifest.vocab_size,
        "split_by": manifest.split_by,
        "counts": {name: manifest.counts[name].model_dump() for name in present},
        "cuts": {name: kinds(folder.split(name)) for name in present},
        "stages": funnel(manifest),
        "drops": {
            reason: {"count": count, "samples": read_drop_samples(folder, reason)}
            for reason, count in manifest.drops.items()
        },
        "documents": list(islice(_shown(folder, present), NUM_DOCUMENTS)),
    }


def render_inspect(found: dict[str, Any]) -> RenderableType:
    """The dictionary of ``inspect`` for the terminal."""
    head = Text(
        f"{found['path']}\nhash {found['hash']}  vocabulary {found['vocab_size']}"
        f"  split by {found['split_by']}\n"
    )
    tables = (_counts_table(found), _stages_table(found["stages"]), _drops_table(found["drops"]))
    return Group(head, *tables, *_pages(found))


def _shown(folder: ShardFolder, names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        for document in islice(folder.split(name), NUM_DOCUMENTS):
            yield {
                "document_id": document.document_id,
                "split": name,
                "url": document.url,
                "domain": document.domain,
                "tokens": document.num_tokens,
                "cuts": dict(Counter(CUT_KINDS[kind] for kind in document.cut_kinds)),
                "excerpt": excerpt(document),
            }


def excerpt(document: Document, num_tokens: int = EXCERPT_TOKENS) -> str:
    """The text around the first cut, with a mark at every cut."""
    start = max(0, int(document.cuts[0]) - num_tokens // 2) if len(document.cuts) else 0
    stop = min(start + num_tokens, document.num_tokens)
    inside = [int(cut) for cut in document.cuts if start < cut < stop]
    data = document.text.encode()
    edges = [int(document.offsets[at]) for at in (start, *inside, stop)]
    return MARK.join(data[a:b].decode(errors="replace") for a, b in pairwise(edges))


def _counts_table(found: dict[str, Any]) -> Table:
    table = Table("split", "documents", "tokens", "bytes", "bytes/token", *CUT_KINDS)
    for name, counts in found["counts"].items():
        ratio = f"{counts['bytes'] / max(1, counts['tokens']):.2f}"
        numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *numbers, ratio, *(f"{n:,}" for n in found["cuts"][name].values()))
    return table


def _stages_table(stages: list[dict[str, Any]]) -> Table:
    table = Table("stage", "in", "left out", "out", "of all")
    for row in stages:
        numbers = [f"{row[key]:,}" for key in ("in", "left", "out")]
        table.add_row(row["stage"], *numbers, f"{row['kept']:.1f}%")
    return table


def _drops_table(drops: dict[str, Any]) -> Table:
    table = Table("dropped", "documents", "for example")
    for reason, drop in drops.items():
        sample = drop["samples"][0] if drop["samples"] else {"where": "", "detail": ""}
        shown = Text(" ".join(f"{sample['where']}: {sample['detail']}".split())[:100])
        table.add_row(reason, f"{drop['count']:,}", shown)
    return table


def _pages(found: dict[str, Any]) -> Iterator[Text]:
    for page in found["documents"]:
        cuts = ", ".join(f"{count} {kind}" for kind, count in page["cuts"].items())
        title = f"\n{page['split']} {page['url'] or page['document_id']}"
        yield Text(f"{title}: {page['tokens']} tokens, cuts: {cuts}", style="bold")
        yield Text(page["excerpt"])
