"""N-gram overlap of the prediction with the held-out text: a dense stand-in for a match."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from rlpt.reward.base import Kit, RewardBase
from rlpt.reward.match import Compared


class OverlapReward(RewardBase):
    """F1 of the prediction's word n-grams against the held-out text's (ROUGE-N, Lin 2004), from 0 to 1."""

    kind: Literal["overlap"]
    n: Annotated[int, Field(ge=1, le=4)] = 1

    def build(self, kit: Kit) -> Compared:
        return Compared(self.kind, self._compare, kit)

    def _compare(self, prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
        gold = b"".join(gold_tokens)
        return overlap(prediction.decode(errors="replace"), gold.decode(errors="replace"), self.n)


def overlap(prediction: str, gold: str, n: int) -> float:
    """2 PR / (P + R) over n-grams of words; a text shorter than n words has none, and scores 0."""
    ours, theirs = _grams(prediction, n), _grams(gold, n)
    shared = (ours & theirs).total()
    return 2.0 * shared / (ours.total() + theirs.total()) if shared else 0.0


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
