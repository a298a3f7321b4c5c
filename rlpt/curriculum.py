"""What changes in the course of a stage, as configurations: pure functions of the step."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt_data.strict import Strict

Positive = Annotated[int, Field(ge=1)]


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
