"""Weights on their way, one transport at a time: what arrives is what was sent, and what does not arrive is said."""

import collections
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlpt.rollout import buckets as packing
from rlpt.rollout import cuda_ipc, spare, wire
from rlpt.rollout.broadcasting import WeightGroup, open_store
from rlpt.rollout.buckets import Bucket, TransferError, buckets, cast, described
from rlpt.rollout.spare import Spare
from rlpt.rollout.transport import Receiver, read_directory, write_directory

MEMBER = Path(__file__).with_name("group_member.py")
CPU = torch.device("cpu")
SHAPES = {"embed": (9, 4), "norm": (4,), "up": (6, 4), "down": (4, 6), "head": (30, 4)}


@pytest.fixture
def named() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of a few tensors; `head` alone is larger than one."""
    monkeypatch.setattr(packing, "BUCKET_BYTES", 256)


def expected(named, dtype: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in named.items()}


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def opened(sent: Iterator[Bucket]) -> dict[str, torch.Tensor]:
    return {name: tensor for bucket in sent for name, tensor in bucket.tensors()}


# ---- buckets and files -----------------------------------------------------------------------------


def test_buckets_hold_the_cast_tensors_in_order_and_within_their_bound(named, dtype: str) -> None:
    sent = list(buckets(named.items(), dtype))
    assert_same(opened(iter(sent)), expected(named, dtype))
    sizes = [packing.bytes_of([bucket.payload]) for bucket in sent]
    whole = packing.bytes_of(expected(named, dtype).values())
    assert sum(sizes) == whole
    assert all(
        size <= 256 or len(b.header.tensors) == 1 for size, b in zip(sizes, sent, strict=True)
    )
    # 144 + 16 + 96 are just within it, in half the precision 72 + 8 + 48 + 48.
    assert sizes == ([256, 96, 480] if dtype == "float32" else [176, 240])


def test_a_bucket_keeps_its_numbers_when_the_trainer_goes_on(named) -> None:
    before = {name: tensor.clone() for name, tensor in named.items()}
    sent = list(buckets(named.items(), "float32"))
    for tensor in named.values():
        tensor.add_(1.0)
    assert_same(opened(iter(sent)), before)


def test_checksums_of_a_bucket_are_of_the_dtype_that_is_sent(named) -> None:
    told = [t for bucket in buckets(named.items(), "bfloat16") for t in bucket.header.tensors]
    assert told == [described(name, t.bfloat16()) for name, t in named.items()]


def test_a_bucket_of_another_size_than_it_says_is_refused(named) -> None:
    bucket = next(buckets(named.items(), "float32"))
    with pytest.raises(TransferError, match=r"63 numbers arrived for tensors of 64.*embed"):
        list(Bucket(bucket.header, bucket.payload[:-1]).tensors())


def test_a_folder_holds_the_cast_tensors_in_files_within_their_bound(
    named, dtype, tmp_path
) -> None:
    told = write_directory(cast(named.items(), dtype), tmp_path / "v1")
    wanted = expected(named, dtype)
    assert told == [described(name, tensor) for name, tensor in wanted.items()]
    files = [load_file(path) for path in sorted((tmp_path / "v1").iterdir())]
    sizes = [packing.bytes_of(held.values()) for held in files]
    assert sizes == ([256, 96, 480] if dtype == "float32" else [176, 240])
    found = dict(read_directory(tmp_path / "v1"))
    assert_same({name: found[name] for name in wanted}, wanted)
    assert len(found) == len(wanted)


def test_a_folder_that_is_not_complete_does_not_have_its_name(named, tmp_path) -> None:
    def broken():
        yield from list(named.items())[:4]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_directory(broken(), tmp_path / "v1")
    with pytest.raises(FileNotFoundError, match=r"v1: no weights there"):
        list(read_directory(tmp_path / "v1"))
    write_directory(named.items(), tmp_path / "v1")
    assert dict(read_directory(tmp_path / "v1")).keys() == named.keys()


def test_a_damaged_file_is_named(named, tmp_path) -> None:
    write_directory(named.items(), tmp_path / "v1")
    second = sorted((tmp_path / "v1").iterdir())[1]
    second.write_bytes(second.read_bytes()[:-50])
    with pytest.raises(TransferError, match=rf"{second.name}: damaged"):
        list(read_directory(tmp_path / "v1"))


# ---- the spare copy --------------------------------------------------------------------------------


@pytest.fixture
def kept(named) -> Iterator[Spare]:
    copy = Spare("127.0.0.1")
    copy.begin(7)
    for bucket in buckets(named.items(), "bfloat16"):
        copy.keep(bucket)
    yield copy
    copy.close()


def test_the_spare_copy_is_fetched_whole_and_again(named, kept: Spare) -> None:
    wanted = expected(named, "bfloat16")
    for _ in range(2):
        assert_same(opened(spare.fetch(kept.place, kept.secret, 5.0)), wanted)
    assert list(kept.tensors) == [described(name, tensor) for name, tensor in wanted.items()]


def test_the_spare_copy_is_for_those_who_know_its_secret(kept: Spare) -> None:
    with pytest.raises(TransferError, match="wrong secret"):
        list(spare.fetch(kept.place, "guessed", 5.0))


def test_a_version_that_is_gone_is_not_mixed_with_the_next(named, kept: Spare) -> None:
    coming = spare.fetch(kept.place, kept.secret, 5.0)
    next(coming)
    kept.begin(8)
    with pytest.raises(TransferError, match=r"bucket 1: the trainer holds version 8 now"):
        list(coming)


def test_a_trainer_that_is_gone_is_an_error_at_once(named) -> None:
    gone = Spare("127.0.0.1")
    place = gone.place
    gone.close()
    with pytest.raises(TransferError, match=rf"{place}: ConnectionRefusedError"):
        list(spare.fetch(place, gone.secret, 5.0))


# ---- broadcast -------------------------------------------------------------------------------------


class Senders:
    """Groups of this process as rank 0, and members in processes of their own."""

    def __init__(self) -> None:
        self.store = open_store("127.0.0.1", 5.0)
        self.members: list[subprocess.Popen] = []

    def join(self, rank: int, size: int, seconds: float = 5.0, name: str = "g") -> wire.Join:
        return wire.Join(
            name=name, host="127.0.0.1", port=self.store.port, rank=rank, size=size, seconds=seconds
        )

    def member(self, join: wire.Join, dies_after: int = -1) -> subprocess.Popen:
        words = [sys.executable, str(MEMBER), join.model_dump_json(), str(dies_after)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.members.append(subprocess.Popen(words, stdout=subprocess.PIPE, env=environment))
        return self.members[-1]

    def group(self, join: wire.Join) -> WeightGroup:
        return WeightGroup(join, CPU, self.store)


@pytest.fixture
def senders() -> Iterator[Senders]:
    made = Senders()
    yield made
    for member in made.members:
        member.kill()
        member.communicate()


def said(member: subprocess.Popen) -> dict:
    return json.loads(member.communicate(timeout=60)[0])


def test_every_member_gets_every_tensor_bit_for_bit(named, senders: Senders) -> None:
    members = [senders.member(senders.join(rank, 3, 30.0)) for rank in (1, 2)]
    group = senders.group(senders.join(0, 3, 30.0))
    for bucket in buckets(named.items(), "bfloat16"):
        group.send(bucket)
    group.end()
    told = [described(name, tensor.bfloat16()) for name, tensor in named.items()]
    wanted = {t.name: ["torch.bfloat16", list(t.shape), t.checksum] for t in told}
    assert [said(member) for member in members] == [wanted, wanted]
    group.close()


def test_a_member_that_never_comes_is_named_within_the_timeout(senders: Senders) -> None:
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(WeightGroup, senders.join(1, 3, 1.0), CPU)
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"group g: member 2 of 3 did not come within 1 s"):
            senders.group(senders.join(0, 3, 1.0))
        assert 1.0 <= time.monotonic() - started < 3.0
        with pytest.raises(TransferError, match="member 2 of 3 did not come within 1 s"):
            there.result()


def test_a_member_that_dies_in_the_middle_ends_the_sending(named, senders: Senders) -> None:
    senders.member(senders.join(1, 2, 30.0), dies_after=1)
    group = senders.group(senders.join(0, 2, 30.0))
    started = time.monotonic()
    endless = itertools.cycle(buckets(named.items(), "float32"))
    with pytest.raises(TransferError, match=r"group g, send at tensor \w+: "):
        # What fits into the system's buffers is sent before anybody notices.
        collections.deque(map(group.send, endless), maxlen=0)
    assert time.monotonic() - started < 15.0


@contextmanager
def listening(senders: Senders, seconds: float) -> Iterator[tuple[WeightGroup, Future]]:
    """A sender, and a member in a thread: what it receives, or why it does not."""

    def receive() -> list[Bucket]:
        return list(WeightGroup(senders.join(1, 2, seconds), CPU).received())

    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive)
        yield senders.group(senders.join(0, 2, seconds)), receiving


def test_a_sender_that_breaks_off_ends_the_receiving_at_once(named, senders: Senders) -> None:
    with listening(senders, 60.0) as (group, receiving):
        group.send(next(buckets(named.items(), "float32")))
        time.sleep(0.2)
        started = time.monotonic()
        group.close()
        with pytest.raises(TransferError, match=r"group g, receive after tensor up: "):
            receiving.result(30.0)
        assert time.monotonic() - started < 10.0


def test_a_sender_that_says_nothing_is_an_error_within_the_timeout(senders: Senders) -> None:
    with listening(senders, 1.0) as (_, receiving):
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"group g, receive before the first tensor: "):
            receiving.result(30.0)
        assert 0.5 < time.monotonic() - started < 10.0


def test_an_engine_outside_the_group_says_so() -> None:
    message = wire.Publish(version=1, transport="broadcast", place="g.2")
    with pytest.raises(TransferError, match=r"in group '', not in 'g.2'"):
        list(Receiver("cpu").read(message))


# ---- ipc, with CUDA's part played by a table -------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Shared memory by handle. The trainer's GPU is its number 3, and the engine's number 0."""
    state = SimpleNamespace(memory={}, trainer="GPU-a", engine="GPU-a", waits=[])

    def share(storage):
        handle = bytes([200, len(state.memory)])
        state.memory[handle] = storage
        return 3, handle, storage.nbytes(), 512, b"counter", 5, b"event", True

    def opened_again(device, handle, size, offset, counter, at, event, sync):
        assert (device, size) == (0, state.memory[handle].nbytes())
        assert (offset, counter, at, event, sync) == (512, b"counter", 5, b"event", True)
        return state.memory[handle]

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", share, raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", opened_again, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", state.waits.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def properties(device):
        # What the trainer shares lies on the CPU here.
        return SimpleNamespace(uuid=state.trainer if device.type == "cpu" else state.engine)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return state


