"""What an evaluation found <-> JSON, without loss: records and arrays come back as they were, floats bit for bit."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.leak import Leak
from rlpt.evaluate.records import First, Greedy, Prediction, Record
from rlpt.types import Rollout

_KNOWN = {
    kind.__name__: kind for kind in (Record, First, Prediction, Greedy, WindowRecord, Rollout, Leak)
}


_ARRAYS = ("bool", "int64", "int32", "uint32", "uint8", "float64", "float32")
T = TypeVar("T")


def plain(value: Any) -> Any:
    """As JSON has it: what it is goes along."""
    if type(value).__name__ in _KNOWN:
        fields = {name: plain(each) for name, each in vars(value).items()}
        return {"is": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        return {"is": str(value.dtype), "values": value.tolist()}
    if isinstance(value, Mapping):
        return {"is": "mapping", "items": {name: plain(each) for name, each in value.items()}}
    if isinstance(value, list | tuple):
        return {"is": type(value).__name__, "items": [plain(each) for each in value]}
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def restored(table: Any) -> Any:
    """What `plain` was given. Raises ValueError for what it never wrote."""
    if not isinstance(table, dict):
        return table
    kind = str(table.get("is"))
    if {*table} == {"is", "fields"} and isinstance(table["fields"], dict) and kind in _KNOWN:
        return made(_KNOWN[kind], {name: restored(each) for name, each in table["fields"].items()})
    if {*table} == {"is", "values"} and isinstance(table["values"], list) and kind in _ARRAYS:
        return _array(table["values"], kind)
    items = table.get("items")
    if {*table} == {"is", "items"} and kind == "mapping" and isinstance(items, dict):
        return {name: restored(each) for name, each in items.items()}
    if {*table} == {"is", "items"} and kind in ("list", "tuple") and isinstance(items, list):
        found = [restored(each) for each in items]
        return tuple(found) if kind == "tuple" else found
    raise ValueError(f"a table of {kind[:40]} that nothing wrote")


def _array(values: list[Any], kind: str) -> np.ndarray:
    try:
        return np.array(values, dtype=kind)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"no array of {kind}: {error}") from error


def made(kind: type[T], fields: dict[str, Any]) -> T:
    """A record of fields that have the types it says. Raises ValueError."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not needed <= {*fields} <= {*known}:
        raise ValueError(f"a {kind.__name__} with other fields")
    for name, value in fields.items():
        as_written(known[name].type, value, f"{kind.__name__}.{name}")
    return kind(**fields)


def as_written(annotation: Any, value: Any, name: str = "it") -> Any:
    """The value, if it is of that type: float takes whole numbers. Raises ValueError."""
    if not _fits(value, annotation):
        raise ValueError(f"{name} is not what was written there")
    return value


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        # Of this project's tuples those of unknown length have one type.
        kinds = (
            inner[:1] * len(value) if inner[-1:] == (...,) and isinstance(value, tuple) else inner
        )
        same = isinstance(value, tuple) and len(value) == len(kinds)
        return same and all(map(_fits, value, kinds))
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if annotation is Any:
        return True
    if annotation in (float, int):
        kinds = (float, int) if annotation is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, annotation)
