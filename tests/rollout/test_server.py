"""Work of an engine process seen from outside, over real HTTP: every group once, nobody else's, of the weights of the
time."""

import threading
import time

import numpy as np
import pytest
import torch

from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import RefusedError
from rlpt.rollout.wire import Publish

# ---- work ----------------------------------------------------------------------------------------


def test_what_comes_back_is_what_the_backend_sampled(connect, fake) -> None:
    client = connect()
    jobs = [fake.job("t"), fake.job("tt", prediction=4), fake.job("ttt", count=1, budget=1)]
    client.submit(jobs)
    found = {one.ticket: one for one in fake.gathered(client, 3)}
    assert found == {each.ticket: fake.finished(each, [-1] * 40) for each in jobs}
    lengths = [len(r.thought) for r in found["t"].rollouts]
    assert len(set(lengths)) > 1, "the fake closes too regularly to be a test"


def test_a_group_stays_until_it_is_acknowledged_and_is_gone_then(connect, fake) -> None:
    client = connect()
    client.submit([fake.job("t")])
    first, steps = client.collect([], 5.0)
    again, still = client.collect([], 5.0)
    assert [one.ticket for one in first] == ["t"]
    # A lost answer costs nothing: the result is told again, and no step was made for it.
    assert (again, still) == (first, steps)
    assert steps == max(len(r.thought) for r in first[0].rollouts)
    assert client.collect(["t"], 0.0) == ([], steps)
    assert client.collect([], 0.0) == ([], steps)


def test_a_repeated_submit_is_ignored_under_way_and_done(served, connect, fake) -> None:
    client = connect()
    served.backend.steps_left = 0
    for _ in range(3):
        client.submit([fake.job("t"), fake.job("tt")])
    served.backend.steps_left = None
    assert len(fake.gathered(client, 2)) == 2
    client.submit([fake.job("u")])
    done, _ = client.collect([], 5.0)
    client.submit([fake.job("u")])
    assert served.backend.calls == ["submit t", "submit tt", "submit u"]
    assert client.collect([], 0.0)[0] == done


def test_clients_do_not_see_each_others_work(connect, fake) -> None:
    one, other = connect("a"), connect("b")
    one.submit([fake.job("t")])
    other.submit([fake.job("u"), fake.job("uu")])
    assert {found.ticket for found in fake.gathered(other, 2)} == {"u", "uu"}
    # Tickets are a client's own: acknowledging and cancelling another's changes nothing.
    other.collect(["t"], 0.0)
    other.cancel(["t"])
    other.forget()
    assert [found.ticket for found in fake.gathered(one, 1)] == ["t"]


def test_a_cancelled_job_is_dropped_wherever_it_stands(served, connect, fake) -> None:
    client = connect()
    client.submit([fake.job("done")])
    client.collect([], 5.0)
    served.backend.steps_left = 0
    client.submit([fake.job("open"), fake.job("kept")])
    client.cancel(["done", "open", "never"])
    assert served.backend.calls[-1:] == ["cancel open"]
    served.backend.steps_left = None
    assert [one.ticket for one in fake.gathered(client, 1)] == ["kept"]


def test_a_client_that_starts_anew_is_forgotten_whole_and_alone(served, connect, fake) -> None:
    one, other = connect("a"), connect("b")
    one.submit([fake.job("done")])
    one.collect([], 5.0)
    served.backend.steps_left = 0
    one.submit([fake.job("open")])
    other.submit([fake.job("theirs")])
    one.forget()
    served.backend.steps_left = None
    assert [each.ticket for each in fake.gathered(other, 1)] == ["theirs"]
    assert one.collect([], 0.0)[0] == []
    one.submit([fake.job("done")])
    assert [each.ticket for each in fake.gathered(one, 1)] == ["done"]


def test_a_call_for_results_returns_as_soon_as_one_arrives(served, connect, fake) -> None:
    client = connect(timeout=20.0)
    waited: list[float] = []

    def wait() -> None:
        started = time.monotonic()
        assert [one.ticket for one in client.collect([], 15.0)[0]] == ["t"]
        waited.append(time.monotonic() - started)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    connect("a").submit([fake.job("t")])
    thread.join(10)
    assert waited
    assert 0.3 <= waited[0] < 3.0