def through_ipc(named, dtype: str) -> Iterator[tuple[Bucket, wire.Publish]]:
    for bucket in buckets(named.items(), dtype):
        message = wire.Publish(
            version=1, transport="ipc", bucket=bucket.header, handle=cuda_ipc.shared(bucket.payload)
        )
        yield bucket, wire.Publish.model_validate_json(message.model_dump_json())


def test_ipc_hands_over_every_tensor_and_the_memory_is_the_trainers_again(
    named, dtype, gpus
) -> None:
    receiver, found = Receiver("cpu"), {}
    for bucket, message in through_ipc(named, dtype):
        for name, tensor in receiver.read(message):
            # The engine has copied it out: what happens to the trainer's memory from here on is its own affair.
            bucket.payload.zero_()
            found[name] = tensor
    assert_same(found, expected(named, dtype))
    # Both sides wait for the GPU, once a bucket: the trainer before it shares, the engine before it answers.
    assert len(gpus.waits) == 2 * len(gpus.memory)


def test_ipc_between_two_gpus_is_refused_with_the_remedy(named, gpus) -> None:
    gpus.engine = "GPU-b"
    _, message = next(through_ipc(named, "float32"))
    with pytest.raises(
        TransferError, match=r"on GPU GPU-a, the engine runs on GPU-b; set .*'directory'"
    ):
        list(Receiver("cpu").read(message))
