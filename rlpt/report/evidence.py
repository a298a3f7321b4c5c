"""What the numbers were made of and on: the shards, the machine, versions, hashes, and the checks that
a run makes before its first step.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlpt.report.run import Row, Run, read_object
from rlpt.report.words import duration, number
from rlpt_data.provenance import sources_of

_FILES = ("config.json", "metrics.jsonl", "evaluations.jsonl", "summary.json")


class DataCard(NamedTuple):
    """One folder of shards. ``splits`` has (split, documents, tokens, bytes)."""

    name: str
    remark: str
    """Why there is no more than the path, or that it is another folder than the run's; "" if all is well."""
    facts: list[tuple[str, str]]
    splits: list[tuple[str, str, str, str]]


def data_cards(run: Run) -> list[DataCard]:
    """A card for every folder of shards that the configuration names; what cannot be reached says so."""
    data = run.config.get("data") or {}
    alone = [str(data["shards"])] if data.get("shards") else []
    mixed = [str(part.get("shards")) for part in data.get("mixture") or []]
    return [_card(run, place, known=not mixed) for place in alone + mixed]


def _card(run: Run, place: str, known: bool) -> DataCard:
    if "://" in place:
        return DataCard(place, "at a URL, which a report does not read", _hashes(run), [])
    folder = _reached(run.path, Path(place))
    if folder is None:
        return DataCard(place, "not reachable from here", _hashes(run), [])
    missing: list[str] = []
    manifest = read_object(folder / "manifest.json", "the data", missing)
    if missing:
        return DataCard(place, missing[0], _hashes(run), [])
    trained, found = run.trained_on.get("shards"), manifest.get("hash")
    other = known and trained is not None and trained != found
    remark = f"now holds shards {found}; the run was trained on {trained}" if other else ""
    return DataCard(place, remark, list(_facts(manifest)), _splits(manifest))


def _reached(run_dir: Path, shards: Path) -> Path | None:
    """The shards as the configuration says, from here or from any folder above the run."""
    above = [Path(), *run_dir.resolve().parents]
    places = (folder / shards for folder in above)
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def _facts(manifest: Row) -> Iterator[tuple[str, str]]:
    for source in sources_of(manifest.get("config") or {}):
        stated = source.licence or "not stated"
        yield f"source {source.name}".strip(), f"{source.kind} {source.place}, licence {stated}"
    yield "split by", str(manifest.get("split_by"))
    drops = manifest.get("drops") or {}
    yield "left out", ", ".join(f"{count:,} {why}" for why, count in drops.items()) or "nothing"
    yield "vocabulary", number(manifest.get("vocab_size"))
    yield "hash of the shards", str(manifest.get("hash"))
    yield "hash of the tokenizer", str(manifest.get("tokenizer_hash"))


def _splits(manifest: Row) -> list[tuple[str, str, str, str]]:
    counts = manifest.get("counts") or {}
    names = ("documents", "tokens", "bytes")
    return [(split, *(number(of.get(name)) for name in names)) for split, of in counts.items()]  # pyright: ignore


def _hashes(run: Run) -> list[tuple[str, str]]:
    """What the checkpoint knows of shards that are not here."""
    named = (("hash of the shards", "shards"), ("hash of the tokenizer", "tokenizer"))
    return [(title, run.trained_on[key]) for title, key in named if run.trained_on.get(key)]


def evidence(run: Run) -> list[tuple[str, str]]:
    """(what, value) of machine, versions, checks and files; only what the run wrote down."""
    environment, summary = run.environment, run.summary
    rows = [("run folder", str(run.path))]
    for title, key in (("platform", "platform"), ("device", "device"), ("python", "python")):
        if environment.get(key) is not None:
            rows.append((title, str(environment[key])))
    if environment.get("ranks") is not None:
        rows.append(("ranks", f"{environment['ranks']}, {environment.get('cores')} cores"))
    if summary.get("wall_seconds") is not None:
        rows.append(("wall time", duration(summary["wall_seconds"])))
    if summary.get("peak_memory_gib") is not None:
        rows.append(("peak memory of a rank", f"{number(summary['peak_memory_gib'], 2)} GiB"))
    packages: Mapping[str, Any] = environment.get("packages") or {}
    rows += [(name, str(version)) for name, version in packages.items() if version is not None]
    rows += _checks(environment.get("checks"))
    return rows + _digests(run)


def _checks(checks: Row | None) -> list[tuple[str, str]]:
    """Before the first step: the shared layout against one sequence at a time, engine against trainer."""
    if not checks:
        return [("checks before the first step", "not in this run's environment.json")]
    rows = []
    if (layout := checks.get("layout")) is not None:
        bar = f"{layout['largest']:.1e} nats at most (bar {layout['bar']:.0e})"
        rows.append(("shared layout against one by one", bar))
    if (engine := checks.get("engine")) is not None:
        text = f"{engine['largest']:.1e} nats at most over {engine['tokens']:,} tokens, "
        rows.append(
            ("engine against trainer", f"{text}rms {engine['rms']:.1e} ({engine['dtype']})")
        )
    return rows


def _digests(run: Run) -> list[tuple[str, str]]:
    """What this page was drawn from, byte for byte."""
    paths = [run.path / name for name in _FILES]
    return [
        (f"blake2b of {path.name}", hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
        for path in paths
        if path.is_file()
    ]
