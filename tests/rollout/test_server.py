"""An engine process seen from outside, over real HTTP: every group once, nobody else's, and an answer to every call."""

import http.client
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlpt.rollout import server as module
from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import EngineClient, EngineDownError, RefusedError
from rlpt.rollout.wire import Finished, Job, Publish


@pytest.fixture
def served(fake, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setattr(module, "_IDLE", 0.02)
    one = fake.Served(fake.FakeBackend(fake.specification()))
    yield one
    one.die()


@pytest.fixture
def connect(served, fake) -> Iterator:
    """Clients by name."""
    made: list[EngineClient] = []

    def client(name: str = "a", token: str = fake.TOKEN, timeout: float = 5.0) -> EngineClient:
        made.append(EngineClient(served.address, token, name, timeout))
        return made[-1]

    yield client
    for each in made:
        each.close()


def job(ticket: str, count: int = 3, budget: int = 9, prediction: int = 0, seed: int = 5) -> Job:
    ids = (1, 2, 3, len(ticket))
    return Job(ticket=ticket, ids=ids, count=count, seed=seed, budget=budget, prediction=prediction)


def gathered(client: EngineClient, count: int) -> list[Finished]:
    """``count`` groups, each acknowledged with the call after it."""
    found: list[Finished] = []
    arrived: list[str] = []
    deadline = time.monotonic() + 10
    while len(found) < count:
        assert time.monotonic() < deadline
        done, _ = client.collect(arrived, 1.0)
        arrived = [one.ticket for one in done]
        found += done
    client.collect(arrived, 0.0)
    return found


def written(folder, version: int, **tensors: torch.Tensor) -> Publish:
    place = folder / str(version)
    place.mkdir()
    save_file(tensors, place / "weights.safetensors")
    told = tuple(
        wire.Tensor(name=n, shape=tuple(t.shape), checksum=checksum(t)) for n, t in tensors.items()
    )
    return Publish(version=version, transport="directory", place=str(place), tensors=told)


def posted(served, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.putrequest("POST", path)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


# ---- work ----------------------------------------------------------------------------------------


def test_what_comes_back_is_what_the_backend_sampled(connect, fake) -> None:
    client = connect()
    jobs = [job("t"), job("tt", prediction=4), job("ttt", count=1, budget=1)]
    client.submit(jobs)
    found = {one.ticket: one for one in gathered(client, 3)}
    assert found == {each.ticket: fake.finished(each, [-1] * 40) for each in jobs}
    lengths = [len(r.thought) for r in found["t"].rollouts]
    assert len(set(lengths)) > 1, "the fake closes too regularly to be a test"


def test_a_group_stays_until_it_is_acknowledged_and_is_gone_then(connect) -> None:
    client = connect()
    client.submit([job("t")])
    first, steps = client.collect([], 5.0)
    again, still = client.collect([], 5.0)
    assert [one.ticket for one in first] == ["t"]
    # A lost answer costs nothing: the result is told again, and no step was made for it.
    assert (again, still) == (first, steps)
    assert steps == max(len(r.thought) for r in first[0].rollouts)
    assert client.collect(["t"], 0.0) == ([], steps)
    assert client.collect([], 0.0) == ([], steps)


def test_a_repeated_submit_is_ignored_under_way_and_done(served, connect) -> None:
    client = connect()
    served.backend.steps_left = 0
    for _ in range(3):
        client.submit([job("t"), job("tt")])
    served.backend.steps_left = None
    assert len(gathered(client, 2)) == 2
    client.submit([job("u")])
    done, _ = client.collect([], 5.0)
    client.submit([job("u")])
    assert served.backend.calls == ["submit t", "submit tt", "submit u"]
    assert client.collect([], 0.0)[0] == done


def test_clients_do_not_see_each_others_work(connect) -> None:
    one, other = connect("a"), connect("b")
    one.submit([job("t")])
    other.submit([job("u"), job("uu")])
    assert {found.ticket for found in gathered(other, 2)} == {"u", "uu"}
    # Tickets are a client's own: acknowledging and cancelling another's changes nothing.
    other.collect(["t"], 0.0)
    other.cancel(["t"])
    other.forget()
    assert [found.ticket for found in gathered(one, 1)] == ["t"]


def test_a_cancelled_job_is_dropped_wherever_it_stands(served, connect) -> None:
    client = connect()
    client.submit([job("done")])
    client.collect([], 5.0)
    served.backend.steps_left = 0
    client.submit([job("open"), job("kept")])
    client.cancel(["done", "open", "never"])
    assert served.backend.calls[-1:] == ["cancel open"]
    served.backend.steps_left = None
    assert [one.ticket for one in gathered(client, 1)] == ["kept"]


def test_a_client_that_starts_anew_is_forgotten_whole_and_alone(served, connect) -> None:
    one, other = connect("a"), connect("b")
    one.submit([job("done")])
    one.collect([], 5.0)
    served.backend.steps_left = 0
    one.submit([job("open")])
    other.submit([job("theirs")])
    one.forget()
    served.backend.steps_left = None
    assert [each.ticket for each in gathered(other, 1)] == ["theirs"]
    assert one.collect([], 0.0)[0] == []
    one.submit([job("done")])
    assert [each.ticket for each in gathered(one, 1)] == ["done"]


def test_a_call_for_results_returns_as_soon_as_one_arrives(served, connect) -> None:
    client = connect(timeout=20.0)
    waited: list[float] = []

    def wait() -> None:
        started = time.monotonic()
        assert [one.ticket for one in client.collect([], 15.0)[0]] == ["t"]
        waited.append(time.monotonic() - started)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    connect("a").submit([job("t")])
    thread.join(10)
    assert waited
    assert 0.3 <= waited[0] < 3.0


def test_a_call_for_results_waits_no_longer_than_it_was_told(connect) -> None:
    started = time.monotonic()
    assert connect().collect([], 0.3) == ([], 0)
    assert 0.3 <= time.monotonic() - started < 3.0


# ---- weights -------------------------------------------------------------------------------------


def test_a_publication_in_flight_changes_the_version_in_the_middle_of_a_rollout(
    served, connect, fake, tmp_path
) -> None:
    client = connect()
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    asked = next(
        each
        for seed in range(50)
        if len(wire_ids(fake.sampled(each := job("t", 1, 9, 3, seed), 0, [1, 1, 2] + [3] * 20))) > 6
    )
    client.publish(written(tmp_path, 1, w=weight))
    for version, steps in ((1, 2), (2, 1), (3, None)):
        if version > 1:
            client.publish(written(tmp_path, version, w=weight * version))
        served.backend.steps_left = steps
        if version == 1:
            client.submit([asked])
        while served.backend.steps_left:
            time.sleep(0.01)
    (found,) = gathered(client, 1)
    assert found == fake.finished(asked, [1, 1, 2] + [3] * 20)
    rollout = wire.rollout(found.rollouts[0], fake.CLOSER)
    versions = rollout.version[rollout.action]
    assert versions.tolist() == [1, 1, 2] + [3] * (len(versions) - 3)
    assert np.array_equal(served.backend.weights["w"], weight * 3)
    assert client.describe()[1] == 3


def wire_ids(sampled) -> tuple[int, ...]:
    return (*sampled.thought, *sampled.prediction)


def test_a_publication_wakes_weights_before_it_and_the_cache_after_it(
    served, connect, tmp_path
) -> None:
    client = connect()
    client.sleep()
    message = written(tmp_path, 4, w=torch.ones(2), v=torch.zeros(3, 1))
    told = client.publish(message)
    assert served.backend.calls == ["sleep", "wake weights", "load 4", "wake kv_cache"]
    assert told == {tensor.name: tensor.checksum for tensor in message.tensors}


def test_the_checksum_is_read_from_the_engines_memory(served, connect, tmp_path) -> None:
    served.backend.damaged = "w"
    message = written(tmp_path, 4, v=torch.zeros(3, 1), w=torch.ones(2))
    told = connect().publish(message)
    assert told["w"] == checksum(torch.tensor([2.0, 1.0]))
    assert told["v"] == checksum(torch.zeros(3, 1))


def test_weights_that_are_not_there_are_refused_and_the_engine_lives(connect, tmp_path) -> None:
    client = connect()
    with pytest.raises(RefusedError, match=r"call publish: .*no weights there"):
        client.publish(Publish(version=1, transport="directory", place=str(tmp_path / "none")))
    client.submit([job("t")])
    assert len(gathered(client, 1)) == 1


# ---- mistakes and faults -------------------------------------------------------------------------


def test_a_wrong_token_is_refused_whatever_the_call(served, connect) -> None:
    with pytest.raises(RefusedError, match=r"call describe: wrong token"):
        connect(token="guess").describe()
    assert posted(served, "/describe", b"{}")[0] == 401
    assert served.backend.calls == []


def test_a_refused_connection_can_be_used_again(served, connect, fake) -> None:
    client = connect(token="guess")
    with pytest.raises(RefusedError):
        client.describe()
    client.token = fake.TOKEN
    assert client.describe() == (served.backend.spec, -1)


def test_anybody_may_ask_whether_it_lives(served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (200, {"failure": None})
    connection.close()


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/dance", b"{}", "dance"),
        ("/_submit", b"{}", "_submit"),
        ("/submit", b"{", "JSONDecodeError"),
        ("/submit", b"[]", "no JSON object"),
        ("/forget", b'"a"', "no JSON object"),
        ("/forget", b"{}", "client"),
        ("/submit", b'{"client": "a"}', "jobs"),
        ("/submit", b'{"client": "a", "jobs": [], "more": 1}', "more"),
        ("/collect", b'{"client": "a", "wait": "long"}', "wait"),
        ("/publish", b'{"version": 1, "transport": "pigeon"}', "transport"),
        ("/submit", b'"\xff"', "UnicodeDecodeError"),
    ],
)
def test_a_wrong_message_is_an_error_of_the_call_and_not_of_the_engine(
    served, connect, fake, path, body, error
) -> None:
    status, told = posted(served, path, body, Authorization=f"Bearer {fake.TOKEN}")
    assert status == 400
    assert error in told["error"]
    connect().submit([job("t")])
    assert len(gathered(connect(), 1)) == 1


@pytest.mark.parametrize("length", [str(2**30 + 1), "-1", "many"])
def test_a_message_of_impossible_length_is_not_even_read(served, fake, length) -> None:
    allowed = {"Authorization": f"Bearer {fake.TOKEN}", "Content_Length": length}
    status, told = posted(served, "/submit", b"", **{"Content-Length": length} | allowed)
    assert status == 401
    assert "too large" in told["error"]


def test_a_job_that_the_backend_refuses_says_so(connect) -> None:
    wrong = Job(ticket="t", ids=(1, 500), count=1, seed=0, budget=3)
    with pytest.raises(RefusedError, match=r"call submit: ValueError: job t: an id that nobody"):
        connect().submit([wrong])


def test_an_error_of_the_engine_answers_every_call_with_its_text(served, connect) -> None:
    client, waiting = connect(), connect("b")
    told: list[str] = []

    def wait() -> None:
        with pytest.raises(EngineDownError) as error:
            waiting.collect([], 10.0)
        told.append(str(error.value))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    served.backend.fault = ZeroDivisionError("out of luck")
    client.submit([job("t")])
    thread.join(5)
    calls = {
        "describe": client.describe,
        "submit": lambda: client.submit([job("u")]),
        "collect": lambda: client.collect([], 5.0),
        "counters": client.counters,
        "forget": client.forget,
    }
    for name, call in calls.items():
        with pytest.raises(EngineDownError, match=f"{name}: .*ZeroDivisionError: out of luck"):
            call()
    assert len(told) == 1
    assert "ZeroDivisionError: out of luck" in told[0]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 503
    connection.close()


def test_a_stopped_engine_takes_no_more_work(served, connect) -> None:
    client = connect()
    client.describe()
    served.server.stop()
    served.thread.join(5)
    assert not served.thread.is_alive()
    with pytest.raises(EngineDownError, match="the engine was stopped"):
        client.submit([job("t")])


def test_a_dead_engine_is_down(served, connect) -> None:
    client = connect()
    client.describe()
    served.die()
    for _ in range(2):
        with pytest.raises(EngineDownError, match=f"engine {served.address}, call describe: "):
            client.describe()


def test_an_engine_that_does_not_answer_is_down_after_the_timeout(served, connect) -> None:
    client = connect(timeout=0.3)
    free = threading.Event()
    served.backend.counters = lambda: {"woken": float(free.wait(5))}
    started = time.monotonic()
    with pytest.raises(EngineDownError, match=r"call counters: no answer within 0.3 s"):
        client.counters()
    assert 0.3 <= time.monotonic() - started < 2.0
    free.set()
    assert client.describe()[1] == -1


def test_a_call_from_every_rank_at_once_is_answered(served, connect) -> None:
    served.backend.steps_left = 0
    clients = [connect(f"c{i}", timeout=20.0) for i in range(64)]
    threads = [
        threading.Thread(target=client.submit, args=([job(f"t{i}", 1, 2)],))
        for i, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    served.backend.steps_left = None
    found = [[one.ticket for one in gathered(client, 1)] for client in clients]
    assert found == [[f"t{i}"] for i in range(64)]


def test_counters_are_the_backends_and_the_servers(connect) -> None:
    client = connect()
    client.submit([job("t")])
    (found,) = gathered(client, 1)
    told = client.counters()
    assert (told["prefix_queries"], told["prefix_hits"]) == (100.0, 75.0)
    assert told["tokens"] == sum(len(r.thought) for r in found.rollouts)
    assert told["busy"] >= 0.0
    assert told["idle"] > 0.0
