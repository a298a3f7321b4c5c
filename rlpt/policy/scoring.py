"""Log-probabilities of given tokens, without gradient: the scorer behind rewards, baselines and evaluation."""

from collections.abc import Sequence

import numpy as np
import torch

from rlpt import dist
from rlpt.policy.packing import pack, rows
from rlpt.policy.policy import Policy, RowScores
from rlpt.types import Branch, Scores, Trunk


class Scorer:
    """Scores branches and trunks with one policy at T = 1, ``banned`` ids (the markers) removed from the softmax.

    Collective: under several ranks every rank calls it equally often; a rank that runs out of work joins with empty
    batches, because FSDP gathers parameters on all ranks at once.
    """

    def __init__(
        self, policy: Policy, banned: tuple[int, ...], world: dist.World, batch: int
    ) -> None:
        self.policy = policy
        self.banned = banned
        self.world = world
        self.batch = batch

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]:
        """Scores of ``branch.ids[branch.score_start:]`` given the trunk up to the cut and the rest of the branch."""
        return self._batched(pairs, self._score_branches)

    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]:
        """The trunk's own next-token scores of ``trunk.ids[start:stop]`` (start >= 1)."""
        return self._batched(spans, self._score_trunks)

    def _batched(self, items: Sequence, score) -> list[Scores]:
        # Long and short sequences apart: padding is the only cost of batching them together.
        order = sorted(range(len(items)), key=lambda i: _length(items[i]))
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        results: list[Scores | None] = [None] * len(items)
        for turn in range(dist.largest(len(batches), self.world)):
            chosen = batches[turn] if turn < len(batches) else []
            for index, scores in zip(chosen, score([items[i] for i in chosen]), strict=True):
                results[index] = scores
        # FSDP keeps the root's parameters gathered until a backward that never comes here; whoever reads
        # parameters next (publishing, checkpoints, the EMA, the optimiser) must meet the shards.
        self.policy.reshard()
        return [scores for scores in results if scores is not None]

    def _score_branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]:
        packed = pack([], pairs, self.world.device)
        spans = [(branch.score_start, len(branch.ids)) for _, branch in pairs]
        hidden = [packed.branch_rows(b, *span) for b, span in enumerate(spans)]
        target = [branch.ids[branch.score_start :] for _, branch in pairs]
        return self._forward(packed, hidden, target)

    def _score_trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]:
        packed = pack([trunk for trunk, _, _ in spans], [], self.world.device)
        hidden = [packed.trunk_rows(k, start, stop) for k, (_, start, stop) in enumerate(spans)]
        target = [trunk.ids[start:stop] for trunk, start, stop in spans]
        return self._forward(packed, hidden, target)

    @torch.no_grad()
    def _forward(self, packed, hidden: list[np.ndarray], target: list[np.ndarray]) -> list[Scores]:
        kind = rows(hidden, target, self.banned, self.world.device)
        scored: RowScores = self.policy(packed, [kind])[0]
        logp, argmax = scored.logp_R.cpu().numpy(), scored.argmax_R.cpu().numpy()
        edges = np.cumsum([len(part) for part in target])[:-1]
        if not target:
            return []
        return [
            Scores(a, b)
            for a, b in zip(np.split(logp, edges), np.split(argmax, edges), strict=True)
        ]


def _length(item: tuple) -> int:
    if isinstance(item[1], Branch):
        return item[1].cut + len(item[1].ids)
    return len(item[0].ids)
