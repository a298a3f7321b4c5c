"""An engine at an address, started by somebody else and asked by others too: only the right one is used."""

import time
from collections.abc import Iterator

import pytest

from rlpt.rollout import server as module
from rlpt.rollout.client import EngineClient
from rlpt.rollout.seat import Seat
from rlpt.rollout.serve import TOKEN
from rlpt.rollout.start import _token
from rlpt_data.strict import UserError

TIMEOUT = 1.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.02)


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


def test_work_that_an_earlier_life_of_this_rank_asked_for_is_dropped_at_the_start(
    remote, fake
) -> None:
    seat, served = remote()
    served.backend.steps_left = 0
    seat.client.submit([fake.job("stale")])
    seat.open()
    served.backend.steps_left = None
    seat.submit([fake.job("t")])
    assert [one.ticket for one in fake.polled(seat, 1)] == ["t"]
    assert "cancel stale" in served.backend.calls


def test_an_engine_that_somebody_else_restarts_gets_weights_and_work(
    remote, fake, tmp_path
) -> None:
    seat, served = remote()
    seat.open()
    seat.publish(fake.written(tmp_path, 5))
    served.backend.steps_left = 0
    seat.submit([fake.job("t")])
    served.die()
    again = fake.Served(fake.FakeBackend(fake.specification()))
    # As if at the same address.
    seat.client.address = again.address
    try:
        assert fake.polled(seat, 1) == [fake.finished(fake.job("t"), [5] * 40)]
        assert again.backend.version == 5
    finally:
        again.die()


@pytest.mark.parametrize(("has", "loads"), [(5, []), (4, ["load 5"])])
def test_of_several_ranks_at_one_engine_the_first_to_need_it_sends_the_weights(
    remote, tmp_path, has, loads, fake
) -> None:
    """A rank that publishes nothing heals an engine whose weights are old, and leaves one alone that has the new."""
    seat, served = remote()
    seat.publishes = False
    seat.open()
    seat.weights = fake.written(tmp_path, 5)
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


def test_leaving_an_engine_that_stays_drops_the_work_of_this_rank(remote, fake) -> None:
    seat, served = remote()
    seat.open()
    served.backend.steps_left = 0
    seat.submit([fake.job("t")])
    seat.close()
    assert served.backend.calls[-1] == "cancel t"
    assert served.alive


@pytest.mark.parametrize("token", ["", "marker\r", "mark er", "m\u00e4rker", "marker\nX: y"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match=f"rlpt engine: .*{TOKEN}") as refused:
        _token("rlpt engine")
    assert not token or token.strip() not in str(refused.value)


def test_a_token_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "s3cret+/=")
    assert _token("rlpt engine") == "s3cret+/="
