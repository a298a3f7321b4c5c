"""The points a law is fitted to, and what a law has to offer to be fitted.

Letters: **N** points, **Q** parameters of a law, **K** candidates that are looked at together, **M** cells of a coarse
grid.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Points:
    """Compute above 0, in any unit, and what was measured there."""

    compute_N: Float[np.ndarray, " N"]
    value_N: Float[np.ndarray, " N"]
    sd_N: Float[np.ndarray, " N"] | None = None
    """Standard error of every value; None: one for all, estimated from the residuals."""

    @property
    def scale(self) -> Float[np.ndarray, " N"]:
        """What residuals are divided by."""
        return np.ones_like(self.value_N) if self.sd_N is None else self.sd_N

    def where(self, kept_N: Bool[np.ndarray, " N"]) -> "Points":
        sd_N = None if self.sd_N is None else self.sd_N[kept_N]
        return Points(self.compute_N[kept_N], self.value_N[kept_N], sd_N)

    def __len__(self) -> int:
        return len(self.value_N)


@dataclass(frozen=True)
class Cells:
    """A coarse grid over the parameters that a curve is not linear in; the others in closed form."""

    theta_MQ: Float[np.ndarray, "M Q"]
    error_M: Float[np.ndarray, " M"]
    """Sum of squared residuals, each over its standard error."""
    curvature_M: Float[np.ndarray, " M"]
    """The error grows by this much times the square of a change of the ceiling."""


@dataclass(frozen=True)
class Range:
    """Where a parameter is looked for."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@runtime_checkable
class Law(Protocol):
    """A curve over compute with three parameters. The first is the ceiling: what endless compute would reach."""

    names: ClassVar[tuple[str, ...]]

    def curve(
        self, theta_KQ: Float[np.ndarray, "K Q"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N"]: ...

    def slopes(
        self, theta_KQ: Float[np.ndarray, "K Q"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N Q"]:
        """Derivatives of the curve by its parameters."""
        ...

    def cells(self, points: Points) -> Cells: ...

    def limit_error(self, points: Points, direction: int) -> float:
        """The least error of a curve that never levels off: the ceiling at plus or minus infinity."""
        ...

    def ranges(self, points: Points) -> dict[int, Range]:
        """Of the parameters other than the ceiling that get an interval, as fitted."""
        ...

    def plain(self, theta_Q: Float[np.ndarray, " Q"]) -> dict[str, float]:
        """The parameters as the papers write them."""
        ...
