"""Up to where a run's own numbers may go before it warns or ends, as configurations: those of the engine against the
trainer, and those of the training itself.
"""

from typing import Annotated

from pydantic import Field, model_validator

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


class GuardsConfig(Strict):
    """What of the training itself is worth a warning, and what ends a run; with other limits it then goes on from its
    last checkpoint.
    """

    nonfinite_in_a_row: Annotated[int, Field(ge=0)] = 3
    """Most steps in a row that may be skipped because a reward, a loss or the gradient was not finite. 0: the first one
    ends the run."""
    nonfinite_share: Fraction = 0.05
    """Most of the last 100 steps that may be skipped. 0: as above; 1: any number."""
    grad_norm_warn: Annotated[float, Field(ge=1.0)] = 10.0
    """Multiple of the gradient norm's running median (of 100 steps of the stage, at least 20). inf: none."""
    grad_norm_halt: Annotated[float, Field(ge=1.0)] = 100.0
    """The same, exceeded 5 steps in a row. inf: none."""
    truncation_warn: Fraction = 0.05
    """Share of the thoughts of the last 50 steps that the budget ended, of the step's own budget. 1: never."""
    truncation_halt: Fraction = 0.1
    """The same, exceeded for 100 steps in a row: the first 148 steps of a stage end no run. 1: never, for a run that
    studies truncation or is slow to learn its closer."""
    leak_warn: Fraction = 0.2
    """Share of the thoughts of the last 50 steps that say 4 tokens in a row of the held-out text which the context does
    not have. 1: never."""
    length_gap_warn: Rate = 0.5
    """Difference in length of thoughts above and below their group, as a share of the mean length, over 50 steps in
    which the gain did not rise. inf: none."""
    control_margin_warn: float = 0.0
    """Least nats per token by which the policy's own thought beats every control of a verdict, at the lower end of the
    95% interval, in an evaluation that finds a gain. -inf: none."""

    @model_validator(mode="after")
    def _warns_before_it_halts(self) -> "GuardsConfig":
        for name in ("grad_norm", "truncation"):
            warn, halt = getattr(self, f"{name}_warn"), getattr(self, f"{name}_halt")
            if warn > halt:
                raise ValueError(
                    f"{name}_warn = {warn:g} exceeds {name}_halt = {halt:g}: the run would end unwarned; lower it"
                )
        return self
