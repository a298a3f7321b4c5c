"""Documents -> framed sequences for the next-token stage: plain text, or text with a thought at a cut.

The markers are inserted here, as ids; text never contains them. The opener is never a target (MEASURING: opener mass);
thought, closer and text are. Which frame, which cut and which thought come from (seed, epoch, document).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from rlpt import rng
from rlpt.config import PromptConfig
from rlpt.prompts import eligible_cuts, window
from rlpt.stages import MixConfig
from rlpt.types import Branch, Ids, Markers, Trunk, concat
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
            return self._framed(epoch, document, [thought.cut], [concat(thought.ids)])
        if kind in ("copied", "empty") and len(cuts := self._cuts(document, draw)):
            thoughts = [self._span(document, cut, kind, draw) for cut in cuts]
            return self._framed(epoch, document, cuts, thoughts)
        return self._plain(epoch, document, draw)

    def _shares(self) -> list[float]:
        shares = np.array([self.mix.plain, self.mix.worked, self.mix.copied, self.mix.empty])
        return (shares / shares.sum()).tolist()

    def _cuts(self, document: Document, draw: np.random.Generator) -> list[int]:
        """Up to ``thoughts_per_window`` cuts of one window: the first anywhere, the others after it."""
        cuts = eligible_cuts(document, self.prompts)
        if not len(cuts):
            return []
        first = int(draw.choice(cuts))
        stop = self._start(first) + self.window_tokens - self.prompts.horizon_tokens
        after = cuts[(cuts > first) & (cuts <= stop)]
        count = min(self.mix.thoughts_per_window - 1, len(after))
        return [first, *sorted(int(cut) for cut in draw.choice(after, count, replace=False))]

    def _start(self, cut: int) -> int:
        """Where the window of a first cut begins: half of it lies before the cut."""
        return max(0, cut - self.window_tokens // 2)

    def _span(self, document: Document, cut: int, kind: str, draw: np.random.Generator) -> Ids:
        """A span of the text before the cut, inside the window; nothing for an empty thought."""
        if kind == "empty":
            return np.zeros(0, dtype=np.int64)
        first = self._start(cut)
        length = int(draw.integers(1, min(self.budget_tokens, cut - first) + 1))
        start = int(draw.integers(first, cut - length + 1))
        return np.asarray(document.ids[start : start + length], dtype=np.int64)

    def _plain(self, epoch: int, document: Document, draw: np.random.Generator) -> Framed:
        start = int(draw.integers(0, max(1, len(document.ids) - self.window_tokens + 1)))
        stop = min(len(document.ids), start + self.window_tokens)
        trunk = window(document, epoch, start, stop)
        nothing = np.zeros(len(trunk.ids), dtype=bool)
        branch = Branch(0, trunk.ids, 0)
        return Framed(trunk, branch, nothing[:0], nothing, _targets(document, trunk))

    def _framed(
        self, epoch: int, document: Document, cuts: Sequence[int], thoughts: Sequence[np.ndarray]
    ) -> Framed:
        """The text with a thought at every cut: all that follows the first cut is the branch."""
        start = self._start(cuts[0])
        trunk = window(
            document, epoch, start, min(len(document.ids), start + self.window_tokens), cuts
        )
        target = _targets(document, trunk)
        ids, is_thought, is_text = [], [], []
        for cut, stop, thought in zip(
            trunk.cuts, [*trunk.cuts[1:], len(trunk.ids)], thoughts, strict=True
        ):
            ids.append(
                concat([self.markers.opener], thought, [self.markers.closer], trunk.ids[cut:stop])
            )
            # Opener, thought and closer, then text.
            is_thought.append(concat([0], np.ones(len(thought) + 1), np.zeros(stop - cut)))
            is_text.append(concat(np.zeros(len(thought) + 2), target[cut:stop]))
        branch = Branch(trunk.cuts[0], concat(*ids), score_start=len(thoughts[0]) + 2)
        masks = (concat(*mask).astype(bool) for mask in (is_thought, is_text))
        return Framed(trunk, branch, target[: branch.cut], *masks)


def _targets(document: Document, trunk: Trunk) -> Bool[np.ndarray, " T"]:
    """Which tokens of the window are trained on: all but the first, or the shard's target spans."""
    wanted = np.ones(len(document.ids), dtype=bool)
    if document.target_spans is not None:
        wanted[:] = False
        for start, stop in document.target_spans:
            wanted[start:stop] = True
    wanted = wanted[trunk.start : trunk.start + len(trunk.ids)]
    wanted[0] = False
    return wanted
