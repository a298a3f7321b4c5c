"""What an evaluation found <-> JSON, without loss: records and arrays come back as they were, floats bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.leak import Leak
from rlpt.evaluate.records import First, Greedy, Prediction, Record
from rlpt.types import Rollout

_KNOWN = {
    kind.__name__: kind for kind in (Record, First, Prediction, Greedy, WindowRecord, Rollout, Leak)
}


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
    """What `plain` was given."""
    if not isinstance(table, dict):
        return table
    if "fields" in table:
        fields = {name: restored(each) for name, each in table["fields"].items()}
        return _KNOWN[table["is"]](**fields)
    if "values" in table:
        return np.array(table["values"], dtype=table["is"])
    if table["is"] == "mapping":
        return {name: restored(each) for name, each in table["items"].items()}
    items = [restored(each) for each in table["items"]]
    return tuple(items) if table["is"] == "tuple" else items
