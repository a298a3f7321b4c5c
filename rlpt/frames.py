"""Documents -> framed sequences for the next-token stage: plain text, or text with a thought at a cut.

The markers are inserted here, as ids; text never contains them. The opener is never a target (MEASURING: opener mass);
thought, closer and text are. Which frame, which cut and which thought come from (seed, epoch, document).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from rlpt import rng
from rlpt.config import MixConfig, PromptConfig
from rlpt.prompts import eligible_cuts, window
from rlpt.types import Branch, Markers, Trunk, concat
from rlpt_data.shards import Document


@dataclass(frozen=True)
class Framed:
    """One training sequence ``trunk.ids[:branch.cut] + branch.ids`` and what of it is a target."""

    trunk: Trunk
    branch: Branch
    context_target: Bool[np.ndarray, " A"]
    """Of ``trunk.ids[:branch.cut]``; the first is always False."""
    thought_target: Bool[np.ndarray, " B"]
    """Of ``branch.ids``: thought and closer."""
    text_target: Bool[np.ndarray, " B"]
    """Of ``branch.ids``: text after the closer, or all of it in a plain frame."""

    @property
    def num_targets(self) -> int:
        return int(self.context_target.sum() + self.thought_target.sum() + self.text_target.sum())


@dataclass(frozen=True)
class Framer:
    """How documents are shown."""

    mix: MixConfig
    prompts: PromptConfig
    window_tokens: int
    budget_tokens: int
    markers: Markers
    seed: int

    def frame(self, epoch: int, document: Document) -> Framed:
        """The frame of one sample."""
        draw = rng.generator(self.seed, "frame", epoch, document.document_id)
        kind = draw.choice(["plain", "worked", "copied", "empty"], p=self._shares())
        if kind == "worked" and document.thoughts:
            thought = document.thoughts[int(draw.integers(len(document.thoughts)))]
            return self._thought(
                epoch, document, thought.cut, np.asarray(thought.ids, dtype=np.int64)
            )
        cuts = (
            eligible_cuts(document, self.prompts) if kind in ("copied", "empty") else np.array([])
        )
        if not len(cuts):
            return self._plain(epoch, document, draw)
        cut = int(draw.choice(cuts))
        span = (
            self._copied(document, cut, draw) if kind == "copied" else np.zeros(0, dtype=np.int64)
        )
        return self._thought(epoch, document, cut, span)

    def _shares(self) -> list[float]:
        shares = np.array([self.mix.plain, self.mix.worked, self.mix.copied, self.mix.empty])
        return (shares / shares.sum()).tolist()

    def _copied(
        self, document: Document, cut: int, draw: np.random.Generator
    ) -> Int[np.ndarray, " Z"]:
        first = max(0, cut - self.window_tokens // 2)
        length = int(draw.integers(1, min(self.budget_tokens, cut - first) + 1))
        start = int(draw.integers(first, cut - length + 1))
        return np.asarray(document.ids[start : start + length], dtype=np.int64)

    def _plain(self, epoch: int, document: Document, draw: np.random.Generator) -> Framed:
        start = int(draw.integers(0, max(1, len(document.ids) - self.window_tokens + 1)))
        trunk = window(document, epoch, start, min(len(document.ids), start + self.window_tokens))
        target = _targets(document, trunk)
        target[0] = False
        branch = Branch(0, trunk.ids, 0)
        nothing = np.zeros(len(trunk.ids), dtype=bool)
        return Framed(trunk, branch, np.zeros(0, dtype=bool), nothing, target)

    def _thought(
        self, epoch: int, document: Document, cut: int, thought: Int[np.ndarray, " Z"]
    ) -> Framed:
        start = max(0, cut - self.window_tokens // 2)
        trunk = window(
            document, epoch, start, min(len(document.ids), start + self.window_tokens), [cut]
        )
        at = cut - start
        target = _targets(document, trunk)
        target[0] = False
        ids = concat([self.markers.opener], thought, [self.markers.closer], trunk.ids[at:])
        text = len(thought) + 2
        thought_target = (np.arange(len(ids)) >= 1) & (np.arange(len(ids)) < text)
        text_target = np.concatenate([np.zeros(text, dtype=bool), target[at:]])
        return Framed(trunk, Branch(at, ids, text), target[:at], thought_target, text_target)


def _targets(document: Document, trunk: Trunk) -> Bool[np.ndarray, " T"]:
    """Which tokens of the window the shard wants trained on: all, or its target spans."""
    if document.target_spans is None:
        return np.ones(len(trunk.ids), dtype=bool)
    wanted = np.zeros(len(document.ids), dtype=bool)
    for start, stop in document.target_spans:
        wanted[start:stop] = True
    return wanted[trunk.start : trunk.start + len(trunk.ids)]
