"""Likelihood rewards: how likely a thought makes the held-out text, under some scorer, above some baseline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, model_validator

from rlpt.reward import aggregates
from rlpt.reward.base import Kit, PolicyScores, RewardBase, Rewarded, bare_scores, mean_of
from rlpt.reward.gain import gain
from rlpt.reward.shapes import Lengths, Shape, shaped
from rlpt.types import Branch, Group, Ids, Scores, concat, thought_branch
from rlpt_data.strict import Strict

ScorerName = Literal["policy", "ema", "frozen", "foreign"]
COPIES = frozenset({"ema", "frozen"})


class ForeignModel(Strict):
    """Another model as scorer: a transformers folder with the shards' own tokenizer."""

    path: Path
    separator: str = "\n\n"
    """Text that stands for both markers where its tokenizer has none as single ids."""


class LikelihoodReward(RewardBase):
    """aggregate(log p_scorer(y | x, opener, z, closer)) - aggregate(log p_baseline(y | x)), then the shapes in order.

    With the policy in both places, the mean and no shape it is the gain (MEASURING, section 1).
    """

    kind: Literal["likelihood"] = "likelihood"
    scorer: ScorerName = "policy"
    """Whose probabilities: the policy that is trained, its moving average, the copy that the stage began with (or that
    `reference_every` renews), or another model."""
    context: Literal["shown", "hidden"] = "shown"
    """hidden: the scorer sees the thought alone, not the text before the cut (BOW's bottleneck)."""
    baseline: Literal["none", "policy", "ema", "frozen", "foreign", "empty"] = "policy"
    """What is subtracted: log p(y | x) of a model, or (empty) the policy's after an empty thought."""
    aggregate: Literal[
        "mean",
        "sum",
        "product",
        "mean_probability",
        "geometric_mean",
        "discounted",
        "hardness_weighted",
        "log_mean_exp",
    ] = "mean"
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Of `discounted`."""
    shapes: tuple[Shape, ...] = ()
    foreign: ForeignModel | None = None

    @property
    def relative(self) -> bool:
        return self.aggregate in ("product", "geometric_mean") and self.baseline == "none"

    def replicas(self, centred: bool) -> frozenset[str]:
        used = {self.scorer} if self.cancels(centred) else {self.scorer, self.baseline}
        return frozenset(used) & COPIES

    def skips(self, centred: bool) -> str | None:
        if not self.cancels(centred):
            return None
        return f"the baseline {self.baseline!r} is one number per prompt, cancels in centred advantages, and is skipped"

    predicts: ClassVar[bool] = False

    @property
    def signed(self) -> bool:
        if self.shapes:
            last = self.shapes[-1]
            unsigned = last.kind in ("rank", "relu")
            return not (unsigned or (last.kind == "buckets" and min(last.values) >= 0))
        probability = self.aggregate in ("product", "mean_probability", "geometric_mean")
        return not probability or self.baseline != "none"

    @property
    def compares(self) -> bool:
        return self.aggregate == "log_mean_exp" or any(s.kind == "rank" for s in self.shapes)

    @property
    def averages(self) -> bool:
        return self.aggregate in ("mean", "mean_probability", "geometric_mean")

    def cancels(self, centred: bool) -> bool:
        """Whether the baseline adds a number per prompt that drops out of the advantages; it is then skipped."""
        return (
            centred
            and self.baseline not in ("none", "policy")
            and self.aggregate != "hardness_weighted"
            and all(shape.affine for shape in self.shapes)
        )

    def why_separate(self, centred: bool) -> str | None:
        if self.context == "hidden" and self.scorer == "policy":
            return "reward.context = 'hidden' is scored without the context"
        if self.baseline == "empty" and not self.cancels(centred):
            return "reward.baseline = 'empty' is a branch of its own"
        return None

    def passes(self, read: bool, centred: bool) -> tuple[int, int]:
        # The policy's own gain is always measured.
        own = self.scorer != "policy" or self.context == "hidden"
        other = self.baseline not in ("none", "policy", "empty") and not self.cancels(centred)
        return (not read) + own, (not read) + other

    def build(self, kit: Kit) -> "Likelihood":
        return Likelihood(self, kit)

    @model_validator(mode="after")
    def _combinations(self) -> "LikelihoodReward":
        if ("foreign" in (self.scorer, self.baseline)) != (self.foreign is not None):
            raise ValueError(
                "reward.foreign = { path = ... } and a scorer or baseline of 'foreign' go together"
            )
        if self.aggregate == "log_mean_exp" and (self.baseline != "none" or self.shapes):
            raise ValueError(
                "reward.aggregate = 'log_mean_exp' compares siblings and is centred: set baseline = 'none', no shapes"
            )
        by_noise = [s.kind == "rank" and s.ties == "noise" for s in self.shapes]
        if any(by_noise[1:]) or (any(by_noise) and not self.averages):
            raise ValueError(
                "reward.shapes, rank: ties = 'noise' is the rounding of a mean over the continuation: put rank first, "
                "with aggregate = 'mean', 'mean_probability' or 'geometric_mean'"
            )
        if self.aggregate == "hardness_weighted" and self.baseline == "none":
            raise ValueError(
                "reward.aggregate = 'hardness_weighted' weighs tokens by a baseline: name one, e.g. 'frozen'"
            )
        return self


@dataclass(frozen=True)
class Likelihood:
    """See `LikelihoodReward`. Gain against the policy itself is measured beside any reward."""

    cfg: LikelihoodReward
    kit: Kit

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        thought, no_think = policy if policy is not None else self._policy(groups)
        own = thought if self._is_policys else self._thoughts(self.cfg.scorer, groups)
        base = self._baseline(groups, no_think)
        lengths = Lengths.of(groups, self.kit.noise)
        gold_PG = _totals(_solid(thought), groups)
        gain_PG = gain(gold_PG, _sums(_solid(no_think)), lengths.tokens_P)
        reward_PG = shaped(self._unshaped(groups, own, base), self.cfg.shapes, lengths)
        # A shape would turn an impossible continuation into an ordinary reward: it has seen 0, and NaN comes after it.
        # Whoever raised here would leave other ranks waiting; `rlpt.faults` has all of them skip the step.
        finite_PG = _finite(groups, (thought, own), (no_think, base))
        gain_PG, reward_PG = (np.where(finite_PG, each, np.nan) for each in (gain_PG, reward_PG))
        num_PG = np.broadcast_to(lengths.tokens_P[:, None], gain_PG.shape)
        sums = {
            "gain/mean": (float((gain_PG * num_PG).sum()), float(num_PG.sum())),
            "reward/baseline_skipped": (float(self._cancels), 1.0),
        }
        detail = {"thought": thought, "no_think": no_think, "gain": gain_PG.tolist()}
        return Rewarded(
            reward_PG, sums | mean_of("reward/likelihood", reward_PG), detail, None, gold_PG
        )

    @property
    def _is_policys(self) -> bool:
        return self.cfg.scorer == "policy" and self.cfg.context == "shown"

    @property
    def _cancels(self) -> bool:
        return self.cfg.cancels(self.kit.centred)

    def _unshaped(
        self, groups: Sequence[Group], own: list[Scores], base: list[Scores] | None
    ) -> Float[np.ndarray, "P G"]:
        none = [None] * len(groups)
        bases = none if base is None else [each.logp.astype(np.float64) for each in _solid(base)]
        per_prompt = zip(_by_group(_solid(own), groups), bases, strict=True)
        rows = [self._value(logp_GC, base_C) for logp_GC, base_C in per_prompt]
        return np.stack(rows) if rows else np.zeros((0, 1))

    def _value(
        self, logp_GC: aggregates.Logp, base_C: Float[np.ndarray, " C"] | None
    ) -> aggregates.Values:
        """Of one group."""
        if self.cfg.aggregate == "log_mean_exp":
            return aggregates.log_mean_exp_share(logp_GC)
        value_G = self._aggregated(logp_GC, base_C)
        return value_G if base_C is None else value_G - self._aggregated(base_C[None], base_C)

    def _aggregated(
        self, logp_GC: aggregates.Logp, base_C: Float[np.ndarray, " C"] | None
    ) -> aggregates.Values:
        if self.cfg.aggregate == "discounted":
            return aggregates.discounted(logp_GC, self.cfg.gamma)
        if self.cfg.aggregate == "hardness_weighted":
            assert base_C is not None
            return aggregates.hardness_weighted(logp_GC, base_C)
        return aggregates.PLAIN[self.cfg.aggregate](logp_GC)

    def _policy(self, groups: Sequence[Group]) -> PolicyScores:
        bare = bare_scores(self.kit.scorers["policy"], [group.prompt for group in groups])
        pairs = [
            (group.prompt.trunk, thought_branch(group.prompt, self.kit.markers, r.thought_ids))
            for group in groups
            for r in group.rollouts
        ]
        return PolicyScores(self.kit.scorers["policy"].branches(pairs), bare)

    def _thoughts(self, name: str, groups: Sequence[Group]) -> list[Scores]:
        pairs = [
            (group.prompt.trunk, self._branch(group, rollout.thought_ids))
            for group in groups
            for rollout in group.rollouts
        ]
        return self.kit.scorers[name].branches(pairs)

    def _branch(self, group: Group, thought_ids: Ids) -> Branch:
        """As the scorer reads it: its own words for the markers, the context in sight or not."""
        prompt, separator = group.prompt, self.kit.separator
        if separator is None or self.cfg.scorer != "foreign":
            branch = thought_branch(prompt, self.kit.markers, thought_ids)
        else:
            ids = concat(separator, thought_ids, separator, prompt.continuation_ids)
            branch = Branch(prompt.cut, ids, len(ids) - prompt.horizon)
        if self.cfg.context == "shown":
            return branch
        head = prompt.frame.head
        return Branch(0, concat(head, branch.ids), len(head) + branch.score_start)

    def _baseline(self, groups: Sequence[Group], no_think: list[Scores]) -> list[Scores] | None:
        name = self.cfg.baseline
        if name == "none" or self._cancels:
            return None
        if name == "policy":
            return no_think
        if name == "empty":
            empty = np.zeros(0, dtype=np.int64)
            pairs = [
                (g.prompt.trunk, thought_branch(g.prompt, self.kit.markers, empty)) for g in groups
            ]
            return self.kit.scorers["policy"].branches(pairs)
        return bare_scores(self.kit.scorers[name], [group.prompt for group in groups])


def _by_group(scores: Sequence[Scores], groups: Sequence[Group]) -> list[aggregates.Logp]:
    """One (G, C) array a group, float64."""
    found, at = [], 0
    for group in groups:
        parts = scores[at : at + len(group.rollouts)]
        found.append(np.stack([each.logp.astype(np.float64) for each in parts]))
        at += len(parts)
    return found


def _solid(scores: list[Scores]) -> list[Scores]:
    """0 throughout in the place of scores whose total is not finite."""
    return [
        score if np.isfinite(score.total) else replace(score, logp=np.zeros_like(score.logp))
        for score in scores
    ]


def _finite(
    groups: Sequence[Group],
    of_rollouts: Sequence[Sequence[Scores]],
    of_prompts: Sequence[Sequence[Scores] | None],
) -> Bool[np.ndarray, "P G"]:
    """Rollouts whose own scores, and whose prompt's, are finite in total."""
    finite_PG = np.all([np.isfinite(_totals(each, groups)) for each in of_rollouts], axis=0)
    finite_P = [np.isfinite(_sums(each)) for each in of_prompts if each is not None]
    return finite_PG & np.all(finite_P, axis=0)[:, None]


def _totals(scores: Sequence[Scores], groups: Sequence[Group]) -> Float[np.ndarray, "P G"]:
    width = len(groups[0].rollouts) if groups else 1
    return _sums(scores).reshape(len(groups), width)


def _sums(scores: Sequence[Scores]) -> Float[np.ndarray, " P"]:
    return np.array([score.total for score in scores], dtype=np.float64)
