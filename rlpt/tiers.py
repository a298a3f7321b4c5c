"""A stage's samples, each with the cuts of one tier of entropy: easy, medium or hard.

The tier is drawn from (seed, stage, step, document), the step being that of the position: neither ranks nor a restart
can change it. A document without a cut of the drawn tier gives those of the nearest one it has, which is counted.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from rlpt import rng
from rlpt.config import PromptConfig
from rlpt.curriculum import EntropyCurriculum
from rlpt.prompts import Samples, eligible_cuts
from rlpt.stages import RLStage
from rlpt.types import Sums
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.shards import Document
from rlpt_data.strict import UserError

TIERS = ("easy", "medium", "hard")


def all_tiers(cuts: AnnotatedCuts, curriculum: EntropyCurriculum, stage: str) -> AnnotatedCuts:
    """The query for the cuts of every tier. Raises UserError where bounds of its own leave one empty."""
    easy, medium, hard = curriculum.tiers
    low, high = cuts.min_entropy or 0.0, cuts.max_entropy
    if low >= medium or (high is not None and high < hard):
        raise UserError(
            f"[data.cuts] min_entropy = {cuts.min_entropy}, max_entropy = {high}: leaves stage {stage} a tier without "
            f"cuts; curriculum.tiers = {list(curriculum.tiers)} are its bounds, so drop these"
        )
    return cuts.model_copy(update={"min_entropy": max(low, easy)})


class TieredSamples(Samples):
    """The samples of another order, with their cuts of one tier alone."""

    def __init__(
        self, samples: Samples, stage: RLStage, cfg: PromptConfig, seed: int, per_step: int
    ) -> None:
        """``per_step``: samples that a step asks for. What is passed over counts as asked for, and hurries the mix."""
        assert stage.curriculum is not None
        self.samples = samples
        self.curriculum = stage.curriculum
        self.stage = stage
        self.cfg = cfg
        self.seed = seed
        self.per_step = per_step

    @property
    def period(self) -> int:
        return self.samples.period

    def shares(self, position: int) -> dict[str, float]:
        return self.samples.shares(position)

    def at(self, position: int) -> tuple[int, Document]:
        epoch, document = self.samples.at(position)
        _, own = self._tier(position, document)
        return epoch, with_cuts(document, own)

    def sums(self, positions: Sequence[int]) -> Sums:
        """Shares of the samples by their tier, and of those that lacked the tier that was drawn for them."""
        documents = [self.samples.at(position)[1] for position in positions]
        pairs = list(zip(positions, documents, strict=True))
        found = [self._tier(*pair)[0] for pair in pairs]
        moved = sum(self.drawn(p, d) != tier for (p, d), tier in zip(pairs, found, strict=True))
        count = float(len(positions))
        sums = {
            f"curriculum/{name}": (float(found.count(n)), count) for n, name in enumerate(TIERS)
        }
        return sums | {"curriculum/moved": (float(moved), count)}

    def drawn(self, position: int, document: Document) -> int:
        """The tier that is meant for a sample."""
        step = min(position // self.per_step, self.stage.steps - 1)
        draw = rng.generator(self.seed, "tier", self.stage.name, step, document.document_id)
        return int(draw.choice(len(TIERS), p=self.curriculum.mix(step / self.stage.steps)))

    def _tier(self, position: int, document: Document) -> tuple[int, Bool[np.ndarray, " K"]]:
        fits = np.isin(document.cuts, eligible_cuts(document, self.cfg))
        return nearest(document, fits, self.curriculum, self.drawn(position, document))


def nearest(
    document: Document, fits: Bool[np.ndarray, " K"], curriculum: EntropyCurriculum, wanted: int
) -> tuple[int, Bool[np.ndarray, " K"]]:
    """The tier nearest to the wanted one among the cuts that fit, and which cuts are of it; the easier of two."""
    assert document.cut_entropy is not None, document.document_id
    # In the precision of the query, which has decided that every cut is at least easy.
    bounds = np.asarray(curriculum.tiers, np.float32)
    tier_K = np.searchsorted(bounds, document.cut_entropy, side="right") - 1
    tier = min(set(tier_K[fits].tolist()), key=lambda each: (abs(each - wanted), each))
    return tier, fits & (tier_K == tier)


def with_cuts(document: Document, chosen: Bool[np.ndarray, " K"]) -> Document:
    """A document with some of its cuts."""
    assert document.cut_entropy is not None, document.document_id
    return replace(
        document,
        cuts=document.cuts[chosen],
        cut_kinds=document.cut_kinds[chosen],
        cut_entropy=document.cut_entropy[chosen],
    )
