"""Several shard folders as one: which of them every sample is of, and what of each may be read.

Folders keep their files, order and epochs; nothing is written. A document that one folder holds out is not trained on
from another. Folders are taken in the order of their hashes: that of the configuration has no part in any sample.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64

from rlpt.config import DataConfig, RunConfig
from rlpt.prompts import Samples, Stream, prompt_stream, window_stream
from rlpt.questions import question_stream
from rlpt.rlvr import RLVRStage
from rlpt.stages import NextTokenStage, Stage
from rlpt.tiers import TieredSamples, all_tiers
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.shards import SPLITS, Counts, Document, Manifest, ShardFolder, Split
from rlpt_data.strict import UserError

LONGEST = 100_000
"""Samples after which a schedule repeats, at most: weights with four or five digits."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """One round of turns, repeated. After any n samples each source had its share of n, to within one."""

    counts: tuple[int, ...]
    """Turns of each source in a round."""
    turns: Int64[np.ndarray, " W"]
    """The source of every turn."""
    earlier: Int64[np.ndarray, " W"]
    """Turns that the same source had before, in the round."""

    def place(self, position: int) -> tuple[int, int]:
        """(source, which of its own samples) of the sample at a position."""
        turn, slot = divmod(position, len(self.turns))
        source = int(self.turns[slot])
        return source, turn * self.counts[source] + int(self.earlier[slot])

    def taken(self, position: int) -> list[int]:
        """Samples of each source before a position."""
        turn, slot = divmod(position, len(self.turns))
        begun = np.bincount(self.turns[:slot], minlength=len(self.counts)).tolist()
        return [turn * count + more for count, more in zip(self.counts, begun, strict=True)]


def schedule(weights: Sequence[float]) -> Schedule:
    """Earliest deadline first, in integers: sample j of a source with w of W turns has its turn in
    [floor(j W / w), ceil((j + 1) W / w)).

    Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress". Weights count as the decimals they are written as.
    Raises UserError where a round would have more than ``LONGEST`` turns.
    """
    parts = [Fraction(repr(weight)) for weight in weights]
    unit = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * unit) for part in parts]
    counts = [number // math.gcd(*whole) for number in whole]
    total = sum(counts)
    if total > LONGEST:
        raise UserError(
            f"[data.mixture] weights {', '.join(map(str, weights))}: repeat after {total} documents only; "
            "give them fewer digits"
        )
    done, turns, earlier = [0] * len(counts), [], []
    for slot in range(total):
        released = [k for k, w in enumerate(counts) if done[k] * total < (slot + 1) * w]
        turn = min(released, key=lambda k: -(-(done[k] + 1) * total // counts[k]))
        turns.append(turn)
        earlier.append(done[turn])
        done[turn] += 1
    return Schedule(tuple(counts), np.array(turns, np.int64), np.array(earlier, np.int64))


class MixedStream(Samples):
    """Streams in turns; each goes through its own epochs."""

    def __init__(self, streams: Sequence[Stream], names: Sequence[str], turns: Schedule) -> None:
        self.streams = streams
        self.names = names
        self.turns = turns

    @property
    def period(self) -> int:
        rounds = zip(self.streams, self.turns.counts, strict=True)
        return len(self.turns.turns) * max(-(-stream.period // count) for stream, count in rounds)

    def at(self, position: int) -> tuple[int, Document]:
        """Epoch e of source k of K counts as e K + k: no two visits of a document draw the same cuts."""
        source, own = self.turns.place(position)
        epoch, document = self.streams[source].at(own)
        return epoch * len(self.streams) + source, document

    def shares(self, position: int) -> dict[str, float]:
        """``mixture/NAME`` of every source among the samples before a position."""
        taken = self.turns.taken(position)
        pairs = zip(self.names, taken, strict=True)
        return {f"mixture/{name}": count / max(1, position) for name, count in pairs}


class Selected(Split):
    """Chosen documents of some splits, one split after the other; their rows increase."""

    def __init__(self, name: str, parts: Sequence[tuple[Split, Int64[np.ndarray, " _"]]]) -> None:
        self.name = name
        self._parts = parts
        self._ends: list[int] = np.cumsum([len(rows) for _, rows in parts]).tolist()

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of split {self.name!r} with {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        split, rows = self._parts[number]
        return split[int(rows[index - self._ends[number]])]

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """(documents,) int64."""
        return np.concatenate([split.num_tokens[rows] for split, rows in self._parts])

    @cached_property
    def num_cuts(self) -> np.ndarray:
        """(documents,) int64."""
        return np.concatenate([split.num_cuts[rows] for split, rows in self._parts])

    @cached_property
    def flat_cuts(self) -> Int64[np.ndarray, " C"]:
        """The cuts of every document, one after the other."""
        return np.concatenate([s.flat_cuts[_of_rows(s, rows)] for s, rows in self._parts])

    @cached_property
    def flat_cut_kinds(self) -> Int64[np.ndarray, " C"]:
        """Index into CUT_KINDS, one for each of ``flat_cuts``."""
        return np.concatenate([s.flat_cut_kinds[_of_rows(s, rows)] for s, rows in self._parts])

    @cached_property
    def document_ids(self) -> list[str]:
        return [split.document_ids[row] for split, rows in self._parts for row in rows.tolist()]

    @cached_property
    def domains(self) -> list[str]:
        return [split.domains[row] for split, rows in self._parts for row in rows.tolist()]


def _of_rows(split: Split, rows: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " C"]:
    chosen = np.zeros(len(split), bool)
    chosen[rows] = True
    return np.repeat(chosen, split.num_cuts)


@dataclass(frozen=True, kw_only=True)
class Mixture(ShardFolder):
    """Shard folders in the order of their hashes; path and tokenizer are the first one's, the hash covers all."""

    folders: tuple[ShardFolder, ...]
    names: tuple[str, ...]
    turns: Schedule

    def parts(self, name: str, query: AnnotatedCuts | None = None) -> list[Split]:
        """A split of every folder that has it (train: of every one), without what another folder keeps on a later side.

        The sides are train, dev, test. Raises UserError where nothing of a folder is left.
        """
        have = [f for f in self.folders if name == "train" or f.has(name)] or [self.folders[0]]
        return [self._part(folder, name, query) for folder in have]

    def _part(self, folder: ShardFolder, name: str, query: AnnotatedCuts | None) -> Split:
        split = folder.split(name, query)
        held = [_held_out(other, name) for other in self.folders if other is not folder]
        ids, domains = (set[str]().union(*kinds) for kinds in zip(*held, strict=True))
        pairs = zip(split.document_ids, split.domains, strict=True)
        free = [key not in ids and domain not in domains for key, domain in pairs]
        if not any(free):
            raise UserError(
                f"{folder.path}: every document of split {name} is held out by another folder of [data.mixture]; "
                "prepare the folders with one [split], or leave this one out"
            )
        return Selected(name, [(split, np.flatnonzero(free))])

    def split(self, name: str, query: AnnotatedCuts | None = None) -> Split:
        """The parts one after the other, every document once."""
        seen: set[str] = set()
        chosen = []
        for part in self.parts(name, query):
            rows = [row for row, key in enumerate(part.document_ids) if key not in seen]
            seen.update(part.document_ids)
            chosen.append((part, np.array(rows, np.int64)))
        return Selected(name, chosen)


