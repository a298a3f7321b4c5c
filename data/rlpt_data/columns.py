"""Rows out of an Arrow batch without Arrow's objects: views of its buffers, made once a batch.

Arrow makes an object for every cell, which costs more than everything else about reading a row.
"""

from typing import Any

import numpy as np
import pyarrow as pa


def whole(column: pa.Array) -> pa.Array:
    """The column, once every position in it lies inside what it points into: Arrow follows others out of the file.

    Raises pa.ArrowInvalid.
    """
    column.validate(full=True)
    return column


class Columns:
    """One batch of a shard file. Raises pa.ArrowInvalid where it is damaged."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._strings: dict[str, tuple[np.ndarray, memoryview, np.ndarray | None]] = {}
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._present: dict[str, bool] = {}
        for field in batch.schema:
            column = batch.column(field.name)
            # Texts are most of a file; their positions are checked row by row.
            column.validate() if field.name == "text" else whole(column)
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
                self._strings[field.name] = _string_views(column)
            elif column.null_count == len(column):
                self._present[field.name] = False
            elif pa.types.is_primitive(field.type.value_type):
                values = column.values.to_numpy(zero_copy_only=True)
                self._lists[field.name] = (column.offsets.to_numpy(), values)

    def string(self, name: str, row: int) -> str | None:
        """The text of a cell; None where it is null."""
        offsets, data, valid = self._strings[name]
        if valid is not None and not valid[row]:
            return None
        return str(data[offsets[row] : offsets[row + 1]], "utf-8")

    def array(self, name: str, row: int) -> np.ndarray:
        """A read-only view of a list of numbers."""
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def objects(self, name: str, row: int) -> list[dict[str, Any]] | None:
        """A list of structures as dictionaries; None where it is null."""
        if not self._present.get(name, True):
            return None
        return self._batch.column(name)[row].as_py()


def _string_views(column: Any) -> tuple[np.ndarray, memoryview, np.ndarray | None]:
    """Offsets of a string column, its bytes, and which cells there are (None: all)."""
    _, offsets, data = column.buffers()
    kind = np.int64 if pa.types.is_large_string(column.type) else np.int32
    starts = np.frombuffer(offsets, kind, len(column) + 1, column.offset * np.dtype(kind).itemsize)
    valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
    return starts, memoryview(data or b""), valid
