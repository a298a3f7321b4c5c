"""Shards -> trunks -> prompts. The order has no state: sample i of epoch e is a permutation keyed by (seed, e), and the
cuts of a document are drawn from (seed, epoch, document). One cursor names the position; ranks only share it out.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int, Integer

from rlpt import dist, rng
from rlpt.config import PromptConfig
from rlpt.types import Markers, Prompt, Sums, Trunk, concat
from rlpt_data.shards import CUT_KINDS, Document, Split
from rlpt_data.strict import UserError

_ROUNDS = 6


def permute(index: int, count: int, key: int) -> int:
    """Image of ``index`` under a pseudorandom permutation of range(count): a Feistel network, cycle-walked into range.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_scramble(right, key + turn * 0x632BE59BD9B4E019) & mask)
        value = (left << half) | right
        if value < count:
            return value


def _scramble(value: int, key: int) -> int:
    bits = ((value + 1) * 0x9E3779B97F4A7C15 ^ key) & (2**64 - 1)
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return bits ^ (bits >> 31)


class Samples:
    """An endless, stateless order of documents."""

    def at(self, position: int) -> tuple[int, Document]:
        """(epoch, document) of the sample at a global position."""
        raise NotImplementedError

    @property
    def period(self) -> int:
        """Positions after which every document has come up."""
        raise NotImplementedError

    def trunk(self, position: int, cfg: PromptConfig, seed: int) -> Trunk:
        """What the policy reads of the sample at a global position, and its cuts."""
        epoch, document = self.at(position)
        return trunk(document, epoch, cfg, seed)

    def take(self, start: int, count: int, rank: int, size: int) -> list[tuple[int, Document]]:
        """This rank's strided share of the samples [start, start + count)."""
        return [self.at(position) for position in range(start + rank, start + count, size)]

    def shares(self, _position: int) -> dict[str, float]:
        """Of every source among the samples before a position; nothing where there is one source."""
        return {}

    def sums(self, _positions: Sequence[int]) -> Sums:
        """Of the samples of a step, for its metrics."""
        return {}


class Stream(Samples):
    """The order over the usable documents of one split."""

    def __init__(self, split: Split, seed: int, purpose: str, usable: Sequence[int]) -> None:
        if not len(usable):
            raise UserError(
                f"shards, split {split.name} ({purpose}): no document is long enough for a cut; lower "
                "prompts.min_context_tokens or prompts.horizon_tokens, or prepare longer documents"
            )
        self.split = split
        self.seed = seed
        self.purpose = purpose
        self.usable = np.asarray(usable, dtype=np.int64)

    @property
    def period(self) -> int:
        return len(self.usable)

    def at(self, position: int) -> tuple[int, Document]:
        """The documents of an epoch in the order of its permutation."""
        epoch, index = divmod(position, len(self.usable))
        key = rng.key(self.seed, "order", self.purpose, epoch)
        return epoch, self.split[int(self.usable[permute(index, len(self.usable), key)])]


def in_domains(split: Split, domains: Sequence[str]) -> np.ndarray:
    """Indices of the documents in the given domains (all where none is named)."""
    if not domains:
        return np.arange(len(split))
    chosen = np.flatnonzero(np.isin(np.asarray(split.domains), list(domains)))
    if not len(chosen):
        known = ", ".join(sorted(set(split.domains))[:8])
        raise UserError(f"domains = {list(domains)}: no document in them; the shards have {known}")
    return chosen


def prompt_stream(
    split: Split, cfg: PromptConfig, seed: int, purpose: str, domains: Sequence[str] = ()
) -> Stream:
    """Documents with at least one cut that leaves enough context and a whole horizon."""
    indices = in_domains(split, domains)
    return Stream(split, seed, purpose, indices[_has_eligible_cut(split, cfg)[indices]].tolist())


def window_stream(split: Split, seed: int, purpose: str, domains: Sequence[str] = ()) -> Stream:
    """Documents of at least two tokens, for the next-token stage."""
    indices = in_domains(split, domains)
    return Stream(split, seed, purpose, indices[split.num_tokens[indices] >= 2].tolist())