def _held_out(folder: ShardFolder, name: str) -> tuple[set[str], set[str]]:
    """Ids, and domains where whole ones are held out, on the sides after ``name``."""
    sides = SPLITS[SPLITS.index(name) + 1 :] if name in SPLITS else ()
    splits = [folder.split(side) for side in sides if folder.has(side)]
    by_domain = splits if folder.manifest.split_by == "domain" else []
    ids = {key for split in splits for key in split.document_ids}
    return ids, {domain for split in by_domain for domain in split.domains} - {""}


def open_shards(cfg: DataConfig) -> ShardFolder:
    """The shards of a configuration, one folder or a mixture. Raises UserError.

    Folders of a mixture have one tokenizer, and none is named twice.
    """
    if cfg.shards is not None:
        return ShardFolder.open(cfg.shards)
    opened = [(ShardFolder.open(part.shards), part) for part in cfg.mixture]
    opened.sort(key=lambda pair: pair[0].manifest.hash)
    folders = tuple(folder for folder, _ in opened)
    _check_alike(folders)
    turns = schedule([part.weight for _, part in opened])
    manifest = _combined([folder.manifest for folder in folders], turns.counts)
    names = tuple(part.name for _, part in opened)
    return Mixture(
        path=folders[0].path,
        manifest=manifest,
        url=folders[0].url,
        folders=folders,
        names=names,
        turns=turns,
    )


