"""What the engine's log-probabilities may differ by from the trainer's, as configurations."""

from typing import Annotated

from pydantic import Field

from rlpt.terms import Fraction, Rate
from rlpt_data.strict import Strict


class MismatchLimits(Strict):
    """Limits on what the engine's log-probabilities differ by from the trainer's. `inf` (0 for a least value): none.

    d = trainer - engine, in nats, of every sampled token; ratio = exp(d). `current_*`: tokens that the very weights of
    the step sampled, where nothing but the engine can be the cause.
    """

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)]
    """Most mean exp|d|."""
    current_rms_log_ratio: Rate | None
    """Most root mean square of d. Absent: what rounding explains (0.06 in bfloat16, 0.01 in float16, 0.005 in
    float32)."""
    current_k1: Rate
    """Most absolute mean of d, beside four standard errors."""
    k1: Rate
    """Most absolute mean of d over all tokens."""
    chi2: Rate
    """Most mean ratio^2 - 1."""
    ess: Fraction
    """Least effective share of the sample: (sum ratio)^2 / (n sum ratio^2)."""
    ratio_low: Fraction
    """Least mean ratio."""
    ratio_high: Annotated[float, Field(ge=1.0)]
    """Most mean ratio."""


class WarnLimits(MismatchLimits):
    """Said once a run, counted in every step."""

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)] = 1.05
    current_rms_log_ratio: Rate | None = None
    current_k1: Rate = 0.003
    k1: Rate = 0.1
    chi2: Rate = 1.0
    ess: Fraction = 0.3
    ratio_low: Fraction = 0.5
    ratio_high: Annotated[float, Field(ge=1.0)] = 2.0


class HaltLimits(MismatchLimits):
    """Ends the run: a fault."""

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)] = 1.5
    current_rms_log_ratio: Rate | None = 1.0
    current_k1: Rate = 0.1
    k1: Rate = 0.5
    chi2: Rate = 10.0
    ess: Fraction = 0.1
    ratio_low: Fraction = 0.25
    ratio_high: Annotated[float, Field(ge=1.0)] = 4.0


class MismatchConfig(Strict):
    """The engine against the trainer: what is worth a warning, and what ends a run."""

    warn: WarnLimits = WarnLimits()
    halt: HaltLimits = HaltLimits()
