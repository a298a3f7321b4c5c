"""Lines of JSON that a run leaves behind, plain or compressed, and what every reader of them may rely on."""

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
