"""What a run sets, beside the defaults; what several runs set differently."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlpt.config import RunConfig
from rlpt.report.run import Run
from rlpt_data.strict import UserError, parse

_OWN = ("run_dir",)
"""Differs between any two runs and says nothing of either."""


class Setting(NamedTuple):
    """A key of the configuration and its values, as text: the default and the run's, or every run's."""

    key: str
    values: tuple[str, ...]


def beside_defaults(run: Run) -> list[Setting] | None:
    """(default, value) of what this run sets to something else than the default; None where its
    configuration is not one of this version, so that nobody can tell.
    """
    try:
        cfg = parse(RunConfig, run.config, "config.json")
    except UserError:
        return None
    return [
        Setting(key, (shown(default), shown(value)))
        for key, default, value in _differing(cfg)
        if key not in _OWN
    ]


def between(runs: Sequence[Run]) -> list[Setting]:
    """Keys whose values are not the same in all runs."""
    flat = [flattened(run.config) for run in runs]
    keys = dict.fromkeys(key for table in flat for key in table if key not in _OWN)
    values = {
        key: tuple(shown(table.get(key, PydanticUndefined)) for table in flat) for key in keys
    }
    return [Setting(key, found) for key, found in values.items() if len(set(found)) > 1]


def _differing(
    model: BaseModel, usual: Any = None, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, default, value) below ``model``; ``usual``: what stands in its place by default."""
    for name, field in type(model).model_fields.items():
        value, key = getattr(model, name), f"{prefix}{name}"
        default = field.get_default(call_default_factory=True)
        if type(usual) is type(model):
            default = getattr(usual, name)
        if isinstance(value, BaseModel):
            yield from _differing(value, default, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for place, each in enumerate(value):
                yield from _differing(each, None, f"{key}.{place}.")
        elif value != default:
            yield key, default, value


def flattened(table: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a place in a list is a number, as for ``--set``."""
    if isinstance(table, dict) and table:
        items = [(str(key), value) for key, value in table.items()]
    elif isinstance(table, list) and any(isinstance(value, dict) for value in table):
        items = [(str(place), value) for place, value in enumerate(table)]
    else:
        return {prefix: table}
    parts = (flattened(value, f"{prefix}.{key}" if prefix else key) for key, value in items)
    return {key: value for part in parts for key, value in part.items()}


def shown(value: Any) -> str:
    """A value as a person would write it; "" where the key has none."""
    if value is PydanticUndefined:
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, BaseModel):
        return shown(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {shown(each)}" for key, each in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
