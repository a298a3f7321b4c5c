"""The nouns of the pipeline, and the letters of its shapes.

Documents become trunks, trunks grow prompts, prompts grow rollouts. Everything here is frozen and made of
numpy arrays, so that arithmetic, engines and files share it without importing torch.

Letters: **P** prompts, **G** rollouts per prompt, **N** sequences, **T** positions, **D** width, **V** vocabulary,
**R** scored rows, **L** tokens of one rollout, **C** tokens of one continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Ids = Int[np.ndarray, " T"]
Finish = Literal["closer", "budget"]
Sums = dict[str, tuple[float, float]]
"""Metric -> (sum, count), divided once, after the sum over micro-batches and ranks."""


@dataclass(frozen=True)
class Frame:
    """The ids that a chat puts around page text, which is spliced in as the shard's own ids. All empty: there is no
    chat, the document goes on.

    The policy reads head, text, tail, lead, opener, prefill and thinks; after the closer held-out text is scored behind
    the bridge. Without a thought that is head, text, tail, bridge, held-out text.
    """

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    """Prefill before the opener."""
    prefill: tuple[int, ...] = ()
    """Prefill after the opener; no part of the thought."""
    bridge: tuple[int, ...] = ()
    answer: tuple[bytes, bytes] | None = None
    """What stands around the answer in a prediction; None: all of the prediction is the answer."""

    def opened(self, opener: int) -> Ids:
        """What the policy reads between page text and its thought."""
        return concat(self.tail, self.lead, [opener], self.prefill)

    @property
    def between(self) -> tuple[int, ...]:
        """What stands between page text and held-out text without a thought."""
        return self.tail + self.bridge


@dataclass(frozen=True)
class Markers:
    """The two single ids around a thought, and the frame around text. Text can never contain the two: it is encoded
    without special tokens."""

    opener: int
    closer: int
    frame: Frame = Frame()

    @property
    def ids(self) -> tuple[int, int]:
        return (self.opener, self.closer)


@dataclass(frozen=True)
class Trunk:
    """A window of one document: the tokens that all its cuts and thoughts share.

    ``Trunk("9f..", "gnu.org", epoch=0, start=120, ids=[17, 4, 9, 2], offsets=[0, 3, 4, 6, 7], cuts=(2,))``
    is the window at token 120; its one prompt reads ``[17, 4]`` and holds out ``[9, 2]``, 3 bytes of text.
    """

    document: str
    domain: str
    epoch: int
    start: int
    """Token offset of the window in its document. Of a rearranged one, that of its cut less what the cut has before it;
    it may be negative."""
    ids: Int[np.ndarray, " T"]
    offsets: Int[np.ndarray, " T+1"]
    """Byte offset of every token, relative to the window, and the total."""
    cuts: tuple[int, ...]
    """Positions in ``ids``; the context of a cut is ``ids[:cut]``."""
    head: int = 0
    """How many of the first ``ids`` are a frame's, and no text of the document."""

    def num_bytes(self, start: int, stop: int) -> int:
        """UTF-8 bytes of the tokens ``ids[start:stop]``."""
        return int(self.offsets[stop] - self.offsets[start])


@dataclass(frozen=True)
class Branch:
    """Tokens off a trunk at a cut: they see ``trunk.ids[:cut]`` and themselves; ``ids[score_start:]`` is scored."""

    cut: int
    ids: Int[np.ndarray, " B"]
    score_start: int