def eligible_cuts(document: Document, cfg: PromptConfig) -> Int[np.ndarray, " K"]:
    """Candidate cuts of the allowed kinds with ``min_context_tokens`` before and ``horizon_tokens`` after them; where
    segments are middle ones, something must follow the horizon, too."""
    cuts = np.asarray(document.cuts, dtype=np.int64)
    return cuts[_eligible(cuts, np.asarray(document.cut_kinds), len(document.ids), cfg)]


def _has_eligible_cut(split: Split, cfg: PromptConfig) -> Bool[np.ndarray, " documents"]:
    """Which documents have an eligible cut, from the columns of the whole split: no document is decoded."""
    lengths = np.repeat(split.num_tokens, split.num_cuts)
    fits = _eligible(split.flat_cuts, split.flat_cut_kinds, lengths, cfg)
    before = np.concatenate([[0], np.cumsum(fits)])[split.cut_offsets]
    return before[1:] > before[:-1]


def _eligible(
    cuts: Int[np.ndarray, " K"],
    cut_kinds: Integer[np.ndarray, " K"],
    num_tokens: Int[np.ndarray, " K"] | int,
    cfg: PromptConfig,
) -> Bool[np.ndarray, " K"]:
    """Of cuts in documents of ``num_tokens`` tokens, those that ``eligible_cuts`` keeps."""
    kinds = [CUT_KINDS.index(kind) for kind in cfg.cut_kinds]
    after = cfg.horizon_tokens + (cfg.segment == "middle")
    fits = (cuts >= cfg.min_context_tokens) & (cuts + after <= num_tokens)
    return fits & np.isin(cut_kinds, kinds)


def trunk(document: Document, epoch: int, cfg: PromptConfig, seed: int) -> Trunk:
    """The window of one sample and its cuts, both drawn from (seed, epoch, document).

    The last cut is drawn among all candidates and anchors the window; the others are drawn inside it. Whether the
    segment is a middle one is drawn by itself.
    """
    draw = rng.generator(seed, "cuts", epoch, document.document_id)
    cuts = eligible_cuts(document, cfg)
    anchor = int(draw.choice(cuts))
    if _is_middle(document, epoch, cfg, seed):
        return middle(document, epoch, anchor, cfg)
    start = max(0, anchor - cfg.context_tokens)
    inside = cuts[(cuts >= start + cfg.min_context_tokens) & (cuts < anchor)]
    count = min(cfg.cuts_per_document - 1, len(inside))
    chosen = sorted(int(cut) for cut in draw.choice(inside, count, replace=False)) if count else []
    return window(document, epoch, start, anchor + cfg.horizon_tokens, [*chosen, anchor])


def _is_middle(document: Document, epoch: int, cfg: PromptConfig, seed: int) -> bool:
    if cfg.segment == "next":
        return False
    draw = rng.generator(seed, "segment", epoch, document.document_id)
    return draw.random() < cfg.middle_share


def middle(document: Document, epoch: int, cut: int, cfg: PromptConfig) -> Trunk:
    """What follows the segment at ``cut``, what precedes it, and the segment: a trunk rearranged, cut before the last.

    The order suffix, prefix, middle of Bavarian et al. 2022 (arXiv 2207.14255), so that all that reads a context and
    what comes next reads this as well; ours has nothing between the parts. The task is RLPT's (arXiv 2509.19249).
    """
    stop = cut + cfg.horizon_tokens
    end = min(stop + cfg.after_tokens, len(document.ids))
    start = max(0, cut - cfg.context_tokens + end - stop)
    return rearranged(window(document, epoch, start, end), cut - start, stop - start)


def rearranged(text: Trunk, at: int, stop: int) -> Trunk:
    """Page text with its tokens [at, stop) at the end: what follows them, what precedes them, then they, held out."""
    sizes = np.diff(text.offsets)
    context = len(text.ids) - (stop - at)
    return replace(
        text,
        start=text.start + at - context,
        ids=concat(text.ids[stop:], text.ids[:stop]),
        offsets=concat([0], np.cumsum(concat(sizes[stop:], sizes[:stop]))),
        cuts=(context,),
    )


