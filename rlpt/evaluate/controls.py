"""Controls: the same continuation after something that is not the policy's own thought. Pure; ids
in, branches out.

A gain that a control has too is not the thought's doing: ``filler`` has its length, ``shuffled``
its tokens, ``context_copy`` repeats what was known, ``other_document`` is a thought about something
else. Definitions: MEASURING, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rlpt import rng
from rlpt.evaluate.records import GREEDY, NULL, OWN, WRONG, WRONG_NO_THINK
from rlpt.observe import Control
from rlpt.types import Branch, Markers, Prompt, bare_branch, thought_branch
from rlpt_data.strict import UserError

Ids = Int[np.ndarray, " Z"]
ANY_SAMPLE = -1
"""Sample number of a branch that is the same for every thought of a prompt."""


def filler(length: int, neutral_ids: Sequence[int]) -> Ids:
    """``length`` neutral tokens, the given ones over and over: what compute and position alone are
    worth.
    """
    return np.resize(np.asarray(neutral_ids, dtype=np.int64), length)


def context_copy(prompt: Prompt, length: int, draw: np.random.Generator) -> Ids:
    """A span of the context, at a drawn position; a context shorter than the thought is repeated to
    its length.
    """
    context = prompt.context_ids
    start = int(draw.integers(max(0, len(context) - length) + 1))
    return np.resize(context[start : start + length], length)


def shuffled(thought: Ids, draw: np.random.Generator) -> Ids:
    """The thought's own tokens in a drawn order: what its vocabulary alone is worth."""
    return draw.permutation(thought)


def named_prefix(thought: Ids, continuation: Int[np.ndarray, " C"]) -> int:
    """Length of the longest prefix of the continuation that stands anywhere in the thought."""
    starts = np.flatnonzero(thought == continuation[0]) if len(continuation) else np.array([])
    return max((_agreement(thought[int(start) :], continuation) for start in starts), default=0)


def _agreement(left: Int[np.ndarray, " A"], right: Int[np.ndarray, " B"]) -> int:
    width = min(len(left), len(right))
    differ = np.flatnonzero(left[:width] != right[:width])
    return int(differ[0]) if len(differ) else width


def check(prompts: Sequence[Prompt], controls: Sequence[Control]) -> None:
    """Raises UserError where a control cannot be had: before a thought is sampled, not after."""
    if "other_document" in controls and len({prompt.trunk.document for prompt in prompts}) < 2:
        raise lonely()


def lonely() -> UserError:
    return UserError(
        "evaluation.controls: other_document needs held-out prompts of two documents; "
        "raise evaluation.prompts, hold out more documents or leave the control out"
    )


class Partners:
    """For every prompt another one of another document, of the same domain where there is one."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.domains: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            self.domains.setdefault(prompt.trunk.domain, []).append(index)

    def other_document(self, index: int) -> int:
        """Raises UserError where all prompts are of one document."""
        found = self._search(index, "other_document", other_text=False)
        if found is None:
            raise lonely()
        return found

    def other_continuation(self, index: int) -> int | None:
        """As above, with a continuation that differs; None where every continuation is the same."""
        return self._search(index, "other_continuation", other_text=True)

    def _search(self, index: int, purpose: str, other_text: bool) -> int | None:
        own = self.prompts[index]
        draw = rng.generator(self.seed, purpose, *own.key)
        for pool in (self.domains[own.trunk.domain], range(len(self.prompts))):
            start = int(draw.integers(len(pool)))
            for step in range(len(pool)):
                candidate = pool[(start + step) % len(pool)]
                if self._differs(own, self.prompts[candidate], other_text):
                    return candidate
        return None

    @staticmethod
    def _differs(own: Prompt, other: Prompt, other_text: bool) -> bool:
        if own.trunk.document == other.trunk.document:
            return False
        return not (other_text and np.array_equal(own.continuation_ids, other.continuation_ids))


@dataclass(frozen=True)
class Lineup:
    """Builds the branches of a prompt: its own thoughts and every control that was asked for."""

    prompts: Sequence[Prompt]
    thoughts: Sequence[Sequence[Int[np.ndarray, " _"]]]
    """The sampled thoughts of every prompt, in the order of ``prompts``."""
    partners: Partners
    markers: Markers
    neutral_ids: Sequence[int]
    controls: Sequence[Control]
    seed: int
    greedy: Sequence[Int[np.ndarray, " _"]] = ()
    """The thought at temperature 0 of every prompt; empty where none was asked for."""

    def branches(self, index: int) -> dict[tuple[str, int], Branch]:
        """Branches of prompt ``index`` by (frame, sample); frames that no thought enters have
        sample ANY_SAMPLE.
        """
        prompt = self.prompts[index]
        lineup = self._shared(index)
        for sample, thought in enumerate(self.thoughts[index]):
            lineup[OWN, sample] = thought_branch(prompt, self.markers, thought)
            for name, ids in self._substitutes(index, sample).items():
                lineup[name, sample] = thought_branch(prompt, self.markers, ids)
            target = self._wrong_target(index)
            if target is not None:
                lineup[WRONG, sample] = thought_branch(prompt, self.markers, thought, target)
        return lineup

    def _shared(self, index: int) -> dict[tuple[str, int], Branch]:
        prompt = self.prompts[index]
        lineup: dict[tuple[str, int], Branch] = {}
        if self.greedy:
            lineup[GREEDY, ANY_SAMPLE] = thought_branch(prompt, self.markers, self.greedy[index])
        if "empty" in self.controls:
            lineup["empty", ANY_SAMPLE] = thought_branch(prompt, self.markers, [])
        if NULL in self.controls:
            lineup[NULL, ANY_SAMPLE] = bare_branch(prompt)
        target = self._wrong_target(index)
        if target is not None:
            lineup[WRONG_NO_THINK, ANY_SAMPLE] = bare_branch(prompt, target)
        return lineup

    def _substitutes(self, index: int, sample: int) -> dict[str, Ids]:
        """What stands in the thought's place, by control."""
        prompt, thought = self.prompts[index], self.thoughts[index][sample]
        draw = {name: rng.generator(self.seed, name, *prompt.key, sample) for name in self.controls}
        made: dict[str, Ids] = {}
        if "filler" in self.controls:
            made["filler"] = filler(len(thought), self.neutral_ids)
        if "context_copy" in self.controls:
            made["context_copy"] = context_copy(prompt, len(thought), draw["context_copy"])
        if "other_document" in self.controls:
            made["other_document"] = self.thoughts[self.partners.other_document(index)][sample]
        if "shuffled" in self.controls:
            made["shuffled"] = shuffled(thought, draw["shuffled"])
        return made

    def _wrong_target(self, index: int) -> Ids | None:
        if WRONG not in self.controls:
            return None
        partner = self.partners.other_continuation(index)
        return None if partner is None else self.prompts[partner].continuation_ids
