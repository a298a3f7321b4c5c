"""Corpus -> shards: the rate of every stage beside the bare library's, in one run; the whole chain beside their sum.

    python launch/bench/data.py [--profile fast] [--memory GB] [--write]

Rates are documents a second of processor time, of all processes together. `--write` keeps them in data.json, with the
hardware and the date. `--memory GB` measures instead the largest process over so many gigabytes of differing pages.
Reads the corpora of RLPT_CORPUS (default ../shared/corpus).
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bare import Bare, bare_for
from rich.console import Console
from rich.table import Table

from rlpt_data.cuts import CutsConfig
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.duplicates import NearDuplicatesConfig
from rlpt_data.extraction.sandbox import LimitsConfig, Sandbox
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.quality import QualityConfig
from rlpt_data.rows import RowMaker
from rlpt_data.shards import ShardFolder
from rlpt_data.sources.files import lines
from rlpt_data.sources.warc import Page, pages
from rlpt_data.tokenizer import PlainTokenizer

CORPUS = Path(os.environ.get("RLPT_CORPUS", "../shared/corpus"))
ARCHIVE, TOKENIZER = CORPUS / "sample.warc.gz", CORPUS / "gpt2-tokenizer/tokenizer.json"
RESULTS = Path(__file__).with_name("data.json")
EXTRACTORS = {"fineweb": "trafilatura", "fast": "resiliparse"}
LIBRARIES = (
    "datatrove",
    "trafilatura",
    "resiliparse",
    "fastwarc",
    "spacy",
    "tokenizers",
    "pyarrow",
)
PAGE_BYTES, BATCH, ROUNDS = 16 << 20, 256, 3
_WORD = re.compile(rb" ([a-z]{6,12})(?= )")


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = cpu_seconds()
    result = work()
    return cpu_seconds() - started, result


def row(stage: str, count: int, bare: float, ours: float) -> dict[str, Any]:
    """Of seconds for ``count`` documents."""
    rates = {"bare": count / bare, "ours": count / ours, "ours_over_bare": bare / ours}
    return {"stage": stage, "documents": count} | rates


def stage_rows(profile: str) -> tuple[list[dict[str, Any]], float]:
    """A row for each stage, and the documents a second that the bare ones make in a chain."""
    bare = bare_for(profile, TOKENIZER)
    rows, (html, texts) = _reading(bare, EXTRACTORS[profile])
    kept_seconds, kept = timed(lambda: list(filter(bare.keeps, texts)))
    judge = QualityConfig(kind="quality", profile=profile).build()  # pyright: ignore[reportArgumentType]
    judge(SourceDocument("Warm up."))
    ours, _ = timed(lambda: [judge(SourceDocument(text)) for text in texts])
    rows.append(row("quality", len(texts), kept_seconds, ours))
    near = NearDuplicatesConfig(kind="near-duplicates")
    hashed, _ = timed(lambda: [bare.signature(text) for text in kept])
    ours, _ = timed(lambda: [near.signature(text) for text in kept])
    rows.append(row("minhash", len(kept), hashed, ours))
    rows.append(encoding(bare, kept))
    seconds = sum(found["documents"] / found["bare"] for found in rows)
    return rows, len(html) / seconds


def _reading(
    bare: Bare, extractor: str
) -> tuple[list[dict[str, Any]], tuple[list[str], list[str]]]:
    seconds, count = timed(lambda: bare.read(ARCHIVE))
    ours, found = timed(lambda: list(pages(ARCHIVE, PAGE_BYTES)))
    html = [page.html for page in found if isinstance(page, Page)]
    rows = [row("read", count, seconds, ours)]
    bare.extract(html[0])
    seconds, texts = timed(lambda: [bare.extract(page) for page in html])

    def sandboxed() -> None:
        with Sandbox(extractor, LimitsConfig()) as box:  # pyright: ignore[reportArgumentType]
            for page in html:
                box.extract(page)

    ours, _ = timed(sandboxed)
    rows.append(row("extract", len(html), seconds, ours))
    return rows, (html, [text for text in texts if text.strip()])


def encoding(bare: Bare, texts: Sequence[str]) -> dict[str, Any]:
    """Rows with cuts, offsets and the check for losses beside bare ids; the median of batches done in turn."""
    maker = RowMaker(PlainTokenizer.cached(TOKENIZER), CutsConfig(), 0)
    maker.rows([("", SourceDocument("Warm up."))])
    pairs = []
    for batch in [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)] * ROUNDS:
        documents = [("", SourceDocument(text)) for text in batch]
        alone, _ = timed(lambda batch=batch: bare.encode(batch))
        ours, _ = timed(lambda documents=documents: maker.rows(documents))
        pairs.append((alone, ours))
    ratio = statistics.median(alone / ours for alone, ours in pairs)
    seconds = sum(alone for alone, _ in pairs) / ROUNDS
    return row("encode and cut", len(texts), seconds, seconds / ratio)


def chain(profile: str, source: Path, folder: Path, workers: int = 1) -> tuple[float, int]:
    """CPU seconds of a whole preparation in processes of its own; MiB of the largest of them."""
    table = {
        "out": str(folder / profile),
        "workers": workers,
        "without_decontamination": True,
        "source": {"kind": "warc", "path": str(source), "extractor": EXTRACTORS[profile]},
        "stages": [{"kind": "quality", "profile": profile}, {"kind": "near-duplicates"}],
        "tokenizer": {"kind": "file", "path": str(TOKENIZER)},
        "split": {"dev": 0.05, "test": 0.05},
    }
    command = [sys.executable, __file__, "--prepare", json.dumps(table)]
    seconds, _ = timed(lambda: subprocess.run(command, check=True))
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10


def varied(folder: Path, num_bytes: int) -> int:
    """Archives of so many bytes of pages, no two alike: long words of every copy end otherwise. Gives their number."""
    found = [page.html.encode() for page in pages(ARCHIVE, PAGE_BYTES) if isinstance(page, Page)]
    written, copies = 0, 0
    while written < num_bytes:
        ending = bytes([ord("a") + copies // 26 % 26, ord("a") + copies % 26])
        with (folder / f"{copies:04d}.warc.gz").open("wb") as file:
            for number, page in enumerate(found):
                body = _WORD.sub(rb" \1" + ending, page)
                file.write(_member(f"https://s{number}.org/{copies}", body))
                written += len(body)
        copies += 1
    return copies * len(found)


def _member(url: str, body: bytes) -> bytes:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
    head += f"WARC-Record-ID: <urn:{url}>\r\nContent-Length: {len(block)}\r\n\r\n"
    packed = zlib.compressobj(1, wbits=31)
    return packed.compress(head.encode() + block + b"\r\n\r\n") + packed.flush()


def access_rate(folder: Path, count: int = 30_000) -> float:
    """Documents a second, at random, of digitalgov."""
    path = CORPUS / "digitalgov.jsonl.zst"
    texts = [json.loads(line[1])["text"] for line in lines(path) if not isinstance(line, Drop)]
    (folder / "pages.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    table = {
        "out": str(folder / "digitalgov"),
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": str(folder / "pages.jsonl")},
        "tokenizer": {"kind": "file", "path": str(TOKENIZER)},
    }
    prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    split = ShardFolder.open(folder / "digitalgov").split("train")
    places = np.random.default_rng(0).integers(len(split), size=count).tolist()
    return count / min(timed(lambda: [split[place] for place in places])[0] for _ in range(ROUNDS))


def measured(profiles: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A table for each profile, then the comparisons."""
    chains = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pages").mkdir()
        count = varied(folder / "pages", 3 * 90_000_000)
        for profile in profiles:
            rows, together = stage_rows(profile)
            chains[profile] = count / chain(profile, folder / "pages", folder)[0]
            whole = {"stage": "whole chain", "documents": count, "bare": together}
            whole |= {"ours": chains[profile], "ours_over_bare": chains[profile] / together}
            yield {"profile": profile, "rows": [*rows, whole]}
        if len(chains) == len(EXTRACTORS):
            yield {"fast_over_fineweb": chains["fast"] / chains["fineweb"]}
        yield {"random_access_documents_per_second": access_rate(folder)}


