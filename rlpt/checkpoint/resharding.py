"""A checkpoint rewritten as another number of ranks would have saved it.

No run needs it: whatever the number of ranks, each reads the parts it holds. It is for readers elsewhere: a save of 512
ranks as a few large files where opening files is slow, or a save of one rank as many where several readers share it.
"""

import shutil
import tempfile
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty

from rlpt import dist
from rlpt.checkpoint import folders
from rlpt.checkpoint.choosing import check_intact
from rlpt.checkpoint.keeping import HERE
from rlpt.checkpoint.metadata import Reader, entries
from rlpt.checkpoint.reading import files, read_into
from rlpt.checkpoint.saving import Saver
from rlpt.observe import CheckpointConfig
from rlpt_data.strict import UserError


def resharded(reference: str, ranks: int, out: Path) -> Path:
    """Write `RUN@STEP` into the run folder ``out`` as ``ranks`` ranks would have, its configuration beside it.

    Every tensor is read again and compared bit for bit. Raises UserError where it cannot be read, or ``out`` exists.
    """
    source = folders.find(reference)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    # New hashes would make what is damaged look whole.
    check_intact(source, HERE)
    Reader(source).read_metadata()
    out.mkdir(parents=True)
    config = source.parents[1] / "config.json"
    if config.is_file():
        shutil.copyfile(config, out / "config.json")
    with tempfile.TemporaryDirectory() as meeting:
        words = (ranks, str(source), str(out), f"{meeting}/store")
        torch.multiprocessing.spawn(_rank, words, nprocs=ranks)
    target = folders.path_of(out, folders.read_progress(source).step)
    _compare(source, target)
    return target


def _rank(rank: int, ranks: int, source: str, out: str, meeting: str) -> None:
    store = torch_dist.FileStore(meeting, ranks)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world = dist.World(rank, ranks, torch.device("cpu"))
    path = Path(source)
    state = _sharded(path, world)
    read_into(state, path)
    # Files of single ranks are read by all, whatever their names.
    own = {Path(file).name: data for file, data in files(path, "supply_") if world.is_main}
    with closing(Saver(Path(out), CheckpointConfig(), world)) as saver:
        # The journals stay with the run: here there are none to be cut back to.
        saver.write(replace(folders.read_progress(path), journals={}), state, own)
        saver.settle()
    torch_dist.destroy_process_group()


def _sharded(path: Path, world: dist.World) -> dict[str, Any]:
    """Room for every entry by its full name, tensors split along their first axis."""
    mesh = init_device_mesh("cpu", (world.size,))
    state: dict[str, Any] = {}
    for name, entry in Reader(path).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            state[name] = None
        elif not entry.size:
            state[name] = torch.empty((), dtype=entry.properties.dtype)
        else:
            dtype = entry.properties.dtype
            state[name] = empty(entry.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    return state


def _compare(source: Path, target: Path) -> None:
    with warnings.catch_warnings():
        # Of the storage that bits are compared in.
        warnings.simplefilter("ignore")
        found = dict(entries(target))
        for name, value in entries(source):
            assert _bits(found.pop(name)) == _bits(value), f"{target}: {name} differs"
        assert not found, f"{target}: also has {sorted(found)}"


def _bits(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.shape, value.dtype, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
