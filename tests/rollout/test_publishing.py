"""Publications of one rank: every engine ends with the trainer's weights, whatever dies, or the run says why not."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpt import dist
from rlpt.rollout import buckets as packing
from rlpt.rollout import cuda_ipc
from rlpt.rollout import server as serving
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import EngineClient
from rlpt.rollout.live import BroadcastPublisher, IPCPublisher, LivePublisher
from rlpt.rollout.publishing import DirectoryPublisher, Publisher
from rlpt.rollout.seat import Seat
from rlpt.rollout.wire import Handle, Header, Job, Publish

SCRIPT = Path(__file__).with_name("publish_on_ranks.py")
ALONE = dist.World(0, 1, torch.device("cpu"))
SHAPES = {"embed": (9, 4), "norm": (4,), "up": (6, 4), "down": (4, 6)}
SECONDS = 5.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_IDLE", 0.02)
    monkeypatch.setattr(packing, "BUCKET_BYTES", 100)


def weights(version: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.fixture
def seats(fake) -> Iterator:
    """Seats whose fake engines compute in bfloat16; ``prepare`` gets each new backend and the count of starts."""
    made: list[Seat] = []

    def several(count: int, prepare=None) -> list[Seat]:
        spec = fake.specification(dtype="bfloat16")
        for _ in range(count):
            name = f"engine {len(made)}"
            process = fake.FakeProcess(spec, prepare)
            client = EngineClient("", fake.TOKEN, "rank", SECONDS)
            made.append(Seat(name, spec, client, process, 1.0, 3))
            process.start()
            made[-1].open()
        return made[-count:]

    yield several
    for each in made:
        each.close()


def backend(seat: Seat) -> Any:
    process: Any = seat.process
    return process.now.backend


def published(publisher: Publisher, seats: list[Seat], version: int) -> Publish:
    """As `Fleet.publish` does it."""
    message = publisher.send(iter(weights(version).items()), version)
    for seat in seats:
        seat.publish(message, publisher.answered.get(seat.name))
    publisher.sent(version)
    return message


def assert_there(seat: Seat, version: int) -> None:
    held = backend(seat).weights
    assert (backend(seat).version, held.keys()) == (version, SHAPES.keys())
    for name, tensor in weights(version).items():
        assert torch.equal(held[name], tensor.bfloat16()), name


@pytest.fixture
def broadcast() -> Iterator:
    made: list[LivePublisher] = []

    def publisher(seats: list[Seat]) -> BroadcastPublisher:
        made.append(BroadcastPublisher(seats, "bfloat16", "127.0.0.1", SECONDS, ALONE))
        return made[-1]

    yield publisher
    for each in made:
        each.close()


# ---- directory -------------------------------------------------------------------------------------


def test_a_directory_holds_the_version_that_a_restarted_engine_gets(seats, tmp_path) -> None:
    (seat,) = seats(1)
    publisher = DirectoryPublisher(tmp_path / "weights", "bfloat16", ALONE)
    for version in (1, 2):
        published(publisher, [seat], version)
        assert_there(seat, version)
        assert [p.name for p in publisher.folder.iterdir()] == [f"version_{version:06d}"]
    seat.process.kill()
    seat.poll(0.0)
    assert_there(seat, 2)
    publisher.close()
    assert not publisher.folder.exists()


def test_where_writing_fails_every_tensor_is_gathered_all_the_same(tmp_path) -> None:
    (tmp_path / "weights").write_text("a file where the folder is to be")
    publisher = DirectoryPublisher(tmp_path / "weights", "bfloat16", ALONE)
    rest = iter(weights(1).items())
    with pytest.raises(OSError, match="weights"):
        publisher.send(rest, 1)
    # The other ranks of a run stand at every one of them.
    assert next(rest, None) is None


# ---- broadcast -------------------------------------------------------------------------------------


def test_a_broadcast_reaches_all_engines_and_needs_one_group(seats, broadcast) -> None:
    engines = seats(3)
    publisher = broadcast(engines)
    names = set()
    for version in (1, 2):
        message = published(publisher, engines, version)
        for seat in engines:
            assert_there(seat, version)
            names.add(seat.client.group())
        assert {t.name: t.checksum for t in message.tensors} == {
            name: checksum(tensor.bfloat16()) for name, tensor in weights(version).items()
        }
        assert publisher.answered.keys() == {seat.name for seat in engines}
    assert len(names) == 1
    # Once each: nobody was sent the spare copy besides.
    assert [call for call in backend(engines[0]).calls if call.startswith("load")] == [
        "load 1",
        "load 2",
    ]


def test_an_engine_that_died_between_two_broadcasts_is_in_the_next(
    seats, broadcast, capsys
) -> None:
    engines = seats(2)
    publisher = broadcast(engines)
    published(publisher, engines, 1)
    first = engines[0].client.group()
    engines[1].process.kill()
    published(publisher, engines, 2)
    for seat in engines:
        assert_there(seat, 2)
    assert engines[1].restarts == 1
    assert engines[0].client.group() == engines[1].client.group() != first
    # It came back with what it had, and got the new weights with the others.
    assert [call for call in backend(engines[1]).calls if call.startswith("load")] == [
        "load 1",
        "load 2",
    ]
    assert "starting it again" in capsys.readouterr().err


def test_an_engine_that_dies_during_a_step_gets_the_current_weights(seats, broadcast) -> None:
    (seat,) = seats(1)
    publisher = broadcast([seat])
    published(publisher, [seat], 4)
    seat.submit([Job(ticket="t", ids=(1, 2), count=2, seed=3, budget=9)])
    seat.process.kill()
    found = []
    while not found:
        found = seat.poll(0.5)
    assert_there(seat, 4)
    assert {span.version for r in found[0].rollouts for span in r.spans} == {4}


def test_an_engine_that_dies_within_a_broadcast_takes_nobody_along(
    seats, broadcast, capsys
) -> None:
    engines = seats(2)
    process: Any = engines[1].process
    publisher = broadcast(engines)
    published(publisher, engines, 1)

    def dies(named, version: int) -> None:
        next(iter(named))
        process.now.server._receiver.leave()
        process.now.die()
        raise RuntimeError("killed")

    backend(engines[1]).load = dies
    published(publisher, engines, 2)
    assert (engines[0].restarts, engines[1].restarts) == (0, 1)
    assert (
        "publish of version 2 by broadcast: rank 0: engine http://127.0.0.1:"
        in capsys.readouterr().err
    )
    for seat in engines:
        assert_there(seat, 2)
    published(publisher, engines, 3)
    assert publisher.answered.keys() == {"engine 0", "engine 1"}
    for seat in engines:
        assert_there(seat, 3)


def test_a_broadcast_that_fails_while_all_engines_live_ends_the_run(seats, broadcast) -> None:
    engines = seats(2)
    publisher = broadcast(engines)
    published(publisher, engines, 1)

    def refuses(named, version: int) -> None:
        raise ValueError("There is no module or parameter named 'up'")

    backend(engines[1]).load = refuses
    with pytest.raises(RuntimeError) as caught:
        published(publisher, engines, 2)
    address = engines[1].client.address
    assert str(caught.value).startswith(
        f"publish of version 2 by broadcast: rank 0: engine {address}, call publish: ValueError: There is no"
    )


def test_a_group_that_an_engine_cannot_join_is_an_error_with_its_address(
    seats, broadcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = seats(2)
    publisher = broadcast(engines)
    publisher.seconds = 1.0
    process: Any = engines[1].process

    def blocked(message) -> None:
        raise packing.TransferError("no way to the trainer")

    monkeypatch.setattr(process.now.server._receiver, "join", blocked)
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"forming a group for weights: rank 0: engine http"
    ) as caught:
        published(publisher, engines, 1)
    assert time.monotonic() - started < 5.0
    assert "member 2 of 3 did not come within 1 s" in str(caught.value)
    assert engines[1].client.address in str(caught.value)


def test_an_engine_whose_memory_differs_is_named_with_its_tensor(seats, broadcast) -> None:
    engines = seats(2)
    publisher = broadcast(engines)
    backend(engines[1]).damaged = "down"
    with pytest.raises(
        RuntimeError, match=rf"{engines[1].client.address}, call publish, version 1: tensor down "
    ):
        published(publisher, engines, 1)


def test_an_engine_between_two_versions_writes_no_token(seats, broadcast) -> None:
    (seat,) = seats(1)
    publisher = broadcast([seat])
    published(publisher, [seat], 1)
    whole = backend(seat).load

    def breaks(named, version: int) -> None:
        next(iter(named))
        raise ValueError("out of memory")

    backend(seat).load = breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        published(publisher, [seat], 2)
    seat.submit([Job(ticket="t", ids=(1, 2), count=2, seed=3, budget=9)])
    time.sleep(0.2)
    assert seat.client.collect([], 0.0) == ([], 0)
    assert seat.client.describe()[1] == -1
    backend(seat).load = whole
    published(publisher, [seat], 3)
    found = []
    while not found:
        found = seat.poll(0.5)
    assert {span.version for r in found[0].rollouts for span in r.spans} == {3}


# ---- ipc, with CUDA's part played by a table -------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}

    def shared(payload: torch.Tensor) -> Handle:
        held[f"{len(held):02x}"] = payload
        return Handle(
            gpu="g", memory=f"{len(held) - 1:02x}", size=1, offset=0, counter="", counter_offset=0,
            event="", event_sync=False,
        )  # fmt: skip

    def copied(handle: Handle, header: Header) -> packing.Bucket:
        return packing.Bucket(header, held[handle.memory].clone())

    monkeypatch.setattr(cuda_ipc, "shared", shared)
    monkeypatch.setattr(cuda_ipc, "copied", copied)
    monkeypatch.setattr(cuda_ipc, "released", lambda: held.clear())
    return held


def stacking(made, starts: int) -> None:
    """vLLM's own loader adds to what it has; the fake one's replaces."""

    def load(named, version: int) -> None:
        made.calls.append(f"load {version}")
        made.weights |= {name: tensor.clone() for name, tensor in named}
        made.version = version

    made.load = load


def test_ipc_hands_over_bucket_after_bucket_and_ends_with_the_version(seats, table) -> None:
    engines = seats(2, stacking)
    publisher = IPCPublisher(engines, "bfloat16", "127.0.0.1", SECONDS, ALONE)
    published(publisher, engines, 6)
    for seat in engines:
        assert_there(seat, 6)
        # 72 + 8 bytes, 48 + 48 bytes, and the end.
        assert backend(seat).calls == [
            "wake weights",
            "load -1",
            "load -1",
            "load 6",
            "wake kv_cache",
        ]
    assert publisher.answered.keys() == {seat.name for seat in engines}
    assert not table
    publisher.close()


def test_an_engine_that_dies_within_ipc_gets_the_spare_copy(seats, table) -> None:
    engines = seats(2, stacking)
    publisher = IPCPublisher(engines, "bfloat16", "127.0.0.1", SECONDS, ALONE)
    process: Any = engines[0].process
    whole = backend(engines[0]).load

    def dies(named, version: int) -> None:
        whole(named, version)
        process.now.die()

    backend(engines[0]).load = dies
    published(publisher, engines, 2)
    for seat in engines:
        assert_there(seat, 2)
    assert [seat.restarts for seat in engines] == [1, 0]
    publisher.close()