def test_a_call_for_results_waits_no_longer_than_it_was_told(connect) -> None:
    started = time.monotonic()
    assert connect().collect([], 0.3) == ([], 0)
    assert 0.3 <= time.monotonic() - started < 3.0


def test_a_call_from_every_rank_at_once_is_answered(served, connect, fake) -> None:
    served.backend.steps_left = 0
    clients = [connect(f"c{i}", timeout=20.0) for i in range(64)]
    threads = [
        threading.Thread(target=client.submit, args=([fake.job(f"t{i}", 1, 2)],))
        for i, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    served.backend.steps_left = None
    found = [[one.ticket for one in fake.gathered(client, 1)] for client in clients]
    assert found == [[f"t{i}"] for i in range(64)]


def test_counters_are_the_backends_and_the_servers(connect, fake) -> None:
    client = connect()
    client.submit([fake.job("t")])
    (found,) = fake.gathered(client, 1)
    told = client.counters()
    assert (told["prefix_queries"], told["prefix_hits"]) == (100.0, 75.0)
    assert told["tokens"] == sum(len(r.thought) for r in found.rollouts)
    assert told["busy"] >= 0.0
    assert told["idle"] > 0.0


# ---- weights -------------------------------------------------------------------------------------


def test_a_publication_in_flight_changes_the_version_in_the_middle_of_a_rollout(
    served, connect, fake, tmp_path
) -> None:
    client = connect()
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    asked = next(
        each
        for seed in range(50)
        if len(
            wire_ids(fake.sampled(each := fake.job("t", 1, 9, 3, seed), 0, [1, 1, 2] + [3] * 20))
        )
        > 6
    )
    client.publish(fake.written(tmp_path, 1, w=weight))
    for version, steps in ((1, 2), (2, 1), (3, None)):
        if version > 1:
            client.publish(fake.written(tmp_path, version, w=weight * version))
        served.backend.steps_left = steps
        if version == 1:
            client.submit([asked])
        while served.backend.steps_left:
            time.sleep(0.01)
    (found,) = fake.gathered(client, 1)
    assert found == fake.finished(asked, [1, 1, 2] + [3] * 20)
    rollout = wire.rollout(found.rollouts[0], fake.CLOSER)
    versions = rollout.version[rollout.action]
    assert versions.tolist() == [1, 1, 2] + [3] * (len(versions) - 3)
    assert np.array_equal(served.backend.weights["w"], weight * 3)
    assert client.describe()[1] == 3


def wire_ids(sampled) -> tuple[int, ...]:
    return (*sampled.thought, *sampled.prediction)


def test_a_publication_wakes_weights_before_it_and_the_cache_after_it(
    served, connect, tmp_path, fake
) -> None:
    client = connect()
    client.sleep()
    message = fake.written(tmp_path, 4, w=torch.ones(2), v=torch.zeros(3, 1))
    told = client.publish(message)
    assert served.backend.calls == ["sleep", "wake weights", "load 4", "wake kv_cache"]
    assert told == {tensor.name: tensor.checksum for tensor in message.tensors}


def test_the_checksum_is_read_from_the_engines_memory(served, connect, tmp_path, fake) -> None:
    served.backend.damaged = "w"
    message = fake.written(tmp_path, 4, v=torch.zeros(3, 1), w=torch.ones(2))
    told = connect().publish(message)
    assert told["w"] == checksum(torch.tensor([2.0, 1.0]))
    assert told["v"] == checksum(torch.zeros(3, 1))


def test_weights_that_are_not_there_are_refused_and_the_engine_lives(
    connect, tmp_path, fake
) -> None:
    client = connect()
    with pytest.raises(RefusedError, match=r"call publish: .*no weights there"):
        client.publish(Publish(version=1, transport="directory", place=str(tmp_path / "none")))
    client.submit([fake.job("t")])
    assert len(fake.gathered(client, 1)) == 1
