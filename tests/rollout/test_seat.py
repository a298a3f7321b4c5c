"""An engine that dies, hangs or lies: its work is done once all the same, or the run says why."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from rlpt.rollout import server as module
from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import EngineClient
from rlpt.rollout.seat import Seat

TIMEOUT = 1.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.02)


@pytest.fixture
def seat_of(fake) -> Iterator:
    """Seats with a fake process; ``prepare`` gets each new backend and the count of starts."""
    made: list[Seat] = []

    def seat(prepare=None, max_restarts: int = 5, timeout: float = TIMEOUT) -> Seat:
        spec = fake.specification()
        process = fake.FakeProcess(spec, prepare)
        client = EngineClient("", fake.TOKEN, "rank", timeout)
        made.append(Seat("engine 0", spec, client, process, 1.0, max_restarts))
        process.start()
        made[-1].open()
        return made[-1]

    yield seat
    for each in made:
        each.close()


def dead(served) -> None:
    served.die()


def failing(served) -> None:
    served.backend.steps_left, served.backend.fault = None, ValueError("a bad step")


def silent(served) -> None:
    """Its threads answer, its model stands still."""
    served.backend.steps_left = 0


def deaf(served) -> None:
    """Its main thread is stuck in a step: no call that needs it is answered."""
    served.backend.steps_left = None
    served.backend.step = lambda: time.sleep(6) or []


@pytest.mark.parametrize("ending", [dead, failing, silent, deaf])
def test_an_engine_that_ends_is_replaced_and_owes_each_group_once(
    seat_of, fake, tmp_path, ending
) -> None:
    # The first life stops when some groups are done and the others are not.
    def prepare(backend, start: int) -> None:
        backend.steps_left = 8 if start == 1 else None

    seat = seat_of(prepare)
    seat.publish(fake.written(tmp_path, 7))
    jobs = [fake.job("t" * n) for n in range(1, 9)]
    done_by_8 = {each.ticket for each in jobs if fake.finished(each, [7] * 8)}
    assert 0 < len(done_by_8) < len(jobs)
    seat.submit(jobs)
    first = fake.polled(seat, len(done_by_8))
    assert seat.restarts == 0
    started = time.monotonic()
    ending(seat.process.now)
    rest = fake.polled(seat, len(jobs) - len(first))
    assert time.monotonic() - started < 3 * TIMEOUT
    assert seat.restarts == seat.process.starts - 1 == 1
    assert not seat.process.lives[0].alive
    # The second life has the weights and was asked for what was owed, once, and for nothing else.
    calls = seat.process.now.backend.calls
    owed = [each.ticket for each in jobs if each.ticket not in done_by_8]
    assert [c for c in calls if c.startswith("load")] == ["load 7"]
    assert calls.index("load 7") < calls.index(f"submit {owed[0]}")
    assert [c.split()[1] for c in calls if c.startswith("submit")] == owed
    found = {one.ticket: one for one in first + rest}
    assert found == {each.ticket: fake.finished(each, [7] * 40) for each in jobs}
    assert len(first) + len(rest) == len(jobs)
    assert fake.nothing_more(seat)


def test_results_that_were_done_and_not_collected_are_sampled_again_not_lost(seat_of, fake) -> None:
    seat = seat_of()
    seat.submit([fake.job("t"), fake.job("tt")])
    while seat.process.now.backend.busy:
        time.sleep(0.01)
    seat.process.now.die()
    assert {one.ticket for one in fake.polled(seat, 2)} == {"t", "tt"}
    assert fake.nothing_more(seat)


@pytest.mark.parametrize("call", ["submit", "cancel", "publish", "counters"])
def test_death_is_found_out_in_whatever_call(seat_of, tmp_path, call, fake) -> None:
    def prepare(backend, start: int) -> None:
        backend.steps_left = 0 if start == 1 else None

    seat = seat_of(prepare)
    seat.publish(fake.written(tmp_path, 1))
    seat.submit([fake.job("old"), fake.job("older")])
    seat.process.now.die()
    calls = {
        "submit": lambda: seat.submit([fake.job("new")]),
        "cancel": lambda: seat.cancel(["old"]),
        "publish": lambda: seat.publish(fake.written(tmp_path, 2)),
        "counters": seat.counters,
    }
    calls[call]()
    assert seat.restarts == 1
    expected = {"old", "older"} - ({"old"} if call == "cancel" else set())
    expected |= {"new"} if call == "submit" else set()
    assert {one.ticket for one in fake.polled(seat, len(expected))} == expected
    version = 2 if call == "publish" else 1
    assert seat.client.describe()[1] == version
    assert f"load {3 - version}" not in seat.process.now.backend.calls
    assert fake.nothing_more(seat)


def test_an_engine_that_dies_while_it_starts_is_started_again(seat_of, fake) -> None:
    seat = seat_of()
    seat.submit([fake.job("t")])
    seat.process.stillborn = {2, 3}
    seat.process.now.die()
    assert fake.polled(seat, 1) == [fake.finished(fake.job("t"), [-1] * 40)]
    assert (seat.restarts, seat.process.starts) == (3, 4)
    seat.process.stillborn = set(range(5, 20))
    seat.submit([fake.job("tt")])
    seat.process.now.die()
    with pytest.raises(RuntimeError, match=r"attempt 6; it was restarted 5 times"):
        fake.polled(seat, 1)


def test_an_engine_that_dies_too_often_ends_the_run(seat_of, fake) -> None:
    seat = seat_of(lambda backend, _: setattr(backend, "fault", ValueError("never")), 3)
    seat.submit([fake.job("t")])
    with pytest.raises(
        RuntimeError, match=r"never; it was restarted 3 times \(engine.vllm.max_restarts\)"
    ):
        fake.polled(seat, 1)
    assert seat.process.starts == 4


def test_standing_still_is_no_death_where_nothing_is_owed(seat_of) -> None:
    seat = seat_of(timeout=0.2)
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        assert seat.poll(0.05) == []
    assert seat.restarts == 0


def test_a_pause_of_the_trainer_is_no_death_of_the_engine(seat_of, fake) -> None:
    """Longer than the timeout between two calls, during which the engine went on."""
    seat = seat_of(lambda backend, _: setattr(backend, "steps_left", 2), timeout=0.3)
    seat.submit([fake.job("t" * 3)])
    seat.poll(0.0)
    time.sleep(0.5)
    backend = seat.process.now.backend
    backend.steps_left = None
    assert len(fake.polled(seat, 1)) == 1
    time.sleep(0.5)
    seat.submit([fake.job("tt")])
    assert len(fake.polled(seat, 1)) == 1
    assert seat.restarts == 0


def test_the_time_of_a_publication_does_not_count_as_standing_still(
    seat_of, tmp_path, fake
) -> None:
    """A broadcast may take longer than the timeout, and the engine makes no step meanwhile."""
    seat = seat_of(lambda backend, _: setattr(backend, "steps_left", 0), timeout=0.5)
    seat.submit([fake.job("t")])
    seat.poll(0.0)
    time.sleep(0.7)
    message = fake.written(tmp_path, 2)
    seat.publish(message, {tensor.name: tensor.checksum for tensor in message.tensors})
    assert seat.poll(0.0) == []
    assert seat.restarts == 0
    seat.process.now.backend.steps_left = None
    assert len(fake.polled(seat, 1)) == 1


def test_slow_engines_live_while_they_make_steps(seat_of, fake) -> None:
    def prepare(backend, _start: int) -> None:
        backend.steps_left = 0

    seat = seat_of(prepare, timeout=0.5)
    seat.submit([fake.job("t" * 4)])
    backend = seat.process.now.backend

    def trickle() -> None:
        for _ in range(14):
            time.sleep(0.15)
            backend.steps_left += 1

    thread = threading.Thread(target=trickle)
    thread.start()
    assert len(fake.polled(seat, 1)) == 1
    thread.join()
    assert seat.restarts == 0


def test_counters_go_on_over_the_lives_of_an_engine(seat_of) -> None:
    seat = seat_of()
    first = seat.counters()
    assert first["prefix_hits"] == 75.0
    seat.process.now.die()
    # What is counted while it dies is what was known of it.
    assert seat.counters()["prefix_hits"] == 75.0
    assert seat.counters()["prefix_hits"] == 150.0


# ---- weights ---------------------------------------------------------------------------------------


def test_a_wrong_checksum_names_engine_version_and_tensor(seat_of, tmp_path, fake) -> None:
    seat = seat_of(lambda backend, _: setattr(backend, "damaged", "up"))
    message = fake.written(tmp_path, 3)
    right = message.tensors[1].checksum
    bad = torch.full((2, 3), 3.0)
    bad[0, 0] += 1
    with pytest.raises(
        RuntimeError,
        match=rf"engine {seat.client.address}, call publish, version 3: tensor up has checksum {checksum(bad)}, "
        rf"the trainer's has {right} \(1 of 2 tensors differ\)",
    ):
        seat.publish(message)
    assert seat.restarts == 0


def test_a_tensor_that_the_trainer_did_not_send_is_noticed(seat_of, tmp_path, fake) -> None:
    seat = seat_of()
    message = fake.written(tmp_path, 3)
    lost = wire.Tensor(name="lost", shape=(2,), checksum=5)
    with pytest.raises(RuntimeError, match=r"call publish: .*lost"):
        seat.publish(message.model_copy(update={"tensors": (*message.tensors, lost)}))
