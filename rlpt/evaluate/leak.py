"""The leak test: with other text after the cut, the engine must be asked the same and think the same.

MEASURING, section 3. Naming the answer is what a good thought does; knowing it is what none may do. Prompts are built
anew from trunks whose tokens after the cut are all replaced, so that nothing of the text can reach an engine unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from rlpt import dist, rng
from rlpt.evaluate.continuation import Procedure
from rlpt.prompts import prompt_at
from rlpt.rollout.engine import Sampler
from rlpt.types import Group, Markers, Prompt, concat

PURPOSE = "leak"


@dataclass(frozen=True)
class Leak:
    """What became of the prompts."""

    prompts: int
    requests_changed: int
    """Prompts whose ids for the engine are others with other text after the cut."""
    thoughts_changed: int
    """Prompts whose thoughts are others, although the same text gives the same thoughts."""
    unrepeatable: int
    """Prompts whose thoughts change when the same is asked again: nothing can be said of them."""

    @property
    def passes(self) -> bool:
        return not self.requests_changed and not self.thoughts_changed

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "passes": self.passes,
            "prompts": self.prompts,
            "requests_changed": self.requests_changed,
            "thoughts_changed": self.thoughts_changed,
            "unrepeatable": self.unrepeatable,
        }


def leak(
    engine: Sampler, prompts: Sequence[Prompt], procedure: Procedure, world: dist.World
) -> Leak:
    """Ask ``prompts`` (the same global list on every rank) as they are, with other text, and as they are again."""
    known = np.unique(concat(*(prompt.trunk.ids for prompt in prompts)))
    mine = dist.share(prompts, world)
    others = [with_other_text(prompt, known, procedure.markers, procedure.seed) for prompt in mine]
    first, other, again = (_thoughts(engine, asked, procedure) for asked in (mine, others, mine))
    flags = [
        (not np.array_equal(a.policy_ids, b.policy_ids), one != two, one != three)
        for a, b, one, two, three in zip(mine, others, first, other, again, strict=True)
    ]
    found = dist.unshare(flags, world)
    return Leak(
        prompts=len(prompts),
        requests_changed=sum(request for request, _, _ in found),
        thoughts_changed=sum(thought and not unsteady for _, thought, unsteady in found),
        unrepeatable=sum(unsteady for _, _, unsteady in found),
    )


def with_other_text(
    prompt: Prompt, known: Int[np.ndarray, " K"], markers: Markers, seed: int
) -> Prompt:
    """The prompt of the same context in a trunk whose every token after the cut is another one of ``known``."""
    assert len(known) > 1, "one id alone cannot be replaced by another"
    ids, cut = prompt.trunk.ids, prompt.cut
    draw = rng.generator(seed, PURPOSE, *prompt.key)
    at = np.searchsorted(known, ids[cut:])
    moved = (at + draw.integers(1, len(known), size=len(at))) % len(known)
    trunk = replace(prompt.trunk, ids=concat(ids[:cut], known[moved]))
    return prompt_at(trunk, cut, prompt.horizon, markers)


def _thoughts(
    engine: Sampler, prompts: Sequence[Prompt], procedure: Procedure
) -> list[list[tuple[int, ...]]]:
    """All that was sampled for every prompt."""
    tickets = engine.submit(prompts, procedure.thoughts, PURPOSE, procedure.budget)
    return [_sampled(group) for group in engine.collect(tickets)]


def _sampled(group: Group) -> list[tuple[int, ...]]:
    return [tuple(rollout.ids.tolist()) for rollout in group.rollouts]
