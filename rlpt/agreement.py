"""At the start of a run: does the engine compute what the trainer computes?

The engine samples a few thoughts with the weights that it was just given; the trainer scores the same tokens with the
same ids removed from the softmax. Log-probabilities must agree as far as the dtypes allow, or no importance ratio of
the run means anything.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlpt import dist
from rlpt.config import RunConfig
from rlpt.console import say
from rlpt.guards import ROUNDING, mean_bound
from rlpt.jobs import Task
from rlpt.policy.load import Blueprint
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Pair, Scorer
from rlpt.policy.selfcheck import LARGEST_ERROR, check_layout, documents_to_check
from rlpt.prompts import held_out
from rlpt.rollout.engine import Engine, generate
from rlpt.types import Branch, Group, Markers, Prompt, Rollout, concat
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
PROMPTS, GROUP = 8, 4
LARGEST_FLOAT32 = 1e-3
"""Nats, of any token, where both sides compute in float32: measured 1e-6 on a CPU; a weight that is off shows more."""
LARGEST_MEAN = 0.003
"""Nats. A bias, as of a log-softmax in bfloat16 (0.005), does not average out over a batch; rounding does."""


class Token(NamedTuple):
    """One sampled token and what both sides say of it."""

    difference: float
    """Trainer minus engine, nats."""
    engine: str
    prompt: tuple[int, str, int]
    rollout: int
    position: int
    id: int
    engine_logp: float
    trainer_logp: float

    def __str__(self) -> str:
        epoch, document, cut = self.prompt
        return (
            f"{self.engine}, document {document}, epoch {epoch}, cut {cut}, thought {self.rollout}, position "
            f"{self.position}, id {self.id}: engine {self.engine_logp:.6g}, trainer {self.trainer_logp:.6g}"
        )


@dataclass(frozen=True)
class Agreement:
    """Over the sampled tokens of all ranks; d = trainer - engine, nats."""

    tokens: int
    mean: float
    rms: float
    worst: Token

    @property
    def largest(self) -> float:
        return abs(self.worst.difference)

    def excess(self, dtype: Dtype) -> str | None:
        """What is out of bounds; None where nothing is.

        float32: any token by more than 0.001. Otherwise: rms above what rounding explains, or |mean| above 0.003 and
        four standard errors, rms / sqrt(tokens): of 500 tokens in bfloat16 they are 0.008, so that only a gross bias
        is found here. A mean of -rms^2 / 2 is fair: the tokens were drawn from the engine's distribution.
        """
        if dtype == "float32":
            return _above("largest |d|", self.largest, LARGEST_FLOAT32)
        bound = mean_bound(LARGEST_MEAN, self.rms, self.tokens)
        return _above("rms of d", self.rms, ROUNDING[dtype]) or _above(
            "|mean d|", abs(self.mean), bound
        )


def _above(name: str, value: float, bound: float) -> str | None:
    # Written so that NaN is out of bounds, too.
    return None if value <= bound else f"{name} = {value:.3g} nats (bound {bound:.3g})"


def check_engine(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Prompt],
    markers: Markers,
    world: dist.World,
    dtype: Dtype,
    tokens: int,
    temperature: float = 1.0,
) -> Agreement:
    """Sample thoughts of up to 8 ``prompts`` with every rank's engine, score them and compare. Collective.

    ``policy`` computes in float32 and holds what was published last; ``dtype`` is the engine's; ``tokens`` is the
    budget of one scoring forward. Raises UserError on every rank where one engine is out of bounds: nothing was trained
    yet, and what has to change (dtype, head, model, address) stands in the configuration.
    """
    groups = generate(engine, prompts[:PROMPTS], GROUP, "agreement")
    scorer = Scorer(policy, (markers.opener,), world, tokens, temperature=temperature)
    compared = list(_compared(groups, engine, scorer, world))
    found = _reduced(compared, world)
    if (excess := found.excess(dtype)) is not None:
        raise UserError(
            f"engine: its log-probabilities are not the trainer's in {dtype}: {excess} over {found.tokens} tokens; "
            f"worst token: {found.worst}. Compare the engine's model, vocabulary, dtype and head dtype with the "
            "policy's; it must ban the opener, and sample at the run's temperature without top-p and top-k"
        )
    return found


def _compared(
    groups: Sequence[Group],
    engine: Engine,
    scorer: Scorer,
    world: dist.World,
) -> Iterator[Token]:
    """Every action, on both sides. The trainer removes the opener from the softmax, as in training."""
    chosen = [
        (group.prompt, g, rollout) for group in groups for g, rollout in enumerate(group.rollouts)
    ]
    scored = scorer.branches([_pair(prompt, rollout) for prompt, _, rollout in chosen])
    name = f"{type(engine).__name__} of rank {world.rank}"
    for (prompt, g, rollout), scores in zip(chosen, scored, strict=True):
        for t in rollout.action.nonzero()[0].tolist():
            both = float(rollout.logp[t]), float(scores.logp[t])
            yield Token(both[1] - both[0], name, prompt.key, g, t, int(rollout.ids[t]), *both)


def _pair(prompt: Prompt, rollout: Rollout) -> Pair:
    prefix = prompt.policy_ids[prompt.cut :]
    return prompt.trunk, Branch(prompt.cut, concat(prefix, rollout.ids), len(prefix))


def _reduced(compared: Sequence[Token], world: dist.World) -> Agreement:
    sums = [
        float(len(compared)),
        math.fsum(each.difference for each in compared),
        math.fsum(each.difference**2 for each in compared),
    ]
    count, total, square = dist.total(sums, world)
    assert count, "the engine sampled nothing"
    local = max(compared, key=_distance, default=None)
    worst = max((each for each in dist.gathered(local, world) if each is not None), key=_distance)
    return Agreement(int(count), total / count, math.sqrt(square / count), worst)


def _distance(token: Token) -> float:
    """NaN is further than anything."""
    return math.inf if math.isnan(token.difference) else abs(token.difference)


@dataclass(frozen=True)
class Trial:
    """What is compared before a first step, on held-out documents of a configuration."""

    cfg: RunConfig | Task
    shards: ShardFolder
    plan: Blueprint
    world: dist.World
    found: dict[str, Any] = field(default_factory=dict)
    """What was compared so far and how far apart it was, in nats."""

    @property
    def markers(self) -> Markers:
        return self.plan.vocabulary.markers

    def layout(self, policy: Policy) -> None:
        """Hold a shared layout against one sequence at a time. ``policy`` computes in float32."""
        if self.plan.layout != "shared":
            return
        cfg = self.cfg
        split = self.shards.split(cfg.evaluation.split)
        prompts = documents_to_check(split, cfg.prompts, self.markers, cfg.seed)
        error = check_layout(policy, prompts, self.markers, cfg.thought.budget_tokens, self.world)
        self.found["layout"] = {"largest": error, "bar": LARGEST_ERROR}
        say(f"shared and one by one differ by {error:.1g} nats", self.world.is_main)

    def engine(self, engine: Engine, policy: Policy) -> None:
        """Hold what a foreign engine says of its own tokens against the policy that was published to it."""
        cfg = self.cfg
        split = self.shards.split(cfg.evaluation.split)
        domains, tokens = cfg.evaluation.domains, cfg.evaluation.batch_tokens
        prompts = held_out(split, cfg.prompts, self.markers, PROMPTS, cfg.seed, domains)
        found = check_engine(
            *(engine, policy, prompts, self.markers, self.world, engine.dtype),
            *(tokens, cfg.thought.temperature),
        )
        self.found["engine"] = {
            **{"tokens": found.tokens, "mean": found.mean, "rms": found.rms},
            **{"largest": found.largest, "dtype": engine.dtype},
        }
        say(f"engine and trainer differ by at most {found.largest:.1g} nats", self.world.is_main)
