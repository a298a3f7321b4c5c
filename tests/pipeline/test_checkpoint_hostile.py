"""A checkpoint from elsewhere can be wrong, but it cannot act: nothing that its pickles name is ever called."""

import io
import os
import pickle
import resource
import warnings
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.metadata import Metadata

from rlpt import checkpoint, dist
from rlpt.checkpoint import Progress, Saver
from rlpt.observe import CheckpointConfig
from rlpt_data.strict import UserError


class Acting:
    """What makes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def path(tmp_path: Path, world: dist.World) -> Path:
    with closing(Saver(tmp_path / "run", CheckpointConfig(), world)) as saver:
        saver.save(Progress(step=1), {"part": {"x": torch.ones(3), "rate": 0.5}})
        saver.settle()
    return checkpoint.path_of(tmp_path / "run", 1)


def state() -> dict[str, Any]:
    return {"part": {"x": torch.zeros(3), "rate": 0.0}}


def metadata_of(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def test_an_honest_checkpoint_is_read(path: Path) -> None:
    found = state()
    checkpoint.restore(path, found)
    assert found["part"]["x"].tolist() == [1.0, 1.0, 1.0]
    assert found["part"]["rate"] == 0.5


def hidden(metadata: Metadata, acting: Acting) -> Metadata:
    metadata.planner_data = {"part.x": ("part", acting)}
    return metadata


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_metadata_that_acts_is_refused_by_the_name_of_what_it_calls(
    runs, path: Path, tmp_path: Path, place: str
) -> None:
    acting = Acting(tmp_path / "made")
    content = acting if place == "alone" else hidden(metadata_of(path), acting)
    (path / ".metadata").write_bytes(pickle.dumps(content))
    runs.sealed(path)
    with pytest.raises(UserError, match=r"\.metadata: damaged.*names posix\.mkdir"):
        checkpoint.restore(path, state())
    assert not acting.target.exists()
    # The attack is real: the reader that ours replaces falls for it.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        FileSystemReader(path).read_metadata()
    assert acting.target.exists()


def test_metadata_changes_no_class_of_this_process(runs, path: Path) -> None:
    """A state for the class in the place of one for an instance: `PosixPath.rename` would be another."""

    def word(text: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()

    def named(module: str, name: str) -> bytes:
        return word(module) + word(name) + pickle.STACK_GLOBAL

    changed = b"N}" + word("rename") + named("torch", "Size") + pickle.SETITEM + pickle.TUPLE2
    attack = b"\x80\x04" + named("pathlib", "PosixPath") + changed + pickle.BUILD + pickle.STOP
    (path / ".metadata").write_bytes(attack)
    runs.sealed(path)
    with pytest.raises(UserError, match="gives a state to a type"):
        checkpoint.restore(path, state())
    assert "rename" not in PosixPath.__dict__


def test_a_few_bytes_take_no_gigabyte(runs, path: Path) -> None:
    """An index of the memo, which the unpickler in C keeps an array for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (path / ".metadata").write_bytes(b"\x80\x04Nr" + (1 << 26).to_bytes(4, "little") + b".")
    runs.sealed(path)
    with pytest.raises(UserError, match="holds NoneType"):
        checkpoint.restore(path, state())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19


def with_entry(path: Path, runs, entry: object) -> None:
    """The checkpoint with another pickle in the place of its number."""
    metadata, buffer = metadata_of(path), io.BytesIO()
    torch.save(entry, buffer)
    (index,) = [index for index in metadata.storage_data if index.fqn == "part.rate"]
    file = path / metadata.storage_data[index].relative_path
    offset = file.stat().st_size
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    length = len(buffer.getvalue())
    metadata.storage_data[index] = replace(
        metadata.storage_data[index], offset=offset, length=length
    )
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    runs.sealed(path)


def test_an_entry_that_acts_is_refused_by_its_name(runs, path: Path, tmp_path: Path) -> None:
    acting = Acting(tmp_path / "made")
    with_entry(path, runs, acting)
    with pytest.raises(UserError, match=r"entry part\.rate is no plain value"):
        checkpoint.restore(path, state())
    assert not acting.target.exists()
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        dcp_load(state(), storage_reader=FileSystemReader(path), no_dist=True)
    assert acting.target.exists()


def test_an_entry_of_another_plain_value_is_read_as_it_is(runs, path: Path) -> None:
    with_entry(path, runs, (0.25, None))
    found = state()
    checkpoint.restore(path, found)
    assert found["part"]["rate"] == (0.25, None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"relative_path": "../../../elsewhere"}, "names file '../../../elsewhere'"),
        ({"relative_path": "/etc/passwd"}, "names file '/etc/passwd'"),
        ({"offset": -1}, "part.x is no part of __0_0.distcp"),
        ({"length": 10**12}, "part.x is no part of __0_0.distcp"),
        ({"transform_descriptors": ["zstd"]}, "part.x is no part of __0_0.distcp"),
        ({"offset": "0"}, "damaged"),
    ],
    ids=["up", "root", "before", "beyond", "transformed", "text"],
)
def test_a_place_outside_of_the_files_is_refused_by_name(
    runs, path: Path, changed: dict[str, Any], reason: str
) -> None:
    (path.parents[2] / "elsewhere").write_bytes((path / "__0_0.distcp").read_bytes())
    metadata = metadata_of(path)
    (index,) = [index for index in metadata.storage_data if index.fqn == "part.x"]
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changed)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    runs.sealed(path)
    with pytest.raises(UserError, match=reason):
        checkpoint.restore(path, state())


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_metadata_that_is_none_is_refused_in_one_line(runs, path: Path, content: bytes) -> None:
    (path / ".metadata").write_bytes(content)
    runs.sealed(path)
    with pytest.raises(UserError, match=r"\.metadata: damaged or not of a checkpoint") as refused:
        checkpoint.restore(path, state())
    assert "\n" not in str(refused.value)


def test_a_tensor_of_another_shape_is_refused_in_one_line(path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as refused:
        checkpoint.restore(path, {"part": {"x": torch.zeros(4), "rate": 0.0}})
    assert "\n" not in str(refused.value)
