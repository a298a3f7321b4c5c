"""One evaluation of one policy: what training calls at the ends of stages and `rlpt eval` on a
checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlpt import dist
from rlpt.evaluate.bits_per_byte import WindowRecord, measure_windows
from rlpt.evaluate.continuation import Keep, Procedure, Scorer, afresh, measure
from rlpt.evaluate.leak import Leak, leak
from rlpt.evaluate.paired import bits_change, change
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.records import Record
from rlpt.evaluate.summary import summarise
from rlpt.rollout.engine import Sampler
from rlpt.types import Prompt, Trunk


@dataclass(frozen=True)
class Evaluation:
    """Records of every thought, of every window, and what they amount to."""

    records: list[Record]
    windows: list[WindowRecord]
    summary: dict[str, Any]
    resampling: Resampling

    @property
    def gain(self) -> float:
        """Held-out gain, nats per continuation token."""
        return self.summary["gain_heldout"]["mean"]


def evaluate(
    scorer: Scorer,
    engine: Sampler,
    prompts: Sequence[Prompt],
    trunks: Sequence[Trunk],
    procedure: Procedure,
    resampling: Resampling,
    world: dist.World,
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    unbanned: Scorer | None = None,
    keep: Keep = afresh,
) -> Evaluation:
    """Evaluate on ``prompts`` and, for bits per byte, on ``trunks``; both lists are global, the
    result is on all ranks.
    """
    records = measure(scorer, engine, prompts, procedure, world, unbanned, keep)
    windows = keep("windows", lambda: measure_windows(scorer, trunks, world, procedure.batch))
    leaked = leak_of(engine, prompts, procedure, world, keep)
    summary = summarise(records, windows, resampling, compute_dtype, leaked)
    return Evaluation(records, windows, summary, resampling)


def leak_of(
    engine: Sampler,
    prompts: Sequence[Prompt],
    procedure: Procedure,
    world: dist.World,
    keep: Keep = afresh,
) -> Leak | None:
    """The leak test on the first prompts; None where it is not asked for, or no thought may be longer than nothing."""
    chosen = prompts[: procedure.leak_prompts]
    if not chosen or procedure.budget == 0:
        return None
    return keep("leak", lambda: leak(engine, chosen, procedure, world))


def headline(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What a run's summary.json says of its two ends; the changes are paired record by record."""
    changes = change(before.records, after.records, after.resampling)
    first, last = before.summary, after.summary
    table: dict[str, Any] = {
        "verdict": last["verdict"],
        "verdict_before": first["verdict"],
        "verdict_reasons": last["verdict_reasons"],
        "gain_heldout_before": first["gain_heldout"],
        "gain_heldout_after": last["gain_heldout"],
        "gain_change": changes["gain"].as_dict(),
        "first_token_gain_change": changes["first_gain"].as_dict(),
        "bits_per_byte_before": first["bits_per_byte"],
        "bits_per_byte_after": last["bits_per_byte"],
        "controls": last["controls"],
    }
    for name in ("next_token_accuracy_no_think", "next_token_accuracy_thought"):
        table |= {f"{name}_before": first[name], f"{name}_after": last[name]}
    if before.windows:
        moved = bits_change(before.windows, after.windows, after.resampling)
        table["bits_per_byte_change"] = moved.as_dict()
    return table | {name: last[name] for name in ("null", "wrong_target", "leak") if name in last}
