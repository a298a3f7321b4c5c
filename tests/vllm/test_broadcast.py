"""The real engine behind a broadcast: its log-probabilities are the trainer's, whatever happens to its process."""

import os
import signal

import pytest
import torch

from rlpt.agreement import check_engine
from rlpt.config import longest_branch
from rlpt.policy.load import local
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.live import BroadcastPublisher
from rlpt.rollout.start import open_engine

EXACT = 2e-5
"""Nats; a few 1e-6 with files, and the numbers that travel are the same."""


def opened(bench) -> Fleet:
    """Two engines, which run beside the trainer."""
    cfg = bench.cfg
    vllm = cfg.engine.vllm.model_copy(
        update={"placement": "separate", "engines": 2, "publish": "broadcast"}
    )
    engine = open_engine(
        cfg.engine.model_copy(update={"vllm": vllm}), cfg.policy, bench.plan, cfg.thought,
        longest_branch(cfg.prompts, cfg.thought), str(bench.shards.manifest.tokenizer_hash),
        cfg.run_dir / "engine", cfg.seed, bench.world,
    )  # fmt: skip
    assert isinstance(engine, Fleet)
    assert isinstance(engine.publisher, BroadcastPublisher)
    return engine


def prompts_of(bench):
    return held_out(bench.shards.split("dev"), bench.cfg.prompts, bench.markers, 24, 0, ())


def largest(bench, engine: Fleet) -> float:
    return check_engine(
        *(engine, bench.policy, prompts_of(bench), bench.markers, bench.world, "float32", 8192)
    ).largest


@torch.no_grad()
def moved(bench) -> None:
    for parameter in bench.policy.parameters():
        local(parameter).add_(torch.randn_like(local(parameter)) * 0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_broadcasts_reach_engines_that_are_killed_in_between(bench, tied: bool) -> None:
    made = bench(tie_embeddings=tied)
    engine = opened(made)
    try:
        sync.publish(made.policy, engine, 0)
        assert engine.publisher.answered.keys() == {"engine 0", "engine 1"}
        assert largest(made, engine) < EXACT
        # Between a publication and its thoughts: the engine comes back with the spare copy.
        kill(engine, 1)
        assert largest(made, engine) < EXACT
        assert [seat.restarts for seat in engine.seats] == [0, 1]
        # Before a publication: it is in the next group.
        kill(engine, 0)
        moved(made)
        sync.publish(made.policy, engine, 1)
        assert engine.publisher.answered.keys() == {"engine 0", "engine 1"}
        assert [seat.restarts for seat in engine.seats] == [1, 1]
        assert largest(made, engine) < EXACT
        groups = generate(engine, prompts_of(made), 3, "train")
        assert {int(v) for g in groups for r in g.rollouts for v in r.version} == {1}
    finally:
        engine.close()


def test_a_broadcast_while_thoughts_are_under_way_marks_their_tokens(bench) -> None:
    made = bench()
    engine = opened(made)
    try:
        sync.publish(made.policy, engine, 0)
        tickets = engine.submit(prompts_of(made), 8, "train")
        sync.publish(made.policy, engine, 1)
        versions = {int(v) for g in engine.collect(tickets) for r in g.rollouts for v in r.version}
        assert versions <= {0, 1}
        assert 1 in versions
    finally:
        engine.close()


def kill(engine: Fleet, seat: int) -> None:
    process = engine.seats[seat].process
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
