"""How weights get from a trainer to engine processes, in buckets of bounded size on either side.

directory: safetensors files that every engine can read; always works. broadcast: from the first rank to all engines
through a process group of their own (NCCL between GPUs, gloo between CPUs). ipc: handles of the trainer's CUDA memory,
for engines on the same GPU. spare: what an engine that starts anew fetches where the last two were used.

These are torch's own primitives. vLLM has an interface for this (`WeightTransferConfig(backend=...)`: nccl, ipc,
sparse_nccl, sharded_rdt, nccl_m2n, modelexpress in 0.32), which is not used, for four reasons: none of its backends
works on a CPU or through files (nccl is `PyNcclCommunicator`, ipc is `reduce_tensor` of CUDA tensors, and every update
ends with `torch.accelerator.synchronize`); its dense backends start and finish an update with the layerwise reload,
which leaves the head of a tied model on the old numbers where linears are packed, as vLLM does on a CPU; the trainer's
half imports vLLM into the trainer; and over HTTP its ipc handles are a pickle, which has to be allowed by
VLLM_ALLOW_INSECURE_SERIALIZATION.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlpt.rollout import buckets, cuda_ipc, spare, wire
from rlpt.rollout.broadcasting import WeightGroup
from rlpt.rollout.buckets import Bucket, TransferError, bytes_of, described


def write_directory(named: Iterable[tuple[str, Tensor]], folder: Path) -> list[wire.Tensor]:
    """Safetensors files of bounded size, the folder complete once it has its final name."""
    temporary = folder.with_suffix(".tmp")
    for path in (temporary, folder):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: list[wire.Tensor] = []
    bucket: dict[str, Tensor] = {}
    for name, tensor in named:
        if bucket and bytes_of([*bucket.values(), tensor]) > buckets.BUCKET_BYTES:
            _save(bucket, temporary)
        tensors.append(described(name, tensor))
        bucket[name] = tensor.cpu()
    _save(bucket, temporary)
    temporary.rename(folder)
    return tensors


def _save(bucket: dict[str, Tensor], folder: Path) -> None:
    save_file(bucket, folder / f"weights_{len(list(folder.iterdir())):05d}.safetensors")
    bucket.clear()


def read_directory(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Raises FileNotFoundError where the folder is not there: vLLM itself would ask a hub for it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: no weights there; is the folder visible from the engine's machine?"
        )
    for path in files:
        try:
            with safe_open(path, "pt") as held:
                for name in held.keys():  # noqa: SIM118
                    yield name, held.get_tensor(name)
        except SafetensorError as error:
            raise TransferError(f"{path}: damaged: {error}") from error


class Receiver:
    """The engine's side: the tensors of one publication, however they travel."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._group: WeightGroup | None = None

    @property
    def group_name(self) -> str:
        """Of the group that broadcasts come through; empty where there is none, or it is broken."""
        group = self._group
        return group.name if group is not None else ""

    def join(self, message: wire.Join) -> None:
        """Leave the old group and form a new one. Raises TransferError where the others do not come in time."""
        self.leave()
        self._group = WeightGroup(message, self.device)

    def read(self, message: wire.Publish) -> Iterator[tuple[str, Tensor]]:
        if message.transport == "directory":
            yield from read_directory(Path(message.place))
            return
        for bucket in self._buckets(message):
            yield from bucket.tensors()

    def _buckets(self, message: wire.Publish) -> Iterator[Bucket]:
        if message.transport == "spare":
            yield from spare.fetch(message.place, message.secret, message.seconds)
        elif message.transport == "broadcast":
            yield from self._broadcast(message.place)
        elif message.bucket is not None and message.handle is not None:
            yield cuda_ipc.copied(message.handle, message.bucket)

    def _broadcast(self, name: str) -> Iterator[Bucket]:
        if self._group is None or self._group.name != name:
            raise TransferError(f"the engine is in group {self.group_name!r}, not in {name!r}")
        yield from self._group.received()

    def leave(self) -> None:
        """Break off: the others' calls end."""
        group, self._group = self._group, None
        if group is not None:
            group.close()
