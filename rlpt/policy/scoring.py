"""Log-probabilities of given tokens, without gradient: the scorer behind rewards, baselines and evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rlpt import dist
from rlpt.phases import CLOCK
from rlpt.policy.packing import Layout, Packed, Rows, pack, rows
from rlpt.policy.policy import Policy, Readout, RowCertainty, RowScores, scores_of
from rlpt.types import Branch, Certainty, Scores, Trunk

Pair = tuple[Trunk, Branch]
Span = tuple[Trunk, int, int]


class Scorer:
    """Scores branches and trunks with one policy, ``banned`` ids (the markers) removed from the softmax.

    ``temperature`` is 1 for held-out text, and the one it was sampled at for what an engine sampled.
    ``tokens`` is the budget of one forward; it changes memory and speed, never a number beyond rounding. ``layout`` is
    the policy's unless given. With ``certainty`` every score has that of its first token: one more row of the head.
    Collective: under several ranks every rank calls it equally often; a rank that runs out of work joins with empty
    batches, because FSDP gathers parameters on all ranks at once.
    """

    def __init__(
        self,
        policy: Policy,
        banned: tuple[int, ...],
        world: dist.World,
        tokens: int,
        layout: Layout | None = None,
        temperature: float = 1.0,
        certainty: bool = False,
    ) -> None:
        self.policy = policy
        self.layout: Layout = policy.layout if layout is None else layout
        self.banned = banned
        self.world = world
        self.tokens = tokens
        self.temperature = temperature
        self.certainty = certainty

    def branches(self, pairs: Sequence[Pair]) -> list[Scores]:
        """Scores of ``branch.ids[branch.score_start:]`` given the trunk up to the cut and the rest of the branch."""
        return self._batched(pairs, _branch_cost, self._score_branches)

    def trunks(self, spans: Sequence[Span]) -> list[Scores]:
        """The trunk's own next-token scores of ``trunk.ids[start:stop]`` (start >= 1)."""
        return self._batched(spans, _trunk_cost, self._score_trunks)

    def _batched(self, items: Sequence, cost: Callable, score: Callable) -> list[Scores]:
        chosen = batches([cost(item) for item in items], self.tokens, self.layout)
        results: list[Scores | None] = [None] * len(items)
        for turn in range(dist.largest(len(chosen), self.world)):
            batch = chosen[turn] if turn < len(chosen) else []
            for index, scores in zip(batch, score([items[i] for i in batch]), strict=True):
                results[index] = scores
            CLOCK.beat()
        # FSDP keeps the root's parameters gathered until a backward that never comes here; whoever reads
        # parameters next (publishing, checkpoints, the EMA, the optimiser) must meet the shards.
        self.policy.reshard()
        return [scores for scores in results if scores is not None]

    def _score_branches(self, pairs: Sequence[Pair]) -> list[Scores]:
        packed = pack([], pairs, self.world.device, self.layout)
        spans = [(branch.score_start, len(branch.ids)) for _, branch in pairs]
        hidden = [packed.branch_rows(b, *span) for b, span in enumerate(spans)]
        target = [branch.ids[branch.score_start :] for _, branch in pairs]
        return self._forward(packed, hidden, target)

    def _score_trunks(self, spans: Sequence[Span]) -> list[Scores]:
        # Several cuts of one trunk ask for spans of the same forward.
        known = {id(trunk): trunk for trunk, _, _ in spans}
        order = {key: k for k, key in enumerate(known)}
        packed = pack(list(known.values()), [], self.world.device, self.layout)
        hidden = [packed.trunk_rows(order[id(trunk)], *span) for trunk, *span in spans]
        target = [trunk.ids[start:stop] for trunk, start, stop in spans]
        return self._forward(packed, hidden, target)

    @torch.no_grad()
    def _forward(
        self, packed: Packed, hidden: list[np.ndarray], target: list[np.ndarray]
    ) -> list[Scores]:
        kind = rows(hidden, target, self.banned, self.world.device, self.temperature)
        lengths = [len(part) for part in target]
        if not self.certainty:
            (scored,) = self.policy(packed, scores_of([kind]))
            return split_scores(scored.logp_R, scored.argmax_R, lengths)
        scored, sure = self.policy(packed, lambda readout: _with_certainty(readout, kind, lengths))
        whole = split_scores(scored.logp_R, scored.argmax_R, lengths)
        values = zip(whole, *(x.cpu().tolist() for x in sure), strict=True)
        return [replace(scores, certainty=Certainty(*each)) for scores, *each in values]


def _with_certainty(
    readout: Readout, kind: Rows, lengths: Sequence[int]
) -> tuple[RowScores, RowCertainty]:
    """Scores of all rows, and the certainty of the first of every piece."""
    assert min(lengths, default=1) > 0, "a piece without tokens has no first one"
    scored = readout.scores(kind)
    first = torch.tensor([0, *lengths[:-1]], device=scored.argmax_R.device).cumsum(0)
    first = first[: len(lengths)]
    likeliest = replace(kind, hidden_R=kind.hidden_R[first], target_R=scored.argmax_R[first])
    return scored, readout.certainty(likeliest)


def split_scores(
    logp_R: torch.Tensor, argmax_R: torch.Tensor, lengths: Sequence[int]
) -> list[Scores]:
    """Rows back into the pieces that they were concatenated from."""
    if not lengths:
        return []
    edges = np.cumsum(lengths)[:-1]
    pieces = (np.split(x.cpu().numpy(), edges) for x in (logp_R, argmax_R))
    return [Scores(*pair) for pair in zip(*pieces, strict=True)]


Cost = tuple[int, int, int]
"""What an item computes: (identity of its trunk, tokens of the trunk, tokens of its own)."""


def _branch_cost(pair: Pair) -> Cost:
    return id(pair[0]), pair[1].cut, len(pair[1].ids)


def _trunk_cost(span: Span) -> Cost:
    return id(span[0]), len(span[0].ids), 0


def batches(costs: Sequence[Cost], budget: int, layout: Layout) -> list[list[int]]:
    """Indices of items, batch by batch: each within ``budget`` tokens, or of one item that exceeds it alone."""
    return (_whole_trunks if layout == "shared" else _like_lengths)(costs, budget)


def _whole_trunks(costs: Sequence[Cost], budget: int) -> list[list[int]]:
    """Items of one trunk follow each other; their trunk counts once a batch."""
    first = {costs[i][0]: i for i in reversed(range(len(costs)))}
    found: list[list[int]] = []
    counted: dict[int, int] = {}
    total = 0
    for i in sorted(range(len(costs)), key=lambda i: (first[costs[i][0]], i)):
        key, trunk, own = costs[i]
        more = own + max(0, trunk - counted.get(key, 0))
        if not found or total + more > budget:
            found.append([])
            counted, total, more = {}, 0, trunk + own
        found[-1].append(i)
        counted[key] = max(trunk, counted.get(key, 0))
        total += more
    return found


def _like_lengths(costs: Sequence[Cost], budget: int) -> list[list[int]]:
    """Long and short sequences apart: padding counts, and is the only cost of batching them together."""
    found: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: sum(costs[i][1:])):
        if not found or (len(found[-1]) + 1) * sum(costs[i][1:]) > budget:
            found.append([])
        found[-1].append(i)
    return found
