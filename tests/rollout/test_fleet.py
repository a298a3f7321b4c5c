"""Several engines as one: documents are kept together, load is spread, and every group is had once."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from rlpt import dist, rng
from rlpt.config import ThoughtConfig
from rlpt.rollout import server as module
from rlpt.rollout import wire
from rlpt.rollout.client import EngineClient
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.publishing import DirectoryPublisher
from rlpt.rollout.seat import Seat
from rlpt.types import Group, Markers, Prompt, Rollout

SEED, GROUP = 11, 3
THOUGHT = ThoughtConfig(budget_tokens=7)


@pytest.fixture
def fleet_of(fake, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setattr(module, "_IDLE", 0.02)
    made: list[Fleet] = []

    def fleet(engines: int, thought: ThoughtConfig = THOUGHT, sleeps: bool = False) -> Fleet:
        world = dist.World(0, 1, torch.device("cpu"))
        seats = []
        for i in range(engines):
            process = fake.FakeProcess(fake.specification())
            client = EngineClient("", fake.TOKEN, "run/0", 1.0)
            seats.append(Seat(f"engine {i}", process.spec, client, process, 1.0, 5))
            process.start()
            seats[-1].open()
        publisher = DirectoryPublisher(tmp_path / "weights", "float32", world)
        markers = Markers(fake.OPENER, fake.CLOSER)
        made.append(Fleet(seats, publisher, markers, thought, SEED, world, sleeps))
        return made[-1]

    yield fleet
    for each in made:
        each.close()


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    return [("down", torch.full((4, 2), value)), ("up", torch.arange(6.0) * value)]


def expected(fake, prompt: Prompt, purpose: str, versions: Sequence[int], prediction: int = 0):
    """The rollouts of a group, as (ids, version) columns, from the fake's own arithmetic."""
    key = rng.key(SEED, purpose, *prompt.key)
    job = wire.job("t", prompt, GROUP, key, THOUGHT.budget_tokens, prediction)
    found = [fake.sampled(job, g, versions) for g in range(GROUP)]
    return [columns(wire.rollout(one, fake.CLOSER)) for one in found]


def columns(rollout: Rollout) -> tuple:
    return rollout.ids.tolist(), rollout.version.tolist(), rollout.logp.tolist()


def of(group: Group) -> list[tuple]:
    return [columns(rollout) for rollout in group.rollouts]


def documents(trunk, prompt, count: int, cuts: Sequence[int] = (5, 9, 14)) -> list[Prompt]:
    made = [trunk(f"document {n}", 16) for n in range(count)]
    return [prompt(each, cut) for each in made for cut in cuts]


def asked_of(fleet: Fleet) -> list[list[str]]:
    """Tickets submitted to each engine, in the order of the calls."""
    return [
        [call.split()[1] for call in seat.process.now.backend.calls if call.startswith("submit")]
        for seat in fleet.seats
    ]


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("prediction", [0, 2])
def test_groups_are_those_of_the_prompts_whichever_engine_sampled_them(
    fleet_of, fake, trunk, prompt, engines, prediction
) -> None:
    thought = ThoughtConfig(budget_tokens=7, prediction_tokens=prediction)
    fleet = fleet_of(engines, thought)
    fleet.publish(weights(1.0), 3)
    prompts = documents(trunk, prompt, 5)
    tickets = fleet.submit(prompts, GROUP, "rollout/rl")
    # In any order, and in parts.
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    groups = fleet.collect([tickets[p] for p in order[:6]])
    groups += fleet.collect([tickets[p] for p in order[6:]])
    for p, group in zip(order, groups, strict=True):
        assert group.prompt is prompts[p]
        assert of(group) == expected(fake, prompts[p], "rollout/rl", [3] * 40, prediction)


