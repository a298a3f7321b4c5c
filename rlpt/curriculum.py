"""What changes in the course of a stage, as configurations: budgets, tiers of cuts, what is asked for again."""

import math
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from rlpt_data.strict import Strict

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class DecayingBudget(Strict):
    """B_t = max(least, floor(start gamma^(t / T))) tokens, t of the stage's T steps done (RMT, arXiv 2509.24375)."""

    kind: Literal["decay"]
    start: Positive
    """At most `thought.budget_tokens` (RMT: 800)."""
    least: Positive = 1
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """What is left of it at the end of the stage; 1: all."""

    @model_validator(mode="after")
    def _falls(self) -> "DecayingBudget":
        if self.least > self.start:
            raise ValueError(f"budget.least = {self.least} exceeds budget.start = {self.start}")
        return self

    def at(self, step: int, steps: int) -> int:
        """Of the step after ``step`` of ``steps``."""
        return max(self.least, math.floor(self.start * self.gamma ** (step / steps)))


class EntropyCurriculum(Strict):
    """Easy cuts first: a sample's cuts are of one tier of annotated entropy, drawn from a mix that moves with the stage
    (RMT, arXiv 2509.24375).

    The mix is linear in t, the part of the stage that is over, between easy alone at 0, easy and medium by halves at
    the first transition, medium and hard by halves at the second, and hard alone at 1. The transitions are the
    paper's, the shares at them ours. t goes by samples: those that `sampling` or `difficulty` pass over hurry it.
    """

    tiers: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """Nats: least entropy of easy, medium and hard cuts; each tier ends where the next begins (RPT's splits)."""
    transitions: tuple[float, float] = (0.3, 0.7)

    @model_validator(mode="after")
    def _increases(self) -> "EntropyCurriculum":
        easy, medium, hard = self.tiers
        if not 0.0 <= easy < medium < hard:
            raise ValueError(
                f"curriculum.tiers = {list(self.tiers)}: give three increasing entropies"
            )
        if not 0.0 < self.transitions[0] < self.transitions[1] < 1.0:
            raise ValueError(
                f"curriculum.transitions = {list(self.transitions)}: give two increasing parts of the stage, "
                "between 0 and 1"
            )
        return self

    def mix(self, t: float) -> Float[np.ndarray, " 3"]:
        """Shares of easy, medium and hard; they add up to 1."""
        knots = (0.0, *self.transitions, 1.0)
        shares = ((1.0, 0.5, 0.0, 0.0), (0.0, 0.5, 0.5, 0.0), (0.0, 0.0, 0.5, 1.0))
        return np.array([np.interp(t, knots, share) for share in shares])


class DynamicSampling(Strict):
    """Groups whose rewards agree teach nothing: fresh documents are asked for in their stead (DAPO, 2503.14476)."""

    kind: Literal["dynamic"]
    rounds: Annotated[int, Field(ge=0)] = 3
    """Most times within a step; then what agrees fills the step. Ours: DAPO goes on, or ends the run. 0: never."""
    no_positive_resampling: Annotated[float, Field(gt=0.0)] | None = None
    """A prompt (document and cut) whose running mean reward reaches this is never asked for again (ScaleRL: 0.9)."""


class DifficultyWindow(Strict):
    """Documents neither too easy nor too hard: those outside are passed over, counted, and come back for review."""

    low: float
    high: float
    """Both bounds are inside. Ratings: means of a document's rewards over its groups, the last ones weighing more."""
    signal: Literal["pass_rate", "gain_quantile"] = "pass_rate"
    """What is held against the bounds: the rating, or the share of the rated documents with a lower one."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Weight of the rating so far beside the newest group's mean."""
    review_every: Positive = 4
    """Epochs after its last group until a document outside is asked for again."""

    @model_validator(mode="after")
    def _is_a_window(self) -> "DifficultyWindow":
        if self.low >= self.high:
            raise ValueError(
                f"difficulty.low = {self.low} must be below difficulty.high = {self.high}"
            )
        if self.signal == "gain_quantile" and not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(
                f"difficulty.low = {self.low} and high = {self.high}: quantiles are from 0 to 1"
            )
        return self


class HintPass(Strict):
    """Groups without a right rollout are asked again with the held-out text in the prompt, and what is right then is
    learned as if it had not been there: STaR's rationalisation (Zelikman et al. 2022, arXiv 2203.14465).

    Such thoughts are made from the answer. Nothing else in training sees it, and evaluations never do.
    """

    before: str = "\n[What comes next: "
    """Text between the context and the held-out text."""
    after: str = "]\n"

    @property
    def most_tokens(self) -> int:
        """Of both texts: no tokenizer makes more tokens of a text than it has bytes."""
        return len((self.before + self.after).encode())
