"""DCP's own files are read as data: its `.metadata` is a pickle, and so are its entries that are no tensors.

Nothing but the classes that DCP writes is ever made from a pickle, and no name leads out of the folder: a checkpoint
from elsewhere can be wrong, but it cannot act.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from rlpt.checkpoint.folders import manifest
from rlpt.phases import CLOCK
from rlpt_data.strict import UserError

_CLASSES = {
    metadata.__name__: {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    filesystem.__name__: {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    # Where it was written; later versions of Python have moved the class.
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


_BUILT = {
    *(Metadata, TensorStorageMetadata, BytesStorageMetadata, metadata.ChunkStorageMetadata),
    *(metadata.TensorProperties, MetadataIndex, StorageMeta, filesystem._StorageInfo),
}
"""Those of them that have a state."""

_UNREADABLE = (pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError, EOFError)
"""What a damaged entry can raise."""


def _build(unpickler: Any) -> None:
    """Give the last object but one on the stack a state."""
    # With a class in the place of an instance it is the class that would change, for all of this process.
    if type(unpickler.stack[-2]) not in _BUILT:
        kind = type(unpickler.stack[-2]).__name__
        raise pickle.UnpicklingError(f"gives a state to a {kind}, which no checkpoint needs")
    unpickler.load_build()


class _Unpickler(pickle._Unpickler):
    """Makes what DCP writes into `.metadata` and nothing else.

    The one in Python: with the one in C five bytes take gigabytes (LONG_BINPUT), and no BUILD can be refused.
    """

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads a checkpoint's files without trusting them. Raises UserError for what is not of a checkpoint's kind."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        path = folder / ".metadata"
        try:
            found = _checked(_Unpickler(io.BytesIO(path.read_bytes())).load(), folder)
        except Exception as error:
            # A damaged pickle can raise anything at all.
            raise UserError(
                f"{path}: damaged or not of a checkpoint: {error}; restore it, or use another checkpoint"
            ) from error
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Every entry of a checkpoint with its value, one at a time and without any process group.

    Raises UserError where one cannot be read, or is not what the metadata says.
    """
    reader = Reader(path)
    metadata = reader.read_metadata()
    places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
    for name, entry in metadata.state_dict_metadata.items():
        try:
            if isinstance(entry, TensorStorageMetadata):
                yield name, _assembled(path, name, entry, places)
            else:
                yield name, _read(path, places[name, None])
        except _UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: entry {name} cannot be read: {reason}") from error


def _assembled(
    path: Path, name: str, entry: TensorStorageMetadata, places: dict[Any, Any]
) -> torch.Tensor:
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    covered = 0
    for chunk in entry.chunks:
        part = _read(path, places[name, chunk.offsets])
        if part.shape != chunk.sizes or part.dtype != whole.dtype:
            raise ValueError(f"has {tuple(part.shape)} {part.dtype}, not {tuple(chunk.sizes)}")
        spans = [slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        whole[tuple(spans)] = part
        covered += part.numel()
    if covered != whole.numel():
        raise ValueError(f"its parts have {covered} numbers, it has {whole.numel()}")
    return whole


def _read(path: Path, place: filesystem._StorageInfo) -> Any:
    with (path / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        data = io.BytesIO(file.read(place.length))
    return torch.load(data, weights_only=True, map_location="cpu")


def _checked(found: Any, folder: Path) -> Metadata:
    """Raises ValueError where a field that reading relies on is of another kind, or a file is not of this folder."""
    if not isinstance(found, Metadata):
        raise ValueError(f"holds {type(found).__name__}")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(
            entry, TensorStorageMetadata | BytesStorageMetadata
        ):
            raise ValueError(f"entry {name!r} is {type(entry).__name__}")
    sizes = {name: entry.bytes for name, entry in manifest(folder).items()}
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise ValueError(f"place of {index!r} is {type(place).__name__}")
        if place.relative_path not in sizes:
            raise ValueError(f"names file {place.relative_path!r}, which its manifest does not")
        last = sizes[place.relative_path] - place.length
        if not 0 <= place.offset <= last or place.length < 0 or place.transform_descriptors:
            raise ValueError(f"{index.fqn} is no part of {place.relative_path}")
    return found


class Planner(DefaultLoadPlanner):
    """Reads entries that are no tensors as plain values: DCP's own would run any code that they name. Every tensor is a
    sign of life."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        CLOCK.beat()
        super().commit_tensor(read_item, tensor)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"entry {name} is no plain value: {reason}; use another checkpoint"
            ) from error
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)