def test_purposes_and_prompts_have_seeds_of_their_own(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(1)
    fleet.publish(weights(1.0), 0)
    asked = documents(trunk, prompt, 1)
    one, other = (fleet.collect(fleet.submit(asked, GROUP, name)) for name in ("a", "b"))
    again = fleet.collect(fleet.submit(asked, GROUP, "a"))
    assert [of(group) for group in one] == [of(group) for group in again]
    assert all(of(x) != of(y) for x, y in zip(one, other, strict=True))


def test_the_cuts_of_a_document_go_to_one_engine_shortest_first(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(3)
    fleet.publish(weights(1.0), 0)
    prompts = documents(trunk, prompt, 7, cuts=(14, 5, 9))
    tickets = fleet.submit(prompts, GROUP, "x")
    fleet.collect(tickets)
    asked = asked_of(fleet)
    places = [[tickets.index(ticket) for ticket in each] for each in asked]
    for each in places:
        # By threes: the cuts at 5, 9 and 14 of one document.
        assert [p % 3 for p in each] == [1, 2, 0] * (len(each) // 3)
        assert all(len({p // 3 for p in each[i : i + 3]}) == 1 for i in range(0, len(each), 3))
    assert sorted(p for each in places for p in each) == list(range(21))
    # 7 documents of the same size over 3 engines.
    assert sorted(len(each) for each in places) == [6, 6, 9]


def test_work_goes_where_the_least_is_owed(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 0)
    for seat in fleet.seats:
        seat.process.now.backend.steps_left = 0
    fleet.submit(documents(trunk, prompt, 1, cuts=(3, 5, 7, 9, 11)), GROUP, "x")
    fleet.submit(documents(trunk, prompt, 1, cuts=(3,)), GROUP, "y")
    assert [seat.load for seat in fleet.seats] == [5 * GROUP * 7, 1 * GROUP * 7]
    fleet.submit(documents(trunk, prompt, 3, cuts=(4, 6)), GROUP, "z")
    # 15 | 3 -> 15 | 9 -> 15 | 15 -> the first of equals.
    assert [seat.load for seat in fleet.seats] == [7 * GROUP * 7, 5 * GROUP * 7]
    for seat in fleet.seats:
        seat.process.now.backend.steps_left = None


def test_a_call_may_ask_for_shorter_thoughts(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(1)
    fleet.publish(weights(1.0), 0)
    asked = documents(trunk, prompt, 2)
    short, whole = (fleet.collect(fleet.submit(asked, GROUP, "a", most)) for most in (2, None))
    assert ({group.budget for group in short}, {group.budget for group in whole}) == ({2}, {7})
    for one, other in zip(short, whole, strict=True):
        for cut_off, full in zip(one.rollouts, other.rollouts, strict=True):
            assert cut_off.thought_len == min(2, full.thought_len)
            assert cut_off.thought_ids.tolist() == full.thought_ids[:2].tolist()


def test_a_ticket_is_good_once(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 0)
    tickets = fleet.submit(documents(trunk, prompt, 2), GROUP, "x")
    assert len(set(tickets)) == 6
    fleet.collect(tickets[:4])
    with pytest.raises(KeyError, match=f"{tickets[2]}, or it was collected before"):
        fleet.collect([tickets[4], tickets[2]])
    assert len(fleet.collect(tickets[4:])) == 2
    with pytest.raises(KeyError, match="nobody asked for ticket nonsense"):
        fleet.collect(["nonsense"])


def test_cancelled_groups_never_come_and_cost_no_more_tokens(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 0)
    for seat in fleet.seats:
        seat.process.now.backend.steps_left = 0
    tickets = fleet.submit(documents(trunk, prompt, 2), GROUP, "x")
    fleet.cancel([tickets[0], tickets[5], "never asked"])
    cancelled = [
        call for seat in fleet.seats for call in seat.process.now.backend.calls if "cancel" in call
    ]
    assert sorted(cancelled) == sorted(f"cancel {tickets[p]}" for p in (0, 5))
    for seat in fleet.seats:
        seat.process.now.backend.steps_left = None
    assert len(fleet.collect(tickets[1:5])) == 4
    with pytest.raises(KeyError):
        fleet.collect([tickets[0]])
    assert sum(seat.load for seat in fleet.seats) == 0


def test_nothing_is_collected_before_weights_are_there(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(1)
    assert fleet.version == -1
    tickets = fleet.submit(documents(trunk, prompt, 1), GROUP, "x")
    with pytest.raises(RuntimeError, match="no weights were published"):
        fleet.collect(tickets)


def test_every_engine_gets_every_publication(fleet_of, tmp_path) -> None:
    fleet = fleet_of(3)
    for version in (4, 5):
        fleet.publish(iter(weights(float(version))), version)
        assert fleet.version == version
        for seat in fleet.seats:
            held = seat.process.now.backend
            assert held.version == version
            assert {n: t.tolist() for n, t in held.weights.items()} == {
                n: t.tolist() for n, t in weights(float(version))
            }
    # What is kept is what a restarted engine needs.
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_000005"]
    fleet.close()
    assert not (tmp_path / "weights").exists()


def test_publishing_starts_an_engine_that_is_down_with_the_new_weights(
    fleet_of, fake, trunk, prompt
) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 1)
    for seat in fleet.seats:
        seat.process.now.backend.steps_left = 0
    prompts = documents(trunk, prompt, 4)
    tickets = fleet.submit(prompts, GROUP, "x")
    fleet.seats[1].process.now.die()
    fleet.publish(weights(2.0), 2)
    assert [seat.restarts for seat in fleet.seats] == [0, 1]
    new = fleet.seats[1].process.now.backend
    assert [call for call in new.calls if "load" in call] == ["load 2"]
    fleet.seats[0].process.now.backend.steps_left = None
    for p, group in enumerate(fleet.collect(tickets)):
        assert of(group) == expected(fake, prompts[p], "x", [2] * 40)


def test_an_engine_that_dies_between_publications_gets_the_last_one(
    fleet_of, fake, trunk, prompt
) -> None:
    fleet = fleet_of(2)
    for version in (1, 2):
        fleet.publish(weights(float(version)), version)
    for seat in fleet.seats:
        seat.process.now.die()
    prompts = documents(trunk, prompt, 4)
    for p, group in enumerate(fleet.collect(fleet.submit(prompts, GROUP, "x"))):
        assert of(group) == expected(fake, prompts[p], "x", [2] * 40)
    assert fleet.counters()["engine/restarts"] == (2.0, 1.0)


def test_a_rank_that_does_not_publish_knows_the_weights_all_the_same(
    fleet_of, fake, trunk, prompt
) -> None:
    """Several ranks at one engine: it got the weights from another, and may lose them while this rank waits."""
    fleet = fleet_of(1)
    (seat,) = fleet.seats
    seat.publishes = False
    fleet.publish(weights(1.0), 6)
    assert not [call for call in seat.process.now.backend.calls if "load" in call]
    seat.process.now.die()
    prompts = documents(trunk, prompt, 2)
    for p, group in enumerate(fleet.collect(fleet.submit(prompts, GROUP, "x"))):
        assert of(group) == expected(fake, prompts[p], "x", [6] * 40)


def test_a_wrong_checksum_anywhere_fails_the_publication(fleet_of) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 1)
    fleet.seats[1].process.now.backend.damaged = "down"
    with pytest.raises(RuntimeError, match=r"version 2: tensor down has checksum"):
        fleet.publish(weights(2.0), 2)
    assert fleet.version == 1


def test_rest_puts_engines_to_sleep_where_they_do(fleet_of) -> None:
    awake, asleep = fleet_of(1), fleet_of(2, sleeps=True)
    for fleet in (awake, asleep):
        fleet.publish(weights(1.0), 1)
        fleet.rest()
    assert (awake.version, asleep.version) == (1, -1)
    calls = [[seat.process.now.backend.calls[-1] for seat in f.seats] for f in (awake, asleep)]
    assert calls == [["wake kv_cache"], ["sleep", "sleep"]]


def test_an_engine_that_died_before_its_rest_sleeps_all_the_same(fleet_of) -> None:
    fleet = fleet_of(1, sleeps=True)
    fleet.publish(weights(1.0), 1)
    fleet.seats[0].process.now.die()
    fleet.rest()
    assert fleet.seats[0].restarts == 1
    assert fleet.seats[0].process.now.backend.calls[-1] == "sleep"


def test_counters_are_of_the_time_since_the_last_call(fleet_of, trunk, prompt) -> None:
    fleet = fleet_of(2)
    fleet.publish(weights(1.0), 1)
    first = fleet.counters()
    assert first["engine/preemptions"] == (2.0, 1.0)
    hits, queries = first["engine/prefix_hit_rate"]
    assert hits / queries == 0.75
    idle, spent = first["engine/idle_share"]
    assert 0.0 <= idle <= spent
    document = trunk("long", 80)
    long = [prompt(document, cut) for cut in (70, 79)]
    fleet.collect(fleet.submit(long, GROUP, "x"))
    second = fleet.counters()
    # 71 and 80 tokens with the opener: two blocks of 32 each; the second cut finds those of the first.
    assert second["engine/prefix_hit_possible"] == (5 * 64, 3 * 71 + 3 * 80)
    assert second["engine/preemptions"] == (0.0, 1.0)
    assert second["engine/prefix_hit_rate"] == (0.0, 0.0)
    assert fleet.counters()["engine/prefix_hit_possible"] == (0.0, 0.0)
    fleet.publish(weights(1.0), 2)
    fleet.collect(fleet.submit(long[:1], GROUP, "y"))
    assert fleet.counters()["engine/prefix_hit_possible"] == (2 * 64, 3 * 71)
