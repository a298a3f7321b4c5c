"""What page and terminal read off a run's files: the parts of a step's time, the limits that judge it. No drawing."""

import math
from typing import Any

from rlpt.guards import coarser
from rlpt.limits import GuardsConfig, MismatchConfig
from rlpt_data.strict import UserError, parse

Row = dict[str, Any]
PARTS = ("generate", "score", "train", "rest")


def time_parts(row: Row) -> dict[str, float] | None:
    """Seconds of a step by part, `rest` being what no clock took; None where it was not timed."""
    step = row.get("time/step")
    if not isinstance(step, (int, float)) or not math.isfinite(step):
        return None
    known = {part: float(row.get(f"time/{part}") or 0.0) for part in PARTS[:-1]}
    return known | {"rest": max(0.0, step - sum(known.values()))}


def limits_of(config: Row) -> MismatchConfig | None:
    """A run's own limits; None where its configuration has none, or others than today's."""
    try:
        return parse(MismatchConfig, config["mismatch"], "[mismatch]")
    except (KeyError, UserError):
        return None


def guards_of(config: Row) -> GuardsConfig | None:
    """The same of the alarms."""
    try:
        return parse(GuardsConfig, config["guards"], "[guards]")
    except (KeyError, UserError):
        return None


def dtype_of(config: Row) -> str:
    """The coarser of what the policy and what the engine compute in."""
    own = (config.get("policy") or {}).get("compute_dtype", "float32")
    engine = config.get("engine") or {}
    theirs = (engine.get("vllm") or {}).get("dtype", "auto")
    return coarser(own, own if engine.get("kind") != "vllm" or theirs == "auto" else theirs)
