"""How weights get from a trainer to engine processes, one tensor at a time on either side.

directory: safetensors files that every engine can read; always works. broadcast: from the first rank to all engines
through a process group of their own (NCCL between GPUs, gloo between CPUs). ipc: handles of the trainer's CUDA memory,
for engines on the same GPU.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUCKET_BYTES = 1 << 28
"""Most bytes of one file, unless a single tensor has more: what the writer holds at once."""


def cast(named: Iterable[tuple[str, Tensor]], dtype: wire.DType) -> Iterator[tuple[str, Tensor]]:
    """Masters are float32; engines get the dtype they compute in."""
    for name, tensor in named:
        yield name, tensor.to(DTYPES[dtype]).contiguous()


def described(name: str, tensor: Tensor) -> wire.Tensor:
    return wire.Tensor(name=name, shape=tuple(tensor.shape), checksum=checksum(tensor))


def write_directory(named: Iterable[tuple[str, Tensor]], folder: Path) -> list[wire.Tensor]:
    """Safetensors files of bounded size, the folder complete once it has its final name."""
    temporary = folder.with_suffix(".tmp")
    for path in (temporary, folder):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: list[wire.Tensor] = []
    bucket: dict[str, Tensor] = {}
    for name, tensor in named:
        if bucket and _bytes(*bucket.values(), tensor) > BUCKET_BYTES:
            _save(bucket, temporary)
        tensors.append(described(name, tensor))
        bucket[name] = tensor.cpu()
    _save(bucket, temporary)
    temporary.rename(folder)
    return tensors


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
        with safe_open(path, "pt") as held:
            for name in held.keys():  # noqa: SIM118
                yield name, held.get_tensor(name)


def read(message: wire.Publish) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one publication, as the engine's process gets at them."""
    return read_directory(Path(message.place))
