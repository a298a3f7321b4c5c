"""The engine of a run that samples with vLLM: one or several engine processes behind `rlpt.rollout.engine.Engine`.

Groups are dealt by document to the engine with the least to do, so that the cuts of a document and the thoughts of a
cut find each other's context in its prefix cache.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlpt import dist, rng
from rlpt.config import ThoughtConfig
from rlpt.dist import together
from rlpt.rollout import wire
from rlpt.rollout.prefixes import PrefixCount
from rlpt.rollout.publishing import Publisher
from rlpt.rollout.seat import Seat
from rlpt.types import Group, Markers, Prompt, Sums

_WAIT = 1.0
"""Seconds of one call for results where there is one engine; several are asked in turn."""


@dataclass(frozen=True)
class _Asked:
    prompt: Prompt
    seat: Seat
    budget: int


class Fleet:
    """This rank's engines. See `rlpt.rollout.engine.Engine` for the contract."""

    is_reference = False

    def __init__(
        self,
        seats: Sequence[Seat],
        publisher: Publisher,
        markers: Markers,
        thought: ThoughtConfig,
        seed: int,
        world: dist.World,
        sleeps: bool,
    ) -> None:
        self.seats = list(seats)
        self.publisher = publisher
        self.markers = markers
        self.thought = thought
        self.seed = seed
        self.world = world
        self.sleeps = sleeps
        self.version = -1
        self.dtype: wire.DType = self.seats[0].spec.dtype
        self._asked: dict[str, _Asked] = {}
        self._done: dict[str, Group] = {}
        self._number = 0
        self._session = f"{secrets.token_hex(4)}.{world.rank}"
        self._prefixes = PrefixCount()
        self._before: dict[str, float] = {}

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        purpose: str,
        budget: int | None = None,
        *,
        greedy: bool = False,
    ) -> list[str]:
        budget = budget or self.thought.budget_tokens
        tickets = [f"{self._session}.{self._number + p}" for p in range(len(prompts))]
        self._number += len(prompts)
        whole: dict[int, list[int]] = {}
        for p, prompt in enumerate(prompts):
            whole.setdefault(id(prompt.trunk), []).append(p)
        dealt: dict[str, list[wire.Job]] = {}
        for document in whole.values():
            seat = min(self.seats, key=lambda s: s.load + sum(map(_tokens, dealt.get(s.name, ()))))
            for p in sorted(document, key=lambda p: prompts[p].cut):
                self._asked[tickets[p]] = _Asked(prompts[p], seat, budget)
                dealt.setdefault(seat.name, []).append(
                    self._job(tickets[p], prompts[p], group_size, purpose, budget, greedy)
                )
        for seat in self.seats:
            if jobs := dealt.get(seat.name):
                self._prefixes.add(seat.name, jobs)
                seat.submit(jobs)
        return tickets

    def _job(
        self, ticket: str, prompt: Prompt, group_size: int, purpose: str, budget: int, greedy: bool
    ) -> wire.Job:
        key = rng.key(self.seed, purpose, *prompt.key)
        predicted = self.thought.prediction_tokens
        return wire.job(ticket, prompt, group_size, key, budget, predicted, greedy)

    def collect(self, tickets: Sequence[str]) -> list[Group]:
        if self.version < 0:
            raise RuntimeError("collect: no weights were published to the engine")
        unknown = [
            ticket for ticket in tickets if ticket not in self._asked and ticket not in self._done
        ]
        if unknown:
            raise KeyError(
                f"collect: nobody asked for ticket {unknown[0]}, or it was collected before"
            )
        while missing := [ticket for ticket in tickets if ticket not in self._done]:
            owing = {id(self._asked[ticket].seat): self._asked[ticket].seat for ticket in missing}
            for seat in owing.values():
                self._take(seat, _WAIT / len(owing) ** 2)
        return [self._done.pop(ticket) for ticket in tickets]

    def _take(self, seat: Seat, wait: float) -> None:
        for one in seat.poll(wait):
            asked = self._asked.pop(one.ticket)
            rollouts = tuple(wire.rollout(sampled, self.markers.closer) for sampled in one.rollouts)
            self._done[one.ticket] = Group(asked.prompt, rollouts, asked.budget)

    def cancel(self, tickets: Sequence[str]) -> None:
        for ticket in tickets:
            self._asked.pop(ticket, None)
            self._done.pop(ticket, None)
        for seat in self.seats:
            seat.cancel(tickets)

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Collective: rank 0 sends, every rank hears from its engines, and all fail together."""
        message = self.publisher.send(named_tensors, version)
        for seat in self.seats:
            seat.weights = message
        together(lambda: self._deliver(message), self.world)
        self.publisher.sent(version)
        self._prefixes.forget()
        self.version = version

    def _deliver(self, message: wire.Publish) -> None:
        for seat in self.seats:
            if seat.publishes:
                seat.publish(message, self.publisher.answered.get(seat.name))

    def rest(self) -> None:
        """Colocated on a GPU: weights and cache go, and come back with the next publish."""
        if self.sleeps:
            for seat in self.seats:
                seat.rest()
            self.version = -1

    def counters(self) -> Sums:
        """Since the last call, over all ranks once they are summed: shares of the time that engines stood idle and of
        prompts found in the prefix cache; preemptions and restarts in all."""
        now = self._totals()
        since = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        asked, possible = self._prefixes.take()
        found: Sums = {
            "engine/idle_share": (since["idle"], since["busy"] + since["idle"]),
            "engine/prefix_hit_rate": (since["prefix_hits"], since["prefix_queries"]),
        }
        if not self.thought.prediction_tokens:
            found["engine/prefix_hit_possible"] = (float(possible), float(asked))
        once = 1.0 / self.world.size
        return found | {f"engine/{n}": (since[n], once) for n in ("preemptions", "restarts")}

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = dict.fromkeys(
            ("busy", "idle", "preemptions", "prefix_queries", "prefix_hits"), 0.0
        )
        for seat in self.seats:
            for name, value in seat.counters().items():
                totals[name] = totals.get(name, 0.0) + value
        return totals | {"restarts": float(sum(seat.restarts for seat in self.seats))}

    def close(self) -> None:
        for seat in self.seats:
            seat.close()
        self.publisher.close()


def _tokens(job: wire.Job) -> int:
    return job.count * (job.budget + job.prediction)
