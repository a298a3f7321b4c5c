"""A summary (nested figures, as in `summary.json`) -> lines for people to read."""

from typing import Any

from rlpt_data.visible import visible

Summary = dict[str, Any]
_FIRST_OF_A_STRATUM = ("verdict", "gain_heldout_after", "logp_answer")


def text(summary: Summary) -> str:
    """One aligned line per figure, the verdict first; an interval reads ``mean [low, high]``."""
    rows = _flattened({key: summary[key] for key in sorted(summary, key=_verdict_first)})
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(visible(f"{name:<{width}}  {value}") for name, value in rows)


def proving_text(summary: Summary) -> str:
    """The figures of a proving run to read first; the file has those of every seed and control."""
    strata = {
        name: {key: part[key] for key in _FIRST_OF_A_STRATUM}
        for name, part in summary.get("strata", {}).items()
    }
    return text(
        {key: value for key, value in summary.items() if key != "seeds"} | {"strata": strata}
    )


def _verdict_first(key: str) -> bool:
    return key != "verdict"


def _flattened(table: Summary, prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict) and not _is_interval(value):
            rows += _flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _shown(value)))
    return rows


def _is_interval(value: Summary) -> bool:
    return {"mean", "ci_low", "ci_high"} <= value.keys()


def _shown(value: object) -> str:
    if isinstance(value, dict) and value["ci_low"] is None:
        return f"{_shown(value['mean'])} (too few documents for an interval)"
    if isinstance(value, dict):
        low, high = _shown(value["ci_low"]), _shown(value["ci_high"])
        return f"{_shown(value['mean'])} [{low}, {high}]"
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
