"""At the start of every run: does sharing trunks change a number?"""

from collections.abc import Sequence

import numpy as np

from rlpt import dist
from rlpt.policy.packing import Layout
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Pair, Scorer
from rlpt.types import Markers, Prompt, thought_branch
from rlpt_data.strict import UserError

LARGEST_ERROR = 1e-4
"""In float32, nats; rounding is a tenth of it."""
MEAN_ERROR = 0.1
"""In bfloat16, nats, where two exact paths to one token differ by 0.05; a mask gone wrong shows as 0.2."""


def check_layout(
    policy: Policy, prompts: Sequence[Prompt], markers: Markers, budget: int, world: dist.World, exact: bool
) -> float:  # fmt: skip
    """Score ``prompts`` in both layouts, with thoughts of up to ``budget`` tokens; the error in nats. Collective.

    Raises UserError where they disagree: some layer of the model looks where the tree forbids it, or nowhere it allows.
    """
    if policy.layout == "naive":
        return 0.0
    pairs = [pair for prompt in prompts for pair in _pairs(prompt, markers, budget)]
    shared, naive = (_scores(policy, pairs, prompts, markers, world, how) for how in _LAYOUTS)
    distance = np.abs(shared - naive)
    error, bar = (distance.max(), LARGEST_ERROR) if exact else (distance.mean(), MEAN_ERROR)
    if not error <= bar:
        raise UserError(
            f"policy.layout = 'shared': {type(policy.lm).__name__} gives log-probabilities that differ by {error:.3g} "
            f"nats from one sequence at a time (bar {bar:g}); set policy.layout = 'naive', and report this model"
        )
    return float(error)


_LAYOUTS: tuple[Layout, Layout] = ("shared", "naive")


def _pairs(prompt: Prompt, markers: Markers, budget: int) -> list[Pair]:
    """No thought, one token, and a span of the context as long as thoughts can be."""
    span = prompt.trunk.ids[max(0, prompt.cut - budget) : prompt.cut]
    thoughts = (span[:0], span[:1], span)
    return [(prompt.trunk, thought_branch(prompt, markers, ids)) for ids in thoughts]


def _scores(
    policy: Policy,
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt],
    markers: Markers,
    world: dist.World,
    layout: Layout,
) -> np.ndarray:
    # One forward for all: branches of several trunks must not see each other.
    scorer = Scorer(policy, markers.ids, world, 1 << 30, layout)
    spans = [(prompt.trunk, prompt.cut, prompt.cut + prompt.horizon) for prompt in prompts]
    found = scorer.branches(pairs) + scorer.trunks(spans)
    return np.concatenate([scores.logp for scores in found]).astype(np.float64)
