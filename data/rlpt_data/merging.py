"""Shard folders of one tokenizer -> one folder, without preparing anything again.

No text is in it twice, its order is the global shuffle of `prepare`, and what one folder holds out is
trained on from no other. The bytes do not depend on the order in which the folders are named.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlpt_data.contamination import FILE
from rlpt_data.documents import Drop
from rlpt_data.manifest import SPLITS, Manifest, digest
from rlpt_data.order import rank
from rlpt_data.plan import versions
from rlpt_data.progress import shown
from rlpt_data.shards import Document, ShardFolder, Split, read_drop_samples
from rlpt_data.strict import UserError
from rlpt_data.tally import NUM_SAMPLES, Tally
from rlpt_data.target import check_target
from rlpt_data.work import Alone
from rlpt_data.writing import Facts, write_folder

STAGE = "merge"
TWICE, HELD_OUT = "duplicate", "held_out_elsewhere"


class _Rows(Sequence[Document]):
    """Documents by place, read when they are asked for."""

    def __init__(self, splits: Sequence[Split], places: np.ndarray) -> None:
        self._splits = splits
        self.places = places
        """(documents, 2): the number of the split, the row in it."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        number, row = self.places[index].tolist()
        return self._splits[number][row]

    def at(self, chosen: np.ndarray) -> "_Rows":
        return _Rows(self._splits, self.places[chosen])


def merge(
    out: Path, places: Sequence[Path | str], overwrite: bool = False, shard_bytes: int = 256 << 20
) -> Manifest:
    """Write ``out`` from the shard folders at ``places`` and return its manifest.

    Raises UserError where the folders do not fit together, or ``out`` is there and ``overwrite`` is
    False. Annotations are not carried over.
    """
    check_target(out)
    with Alone(out):
        return _merged(out, places, overwrite, shard_bytes)


def _merged(out: Path, places: Sequence[Path | str], overwrite: bool, shard_bytes: int) -> Manifest:
    folders = sorted((ShardFolder.open(place) for place in places), key=lambda f: f.manifest.hash)
    _check_alike(folders)
    config = folders[0].manifest.config
    tally = Tally()
    for folder in folders:
        tally.add(_tally(folder))
    pairs = [(n, f.split(name)) for f in folders for n, name in enumerate(SPLITS) if f.has(name)]
    splits = [split for _, split in pairs]
    lengths = [len(split) for split in splits]
    sides = np.repeat([side for side, _ in pairs], lengths)
    numbers = np.repeat(np.arange(len(splits)), lengths)
    own = np.concatenate([np.arange(length) for length in lengths])
    rows = _Rows(splits, np.stack([numbers, own], axis=1))
    keys = np.array([key for split in splits for key in split.document_ids])
    last = _last_sides(keys, sides)
    if folders[0].manifest.split_by == "domain":
        domains = np.array([name for split in splits for name in split.domains])
        whole = np.where(domains == "", sides, _last_sides(domains, sides))
        last = _last_sides(keys, np.maximum(last, whole))
    first = _first_of_equals(rows, keys, sides == last)
    tally.enter(STAGE, len(keys))
    _tell(tally, rows, HELD_OUT, np.flatnonzero(sides != last))
    _tell(tally, rows, TWICE, np.setdiff1d(np.flatnonzero(sides == last), first))
    ranks = np.array([rank(config["seed"], str(key)) for key in keys[first]])
    first = first[np.argsort(ranks, kind="stable")]
    chosen = {name: rows.at(first[sides[first] == n]) for n, name in enumerate(SPLITS)}
    _check_sides(chosen, splits)
    documents = {n: shown(those, f"merge {n}", len(those)) for n, those in chosen.items()}
    tokenizer = folders[0].tokenizer_path.read_bytes()
    facts = _facts(folders, tally)
    return write_folder(
        out, documents, tokenizer, facts, shard_bytes=shard_bytes, overwrite=overwrite
    )