@dataclass(frozen=True)
class Prompt:
    """One cut, ready for the policy.

    ``policy_ids`` is what the sampling policy reads, opener included; ``score_ids`` is what the scorer reads before
    the thought. They are equal unless a method hides the context from one of them.
    """

    trunk: Trunk
    cut: int
    horizon: int
    policy_ids: Int[np.ndarray, " A"]
    score_ids: Int[np.ndarray, " B"]
    frame: Frame = Frame()

    @property
    def context_ids(self) -> Int[np.ndarray, " X"]:
        """Page text before the cut."""
        return self.trunk.ids[self.trunk.head : self.cut]

    @property
    def continuation_ids(self) -> Int[np.ndarray, " C"]:
        return self.trunk.ids[self.cut : self.cut + self.horizon]

    @property
    def continuation_bytes(self) -> int:
        return self.trunk.num_bytes(self.cut, self.cut + self.horizon)

    @property
    def key(self) -> tuple[int, str, int]:
        """Names the prompt across ranks, batches and resumes: (epoch, document, cut in the document)."""
        return (self.trunk.epoch, self.trunk.document, self.trunk.start + self.cut)


@dataclass(frozen=True)
class Rollout:
    """One sampled thought with its closer, and a prediction where the frame asks for one.

    ``ids=[51, 52, closer]``, ``action=[True, True, False]``, ``finish="budget"``: two thought tokens, then a *forced*
    closer, which was not sampled and is therefore no action. A sampled closer is one.
    """

    ids: Int[np.ndarray, " L"]
    action: Bool[np.ndarray, " L"]
    logp: Float[np.ndarray, " L"]
    """Behaviour log-probability of every token, fp32, from the engine that sampled it; 0 where not an action."""
    version: Int[np.ndarray, " L"]
    """Weight version that sampled each token."""
    thought_len: int
    finish: Finish

    @property
    def thought_ids(self) -> Int[np.ndarray, " Z"]:
        return self.ids[: self.thought_len]

    @property
    def prediction_ids(self) -> Int[np.ndarray, " Y"]:
        return self.ids[self.thought_len + 1 :]

    @property
    def num_actions(self) -> int:
        return int(self.action.sum())


@dataclass(frozen=True)
class Group:
    """The G rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    budget: int | None = None
    """Most tokens of a thought when they were sampled; engines know it."""
    hinted: bool = False
    """Whether the prompt showed the held-out text when they were sampled; their log-probabilities are of that one."""


class Certainty(NamedTuple):
    """How sure a model is of one token, before it sees which one it is."""

    entropy: float
    """-sum_v p_v log p_v, nats."""
    confidence: float
    """Log-probability of the likeliest id, nats."""


@dataclass(frozen=True)
class Scores:
    """What a scorer says of given tokens: fp32 natural-log probabilities and the likeliest id at each position."""

    logp: Float[np.ndarray, " S"]
    argmax: Int[np.ndarray, " S"]
    certainty: Certainty | None = None
    """Of the first token; None: it was not asked for."""

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, accumulated in float64."""
        return float(self.logp.sum(dtype=np.float64))


def concat(*parts: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
    """Splice ids. Text is never re-tokenised across a seam."""
    arrays = [np.asarray(part, dtype=np.int64).reshape(-1) for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def thought_branch(
    prompt: Prompt,
    markers: Markers,
    thought_ids: Sequence[int] | np.ndarray,
    target_ids: Sequence[int] | np.ndarray | None = None,
) -> Branch:
    """Opener, thought, closer and a continuation (the prompt's own unless given) with what a frame puts between them;
    the continuation is scored.

    What the scorer reads before the thought is `score_ids`, which so far must begin with the prompt's context.
    """
    assert np.array_equal(prompt.score_ids[: prompt.cut], prompt.trunk.ids[: prompt.cut])
    target = prompt.continuation_ids if target_ids is None else target_ids
    opened, bridge = prompt.score_ids[prompt.cut :], prompt.frame.bridge
    ids = concat(opened, thought_ids, [markers.closer], bridge, target)
    return Branch(prompt.cut, ids, score_start=len(ids) - len(target))


def bare_branch(prompt: Prompt, target_ids: Ids | None = None) -> Branch:
    """A continuation without markers and thought, all of it scored: straight after the cut, but for a frame."""
    target = prompt.continuation_ids if target_ids is None else target_ids
    between = prompt.frame.between
    return Branch(prompt.cut, concat(between, target), score_start=len(between))
