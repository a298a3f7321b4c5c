"""Lines of JSON that a run leaves behind, plain or compressed, and what every reader of them may rely on."""

import math
from typing import Any

import zstandard

from rlpt_data.strict import json_of

Row = dict[str, Any]

_LEAST, _RATIO = 1 << 26, 200
"""A file may hold so many bytes, or so many times its own size: rows of numbers shrink by ten, a bomb by thousands."""
_PIECE = 1 << 10


def zipped(data: bytes) -> bytes:
    """One frame with a checksum: a digit that flips is still JSON."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def unzipped(data: bytes) -> bytes:
    """What was `zipped`. Raises ValueError where it is damaged, or swells beyond what rows can."""
    # Piece by piece: in one go the frame's own word for its size is believed, and the memory for it taken.
    frame = zstandard.ZstdDecompressor().decompressobj()
    parts, size, most = [], 0, max(_LEAST, _RATIO * len(data))
    try:
        for at in range(0, len(data), _PIECE):
            if frame.eof:
                break
            parts.append(frame.decompress(data[at : at + _PIECE]))
            size += len(parts[-1])
            if size > most:
                raise ValueError(f"{len(data)} bytes that swell to more than {most}")
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not frame.eof:
        raise ValueError("the file ends too early")
    return b"".join(parts)


def journal_row(line: bytes) -> Row:
    """A line of metrics.jsonl, evaluations.jsonl or answers.jsonl. Raises ValueError for what is none.

    It has a `step`, the name of a `stage`, in evaluations a table `summary`; all the rest are numbers, or null.
    """
    row = json_of(line)
    if not isinstance(row, dict):
        raise ValueError("no table")
    step, stage, summary = row.get("step"), row.get("stage"), row.get("summary", {})
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError("no step")
    if not isinstance(stage, str) or not isinstance(summary, dict):
        raise ValueError("no stage, or a summary that is no table")
    for name in row.keys() - {"step", "stage", "summary"}:
        if not is_number(row[name]):
            raise ValueError(f"{name} is no number")
    return row


def is_number(value: Any) -> bool:
    """A number that any array can hold, or null."""
    if type(value) is int:
        return abs(value) < 2**53
    return value is None or isinstance(value, float)


def is_beyond(value: Any) -> bool:
    """Whether a finite number is larger than any measured one: a product of two is not finite, and no axis holds it."""
    return isinstance(value, float) and 1e150 <= abs(value) < math.inf


NUMBER, COUNT, TEXT, TRUTH = "a number", "a count", "text", "true or false"
"""What stands at a place, for `fitting`."""
Shape = str | list[Any] | dict[str, Any]


def fitting(value: Any, shape: Shape, name: str = "it") -> Any:
    """The value, if all that a shape names in it is of that kind. Raises ValueError naming the place.

    A shape is NUMBER, COUNT, TEXT, TRUTH, a list of one shape, or a table: `key` may be absent or null, `key!` may not,
    `*` is any other key. What a shape does not name may be anything.
    """
    fits = {
        NUMBER: is_number(value) and not is_beyond(value),
        COUNT: type(value) is int and 0 <= value < 2**53,
        TEXT: isinstance(value, str),
        TRUTH: isinstance(value, bool),
    }
    if isinstance(shape, str):
        if value is None or not fits[shape]:
            raise ValueError(f"{name} is not {shape}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        for each in value:
            fitting(each, shape[0], name)
    else:
        _fitting_table(value, shape, name)
    return value


def _fitting_table(value: Any, shape: dict[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no table")
    named = {key.rstrip("!"): inner for key, inner in shape.items() if key != "*"}
    for key in (key[:-1] for key in shape if key.endswith("!")):
        if value.get(key) is None:
            raise ValueError(f"{name} has no {key}")
    for key, each in value.items():
        inner = named.get(key, shape.get("*"))
        if inner is not None and each is not None:
            fitting(each, inner, key)
