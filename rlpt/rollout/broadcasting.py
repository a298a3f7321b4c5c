"""Weights through a process group of their own: rank 0 of the trainer sends, engines receive.

The group stands beside whatever default groups its members have (a trainer's ranks, vLLM's own): it is made from a
store directly. Nothing waits longer than its timeout, and a member that breaks off closes its connections, so that with
gloo the others end at once; with NCCL they end with their timeouts. NCCL: not yet run on a GPU.
"""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore

from rlpt.rollout import wire
from rlpt.rollout.buckets import DTYPES, Bucket, TransferError

_POLL = 0.01


def open_store(host: str, seconds: float) -> TCPStore:
    """A store that listens on one address alone, at a free port."""
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
        return TCPStore(
            host, port, None, True, timedelta(seconds=seconds), wait_for_workers=False,
            # The store closes it.
            master_listen_fd=listening.detach(),
        )  # fmt: skip


def own_address(host: str, port: int) -> str:
    """The address of this machine on the way to another one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


class WeightGroup:
    """One sender and its receivers. Every method raises TransferError with the group's name and the reason."""

    def __init__(self, join: wire.Join, device: torch.device, store: Store | None = None) -> None:
        self.name = join.name
        self.device = device
        self.seconds = join.seconds
        self._at = "before the first tensor"
        with self._failing("join"):
            limit = timedelta(seconds=join.seconds)
            store = store or TCPStore(
                join.host, join.port, None, False, limit, wait_for_workers=False
            )
            store = PrefixStore(join.name, store)
            _assemble(store, join)
            make = _nccl if device.type == "cuda" else _gloo
            self._group: Any = make(store, join, limit)

    # ---- sender --------------------------------------------------------------------------------

    def send(self, bucket: Bucket) -> None:
        header = torch.frombuffer(
            bytearray(bucket.header.model_dump_json().encode()), dtype=torch.uint8
        )
        with self._failing("send"):
            self._at = f"at tensor {bucket.header.tensors[0].name}"
            self._broadcast(self._sizes(len(header), len(bucket.payload)))
            self._broadcast(header.to(self.device))
            self._broadcast(bucket.payload.view(torch.uint8))

    def end(self) -> None:
        """There are no more buckets."""
        with self._failing("send"):
            self._at = "after the last tensor"
            self._broadcast(self._sizes(0, 0))

    # ---- receivers -----------------------------------------------------------------------------

    def received(self) -> Iterator[Bucket]:
        while (bucket := self._next()) is not None:
            self._at = f"after tensor {bucket.header.tensors[-1].name}"
            yield bucket
        self._at = "before the first tensor"

    def _next(self) -> Bucket | None:
        with self._failing("receive"):
            header_len, count = self._broadcast(self._sizes(0, 0)).tolist()
            if header_len == 0:
                return None
            text = self._broadcast(self._empty(header_len, torch.uint8))
            header = wire.Header.model_validate_json(text.cpu().numpy().tobytes())
            payload = self._empty(count, DTYPES[header.dtype])
            self._broadcast(payload.view(torch.uint8))
            return Bucket(header, payload)

    # ---- both ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Break off: the others' calls end."""
        group, self._group = self._group, None
        if group is not None:
            # NCCL lets go with this; gloo's connections close when nobody refers to the group any more.
            group.abort()

    def _sizes(self, header_len: int, count: int) -> Tensor:
        return torch.tensor([header_len, count], dtype=torch.int64, device=self.device)

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.device)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        options = torch_dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = limit = timedelta(seconds=self.seconds)
        self._group.broadcast([tensor], options).wait(limit)
        return tensor

    @contextmanager
    def _failing(self, call: str) -> Iterator[None]:
        try:
            yield
        except TransferError:
            raise
        # What torch raises here: DistError and others are RuntimeErrors, a refused connection is an OSError.
        except (RuntimeError, OSError) as error:
            # Without the line of torch's own source before it, and the advice after it.
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
            raise TransferError(f"group {self.name}, {call} {self._at}: {reason}") from error


def _assemble(store: Store, join: wire.Join) -> None:
    """All say that they are there. NCCL itself would wait for the missing without end."""
    store.set(f"here/{join.rank}", "")
    deadline = time.monotonic() + join.seconds
    missing = set(range(join.size))
    while missing := {rank for rank in missing if not store.check([f"here/{rank}"])}:
        if time.monotonic() > deadline:
            raise TransferError(
                f"group {join.name}: {_members(missing)} of {join.size} did not come within {join.seconds:g} s"
            )
        time.sleep(_POLL)


def _members(ranks: set[int]) -> str:
    return "member " + ", ".join(str(rank) for rank in sorted(ranks))


def _gloo(store: Store, join: wire.Join, limit: timedelta) -> Any:
    gloo: Any = torch_dist.ProcessGroupGloo
    options = gloo._Options()
    # The way to the sender; left to itself gloo takes what the host's name resolves to.
    address = own_address(join.host, join.port)
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = limit
    return gloo(store, join.rank, join.size, options)


def _nccl(store: Store, join: wire.Join, limit: timedelta) -> Any:
    """Its watchdog would end the whole process when an engine dies: every wait here has a timeout of its own."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        nccl: Any = torch_dist.ProcessGroupNCCL
        options = nccl.Options()
        # Beyond the waits', so that these find out first.
        options._timeout = 10 * limit
        return nccl(store, join.rank, join.size, options)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