def _check_alike(folders: Sequence[ShardFolder]) -> None:
    """What must be the same for one order, one split and one vocabulary."""
    for folder in folders:
        if "seed" not in folder.manifest.config:
            raise UserError(f"{folder.path}: its manifest names no seed; prepare it again")
        for what, value in _common(folder).items():
            if value != (theirs := _common(folders[0])[what]):
                raise UserError(
                    f"{folder.path}: its {what} ({value}) differs from that of {folders[0].path} "
                    f"({theirs}); prepare both alike"
                )
    for before, folder in pairwise(folders):
        if before.manifest.hash == folder.manifest.hash:
            raise UserError(f"{folder.path}: the same shards as {before.path}; name them once")


def _common(folder: ShardFolder) -> dict[str, Any]:
    manifest = folder.manifest
    index = folder.local(FILE)
    return {
        "tokenizer hash": manifest.tokenizer_hash,
        "[split]": manifest.config.get("split"),
        "unit of the split": manifest.split_by,
        "seed": manifest.config.get("seed"),
        "index of evaluation sets": digest(index.read_bytes()) if index.is_file() else None,
    }


def _check_sides(chosen: Mapping[str, _Rows], splits: Sequence[Split]) -> None:
    for name in {split.name for split in splits}:
        if not chosen[name]:
            raise UserError(
                f"[split] {name}: the other folders hold out every document of it; leave one out"
            )


def _last_sides(keys: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """For every row the last of train, dev and test on which its key is found."""
    _, inverse = np.unique(keys, return_inverse=True)
    last = np.zeros(inverse.max(initial=-1) + 1, np.int64)
    np.maximum.at(last, inverse, sides)
    return last[inverse]


def _first_of_equals(rows: _Rows, keys: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Of the ``free`` rows one for each key: the one whose URL, then domain, sorts first."""
    places = np.flatnonzero(free)
    counts = Counter(keys[places].tolist())
    best: dict[str, tuple[tuple[str, str], int]] = {}
    for place in places.tolist():
        key = str(keys[place])
        name = ("", "") if counts[key] == 1 else _preference(rows[place])
        best[key] = min(best.get(key, (name, place)), (name, place))
    return np.array(sorted(place for _, place in best.values()), np.int64)


def _preference(row: Document) -> tuple[str, str]:
    """As `prepare` chooses among equal texts."""
    return row.url or "\U0010ffff", row.domain


def _tell(tally: Tally, rows: _Rows, reason: str, dropped: np.ndarray) -> None:
    for place in dropped[:NUM_SAMPLES].tolist():
        row = rows[place]
        tally.drop(STAGE, Drop(reason, row.url or row.document_id, row.text[:160]))
    tally.count(STAGE, reason, len(dropped) - len(dropped[:NUM_SAMPLES]))


def _tally(folder: ShardFolder) -> Tally:
    """What the manifest counts, with the samples."""
    manifest = folder.manifest
    samples = {
        reason: [(row["where"], row["detail"]) for row in read_drop_samples(folder, reason)]
        for reason in manifest.drops
    }
    stages = manifest.stages or ({"stage": "", "in": 0, "dropped": manifest.drops},)
    entered = Counter({row["stage"]: row["in"] for row in stages})
    return Tally(entered, {row["stage"]: Counter(row["dropped"]) for row in stages}, samples)


def _facts(folders: Sequence[ShardFolder], tally: Tally) -> Facts:
    manifests = [folder.manifest for folder in folders]
    first = manifests[0]
    counted = all(manifest.stages is not None for manifest in manifests)
    names = dict.fromkeys(row["stage"] for m in manifests for row in m.stages or ())
    index = folders[0].local(FILE)
    return Facts(
        vocab_size=first.vocab_size,
        split_by=first.split_by,
        config={
            "seed": first.config["seed"],
            "split": first.config["split"],
            "merged": [{"hash": m.hash, "config": m.config} for m in manifests],
        },
        input_hash=digest(" ".join(m.hash for m in manifests).encode()),
        drops=tally.reasons,
        drop_samples=tally.samples(),
        stages=tuple(tally.table([*names, STAGE])) if counted else None,
        extras={FILE: index.read_bytes()} if index.is_file() else {},
        created_by=versions(),
    )