def dealt_trunks(
    stream: Samples, positions: Sequence[int], cfg: PromptConfig, seed: int, branch_tokens: int, world: dist.World
) -> tuple[list[int], list[Trunk]]:  # fmt: skip
    """This rank's share of the samples at global positions: which it got, and their trunks.

    As many documents on every rank, and about as many tokens; ``branch_tokens`` are all those that hang off one cut.
    """
    trunks = [trunk_at(stream, position, cfg, seed) for position in dist.share(positions, world)]
    if world.size == 1:
        return list(positions), trunks
    costs = [len(each.ids) + branch_tokens * len(each.cuts) for each in trunks]
    dealt = [positions[i] for i in dist.balanced(dist.unshare(costs, world), world)]
    return dealt, [trunk_at(stream, position, cfg, seed) for position in dealt]


def trunk_at(stream: Samples, position: int, cfg: PromptConfig, seed: int) -> Trunk:
    """The trunk of the sample at a global position."""
    return stream.trunk(position, cfg, seed)


def window(
    document: Document, epoch: int, start: int, stop: int, cuts: Sequence[int] = ()
) -> Trunk:
    """Tokens [start, stop) of a document as a trunk; ``cuts`` are positions in the document."""
    offsets = np.asarray(document.offsets[start : stop + 1], dtype=np.int64)
    ids = np.asarray(document.ids[start:stop], dtype=np.int64)
    relative = tuple(cut - start for cut in cuts)
    return Trunk(
        document.document_id, document.domain, epoch, start, ids, offsets - offsets[0], relative
    )


def prompts_of(trunk: Trunk, cfg: PromptConfig, markers: Markers) -> list[Prompt]:
    """One prompt per cut of a trunk: context and opener for the policy and for the scorer alike, in their frame.

    What is held out ends with the trunk: an answer may be shorter than the horizon.
    """
    trunk = behind(trunk, markers.frame.head)
    return [
        prompt_at(trunk, cut, min(cfg.horizon_tokens, len(trunk.ids) - cut), markers)
        for cut in trunk.cuts
    ]


def prompt_at(trunk: Trunk, cut: int, horizon: int, markers: Markers) -> Prompt:
    """The prompt of one cut of a trunk that has the frame's head: nothing after the cut is in its ids."""
    ids = concat(trunk.ids[:cut], markers.frame.opened(markers.opener))
    return Prompt(trunk, cut, horizon, ids, ids, markers.frame)


def behind(trunk: Trunk, head: Sequence[int]) -> Trunk:
    """A trunk of page text behind ids that stand for none of it: all cuts move, none changes its place in the text."""
    if not head:
        return trunk
    return replace(
        trunk,
        start=trunk.start - len(head),
        ids=concat(head, trunk.ids),
        offsets=concat([0] * len(head), trunk.offsets),
        cuts=tuple(cut + len(head) for cut in trunk.cuts),
        head=len(head),
    )


def held_out(
    split: Split, cfg: PromptConfig, markers: Markers, count: int, seed: int, domains: Sequence[str]
) -> list[Prompt]:
    """The evaluation prompts: ``count`` prompts in a fixed order, one a document, epoch after epoch.

    However many cuts a document has in training: intervals are over documents, and cuts of one are no new evidence.
    """
    cfg = cfg.model_copy(update={"cuts_per_document": 1})
    stream = prompt_stream(split, cfg, seed, "held_out", domains)
    prompts: list[Prompt] = []
    position = 0
    while len(prompts) < count:
        epoch, document = stream.at(position)
        prompts += prompts_of(trunk(document, epoch, cfg, seed), cfg, markers)
        position += 1
    return prompts[:count]


def held_out_windows(
    split: Split, tokens: int, count: int, seed: int, domains: Sequence[str]
) -> list[Trunk]:
    """The first ``tokens`` tokens of up to ``count`` documents, for bits per byte."""
    stream = window_stream(split, seed, "held_out", domains)
    picked = (stream.at(position)[1] for position in range(min(count, len(stream.usable))))
    return [window(document, 0, 0, min(tokens, len(document.ids))) for document in picked]