def _check_alike(folders: Sequence[ShardFolder]) -> None:
    first = folders[0]
    for before, folder in pairwise(folders):
        if folder.manifest.tokenizer_hash != first.manifest.tokenizer_hash:
            raise UserError(
                f"[data.mixture] {folder.path}: its tokenizer has hash {folder.manifest.tokenizer_hash}, that of "
                f"{first.path} {first.manifest.tokenizer_hash}; prepare both with one tokenizer file"
            )
        if folder.manifest.hash == before.manifest.hash:
            raise UserError(
                f"[data.mixture] {folder.path}: holds the same shards as {before.path}; add up their weights"
            )


def _combined(manifests: Sequence[Manifest], counts: Sequence[int]) -> Manifest:
    """What a run asks of a manifest: a hash that covers folders and weights, counts, the unit of the split."""
    hashes = [manifest.hash for manifest in manifests]
    covered = repr(list(zip(hashes, counts, strict=True))).encode()
    units = {manifest.split_by for manifest in manifests}
    totals = {
        name: _total([m.counts[name] for m in manifests if name in m.counts]) for name in SPLITS
    }
    return manifests[0].model_copy(
        update={
            "hash": hashlib.blake2b(covered, digest_size=16).hexdigest(),
            # A bootstrap over whole domains is right for documents, too, and only wider.
            "split_by": "domain" if "domain" in units else manifests[0].split_by,
            "counts": totals,
        }
    )


def _total(counts: Sequence[Counts]) -> Counts:
    fields = {name: sum(getattr(count, name) for count in counts) for name in Counts.model_fields}
    return Counts(**fields)


def stage_stream(shards: ShardFolder, cfg: RunConfig, stage: Stage) -> Samples:
    """The order of a stage. Every folder of a mixture is permuted by its own hash, whatever it is mixed with."""
    if isinstance(stage, RLVRStage):
        return question_stream(shards, cfg.prompts, stage, cfg.seed)
    if isinstance(stage, NextTokenStage):
        return _samples(shards, cfg, stage, None)
    if stage.curriculum is None:
        return _samples(shards, cfg, stage, cfg.data.cuts)
    query = all_tiers(cfg.data.cuts or AnnotatedCuts(), stage.curriculum, stage.name)
    samples = _samples(shards, cfg, stage, query)
    # A document that is trained several times takes the place of fresh ones.
    per_step = stage.documents_per_step // cfg.rollout.max_reuse
    return TieredSamples(samples, stage, cfg.prompts, cfg.seed, max(1, per_step))


def _samples(
    shards: ShardFolder, cfg: RunConfig, stage: Stage, query: AnnotatedCuts | None
) -> Samples:
    if not isinstance(shards, Mixture):
        return _stream(shards.split("train", query), cfg, stage, stage.name)
    purposes = [f"{stage.name}/{folder.manifest.hash}" for folder in shards.folders]
    parts = shards.parts("train", query)
    streams = [_stream(part, cfg, stage, p) for part, p in zip(parts, purposes, strict=True)]
    return MixedStream(streams, shards.names, shards.turns)


def _stream(split: Split, cfg: RunConfig, stage: Stage, purpose: str) -> Stream:
    if isinstance(stage, NextTokenStage):
        return window_stream(split, cfg.seed, purpose, cfg.data.domains)
    return prompt_stream(split, cfg.prompts, cfg.seed, purpose, cfg.data.domains)