def memory(gigabytes: float) -> dict[str, Any]:
    """Of the fast profile with two workers; the corpus lies on the disk meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pages").mkdir()
        count = varied(folder / "pages", int(gigabytes * 1e9))
        started = time.monotonic()
        seconds, peak = chain("fast", folder / "pages", folder, workers=2)
        wall = time.monotonic() - started
        counts = ShardFolder.open(folder / "fast").manifest.counts
        kept = sum(found.documents for found in counts.values())
    found = {"pages_gb": gigabytes, "pages": count, "documents_kept": kept, "peak_mib": peak}
    return found | {"cpu_seconds": seconds, "wall_seconds": wall}


def show(found: dict[str, Any]) -> None:
    if "rows" not in found:
        Console().print(found)
        return
    table = Table("stage", "documents", "bare /s", "ours /s", "ours/bare", title=found["profile"])
    for each in found["rows"]:
        numbers = (f"{each[key]:,.1f}" for key in ("bare", "ours"))
        ratio = f"{each['ours_over_bare']:.2f}"
        table.add_row(each["stage"], str(each["documents"]), *numbers, ratio)
    Console().print(table)


def write(key: str, found: Any) -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"date": date.today().isoformat(), "cpu": _cpu(), "cores": os.cpu_count()}
    machine["load"] = os.getloadavg()[0]
    versions = {name: version(name) for name in LIBRARIES}
    kept[key] = {"machine": machine, "versions": versions, "found": found}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--profile", choices=tuple(EXTRACTORS), help="only this one")
    parser.add_argument("--memory", type=float, metavar="GB", help="peak memory over so much")
    parser.add_argument("--write", action="store_true", help=f"keep what is seen in {RESULTS.name}")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(PrepareConfig.model_validate_json(options.prepare), progress=False)
        return
    # Rates are of one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = []
    profiles = [options.profile] if options.profile else list(EXTRACTORS)
    for each in [memory(options.memory)] if options.memory else measured(profiles):
        show(each)
        found.append(each)
    if options.write:
        write("memory" if options.memory else "rates", found)


if __name__ == "__main__":
    main()
