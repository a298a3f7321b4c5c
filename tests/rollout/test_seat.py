"""An engine that dies, hangs, lies or is somebody else's: its work is done once all the same, or the run says why."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

from rlpt.rollout import server as module
from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import EngineClient
from rlpt.rollout.seat import Seat
from rlpt.rollout.wire import Finished, Job, Publish
from rlpt_data.strict import UserError

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


@pytest.fixture
def remote(fake) -> Iterator:
    """A seat at an address, and what is served there."""
    made = []

    def seat(**changes) -> tuple[Seat, object]:
        served = fake.Served(fake.FakeBackend(fake.specification(**changes)))
        client = EngineClient(served.address, fake.TOKEN, "rank", TIMEOUT)
        made.append((Seat("engine 0", fake.specification(), client, None, 1.0, 2), served))
        return made[-1]

    yield seat
    for each, served in made:
        each.client.close()
        served.die()


def job(ticket: str) -> Job:
    return Job(ticket=ticket, ids=(1, 2, len(ticket)), count=3, seed=4, budget=12)


def written(folder, version: int) -> Publish:
    tensors = {name: torch.full((2, 3), float(version)) for name in ("down", "up")}
    place = folder / str(version)
    place.mkdir()
    save_file(tensors, place / "weights.safetensors")
    told = tuple(
        wire.Tensor(name=n, shape=tuple(t.shape), checksum=checksum(t)) for n, t in tensors.items()
    )
    return Publish(version=version, transport="directory", place=str(place), tensors=told)


def polled(seat: Seat, count: int, seconds: float = 20.0) -> list[Finished]:
    found: list[Finished] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline
        found += seat.poll(0.1)
    return found


def nothing_more(seat: Seat) -> bool:
    return not seat.outstanding and seat.load == 0 and seat.poll(0.0) == seat.poll(0.0) == []


# ---- death -----------------------------------------------------------------------------------------


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
    seat.publish(written(tmp_path, 7))
    jobs = [job("t" * n) for n in range(1, 9)]
    done_by_8 = {each.ticket for each in jobs if fake.finished(each, [7] * 8)}
    assert 0 < len(done_by_8) < len(jobs)
    seat.submit(jobs)
    first = polled(seat, len(done_by_8))
    assert seat.restarts == 0
    started = time.monotonic()
    ending(seat.process.now)
    rest = polled(seat, len(jobs) - len(first))
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
    assert nothing_more(seat)


def test_results_that_were_done_and_not_collected_are_sampled_again_not_lost(seat_of, fake) -> None:
    seat = seat_of()
    seat.submit([job("t"), job("tt")])
    while seat.process.now.backend.busy:
        time.sleep(0.01)
    seat.process.now.die()
    assert {one.ticket for one in polled(seat, 2)} == {"t", "tt"}
    assert nothing_more(seat)


@pytest.mark.parametrize("call", ["submit", "cancel", "publish", "counters"])
def test_death_is_found_out_in_whatever_call(seat_of, tmp_path, call) -> None:
    def prepare(backend, start: int) -> None:
        backend.steps_left = 0 if start == 1 else None

    seat = seat_of(prepare)
    seat.publish(written(tmp_path, 1))
    seat.submit([job("old"), job("older")])
    seat.process.now.die()
    calls = {
        "submit": lambda: seat.submit([job("new")]),
        "cancel": lambda: seat.cancel(["old"]),
        "publish": lambda: seat.publish(written(tmp_path, 2)),
        "counters": seat.counters,
    }
    calls[call]()
    assert seat.restarts == 1
    expected = {"old", "older"} - ({"old"} if call == "cancel" else set())
    expected |= {"new"} if call == "submit" else set()
    assert {one.ticket for one in polled(seat, len(expected))} == expected
    version = 2 if call == "publish" else 1
    assert seat.client.describe()[1] == version
    assert f"load {3 - version}" not in seat.process.now.backend.calls
    assert nothing_more(seat)


def test_an_engine_that_dies_while_it_starts_is_started_again(seat_of, fake) -> None:
    seat = seat_of()
    seat.submit([job("t")])
    seat.process.stillborn = {2, 3}
    seat.process.now.die()
    assert polled(seat, 1) == [fake.finished(job("t"), [-1] * 40)]
    assert (seat.restarts, seat.process.starts) == (3, 4)
    seat.process.stillborn = set(range(5, 20))
    seat.submit([job("tt")])
    seat.process.now.die()
    with pytest.raises(RuntimeError, match=r"attempt 6; it was restarted 5 times"):
        polled(seat, 1)


def test_an_engine_that_dies_too_often_ends_the_run(seat_of) -> None:
    seat = seat_of(lambda backend, _: setattr(backend, "fault", ValueError("never")), 3)
    seat.submit([job("t")])
    with pytest.raises(
        RuntimeError, match=r"never; it was restarted 3 times \(engine.vllm.max_restarts\)"
    ):
        polled(seat, 1)
    assert seat.process.starts == 4


def test_standing_still_is_no_death_where_nothing_is_owed(seat_of) -> None:
    seat = seat_of(timeout=0.2)
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        assert seat.poll(0.05) == []
    assert seat.restarts == 0


def test_a_pause_of_the_trainer_is_no_death_of_the_engine(seat_of) -> None:
    """Longer than the timeout between two calls, during which the engine went on."""
    seat = seat_of(lambda backend, _: setattr(backend, "steps_left", 2), timeout=0.3)
    seat.submit([job("t" * 3)])
    seat.poll(0.0)
    time.sleep(0.5)
    backend = seat.process.now.backend
    backend.steps_left = None
    assert len(polled(seat, 1)) == 1
    time.sleep(0.5)
    seat.submit([job("tt")])
    assert len(polled(seat, 1)) == 1
    assert seat.restarts == 0


def test_the_time_of_a_publication_does_not_count_as_standing_still(seat_of, tmp_path) -> None:
    """A broadcast may take longer than the timeout, and the engine makes no step meanwhile."""
    seat = seat_of(lambda backend, _: setattr(backend, "steps_left", 0), timeout=0.5)
    seat.submit([job("t")])
    seat.poll(0.0)
    time.sleep(0.7)
    message = written(tmp_path, 2)
    seat.publish(message, {tensor.name: tensor.checksum for tensor in message.tensors})
    assert seat.poll(0.0) == []
    assert seat.restarts == 0
    seat.process.now.backend.steps_left = None
    assert len(polled(seat, 1)) == 1


def test_slow_engines_live_while_they_make_steps(seat_of) -> None:
    def prepare(backend, _start: int) -> None:
        backend.steps_left = 0

    seat = seat_of(prepare, timeout=0.5)
    seat.submit([job("t" * 4)])
    backend = seat.process.now.backend

    def trickle() -> None:
        for _ in range(14):
            time.sleep(0.15)
            backend.steps_left += 1

    thread = threading.Thread(target=trickle)
    thread.start()
    assert len(polled(seat, 1)) == 1
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


def test_a_wrong_checksum_names_engine_version_and_tensor(seat_of, tmp_path) -> None:
    seat = seat_of(lambda backend, _: setattr(backend, "damaged", "up"))
    message = written(tmp_path, 3)
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


def test_a_tensor_that_the_trainer_did_not_send_is_noticed(seat_of, tmp_path) -> None:
    seat = seat_of()
    message = written(tmp_path, 3)
    lost = wire.Tensor(name="lost", shape=(2,), checksum=5)
    with pytest.raises(RuntimeError, match=r"call publish: .*lost"):
        seat.publish(message.model_copy(update={"tensors": (*message.tensors, lost)}))


# ---- somebody else's engine --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "Qwen3ForCausalLM"}, "architecture 'Qwen3ForCausalLM' instead of 'Llama"),
        ({"vocabulary": 98}, "vocabulary 98 instead of 97"),
        ({"tokenizer": "beef"}, "tokenizer 'beef' instead of 'f00d'"),
        ({"longest": 63}, "room for paths of 63 tokens instead of 64"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' instead of 'float32'"),
    ],
)
def test_an_engine_of_another_policy_is_refused_in_one_line(remote, changes, told) -> None:
    seat, served = remote(**changes)
    with pytest.raises(UserError) as error:
        seat.open()
    line = str(error.value)
    assert line.startswith(f"engine {served.address}: runs another policy: {told}")
    assert line.endswith("; start it with this run's config")
    assert "\n" not in line


def test_an_address_where_nobody_listens_is_a_mistake_with_a_remedy(remote) -> None:
    seat, served = remote()
    served.die()
    with pytest.raises(UserError) as error:
        seat.open()
    line = str(error.value)
    assert line.startswith(f"engine {served.address}, call describe: ConnectionRefusedError")
    assert "correct engine.vllm.addresses" in line
    assert "\n" not in line


def test_a_wrong_token_is_a_mistake(remote) -> None:
    seat, _ = remote()
    seat.client.token = "guess"
    with pytest.raises(UserError, match=r"call describe: wrong token"):
        seat.open()


def test_work_that_an_earlier_life_of_this_rank_asked_for_is_dropped_at_the_start(remote) -> None:
    seat, served = remote()
    served.backend.steps_left = 0
    seat.client.submit([job("stale")])
    seat.open()
    served.backend.steps_left = None
    seat.submit([job("t")])
    assert [one.ticket for one in polled(seat, 1)] == ["t"]
    assert "cancel stale" in served.backend.calls


def test_an_engine_that_somebody_else_restarts_gets_weights_and_work(
    remote, fake, tmp_path
) -> None:
    seat, served = remote()
    seat.open()
    seat.publish(written(tmp_path, 5))
    served.backend.steps_left = 0
    seat.submit([job("t")])
    served.die()
    again = fake.Served(fake.FakeBackend(fake.specification()))
    # As if at the same address.
    seat.client.address = again.address
    try:
        assert polled(seat, 1) == [fake.finished(job("t"), [5] * 40)]
        assert again.backend.version == 5
    finally:
        again.die()


@pytest.mark.parametrize(("has", "loads"), [(5, []), (4, ["load 5"])])
def test_of_several_ranks_at_one_engine_the_first_to_need_it_sends_the_weights(
    remote, tmp_path, has, loads
) -> None:
    """A rank that publishes nothing heals an engine whose weights are old, and leaves one alone that has the new."""
    seat, served = remote()
    seat.publishes = False
    seat.open()
    seat.weights = written(tmp_path, 5)
    served.backend.version = has
    seat.revive("a connection was lost")
    assert [call for call in served.backend.calls if call.startswith("load")] == loads


def test_an_engine_that_does_not_come_back_ends_the_run_in_time(remote) -> None:
    seat, served = remote()
    seat.open()
    served.die()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"it did not come back within 1 s \(engine.vllm.start"):
        seat.poll(0.1)
    assert time.monotonic() - started < 4.0


def test_leaving_an_engine_that_stays_drops_the_work_of_this_rank(remote) -> None:
    seat, served = remote()
    seat.open()
    served.backend.steps_left = 0
    seat.submit([job("t")])
    seat.close()
    assert served.backend.calls[-1] == "cancel t"
    assert served.alive
