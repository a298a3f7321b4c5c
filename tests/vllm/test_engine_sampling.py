"""What the real engine samples: random numbers of its own for every thought and prediction, ended by nothing but the
closer and the budget, with the trainer's log-probabilities in every dtype and at every temperature."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlpt.agreement import Agreement, check_engine
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.types import Group, Prompt
from rlpt_data.strict import UserError

BUDGET, PREDICTION = 16, 8
FLAT = {"init_std": 0.001}
"""Every id is as likely as any other: what is drawn shows the random numbers and nothing else."""


def prompts_of(bench, count: int = 24) -> list[Prompt]:
    return list(held_out(bench.shards.split("dev"), bench.cfg.prompts, bench.markers, count, 0, ()))


def agreement(bench, engine: Fleet, temperature: float = 1.0) -> Agreement:
    prompts, dtype = prompts_of(bench), engine.dtype
    return check_engine(
        *(engine, bench.policy, prompts, bench.markers, bench.world, dtype, 8192, temperature)
    )


# ---- random numbers --------------------------------------------------------------------------------


@pytest.fixture
def predicting(shared, bench, monkeypatch: pytest.MonkeyPatch):
    """An engine that thinks and predicts, with a policy to which all ids are alike."""
    flat = bench(max_positions=2048, **FLAT)
    _, engine = shared
    thought = engine.thought.model_copy(
        update={"budget_tokens": BUDGET, "prediction_tokens": PREDICTION}
    )
    monkeypatch.setattr(engine, "thought", thought)
    sync.publish(flat.policy, engine, 0)
    return flat, engine


def test_a_prediction_is_no_replay_of_its_thought(predicting) -> None:
    """Token t of one is token t of the other as often as chance has it."""
    flat, engine = predicting
    groups = generate(engine, prompts_of(flat), 8, "train")
    same = [
        a == b
        for group in groups
        for r in group.rollouts
        for a, b in zip(r.thought_ids.tolist(), r.prediction_ids.tolist(), strict=False)
    ]
    chance = 1 / flat.plan.vocabulary.size
    assert len(same) > 1000
    assert np.mean(same) < chance + 4 * np.sqrt(chance / len(same))


def test_no_two_rollouts_share_their_random_numbers(predicting) -> None:
    """Siblings, prompts, purposes and epochs; thoughts and predictions."""
    flat, engine = predicting
    prompts = prompts_of(flat, 6)
    later = [replace(p, trunk=replace(p.trunk, epoch=1)) for p in prompts]
    asked = ((prompts, "train"), (prompts, "other"), (later, "train"))
    groups = [group for given, purpose in asked for group in generate(engine, given, 4, purpose)]
    found = streams(groups)
    assert len(found) > 130
    alike = [int((a == b).sum()) for a, b in itertools.combinations(found, 2)]
    # Of 8 tokens: by chance hardly ever more than one, in a replay all.
    assert max(alike) < PREDICTION // 2


def streams(groups: Sequence[Group]) -> list[np.ndarray]:
    """The first tokens of every thought and prediction that has so many."""
    rollouts = [r for group in groups for r in group.rollouts]
    parts = [ids for r in rollouts for ids in (r.thought_ids, r.prediction_ids)]
    return [ids[:PREDICTION] for ids in parts if len(ids) >= PREDICTION]


# ---- ends ------------------------------------------------------------------------------------------


def test_an_end_of_text_token_is_a_token_like_others(bench, opened) -> None:
    made = bench(**FLAT)
    eos = 7
    made.plan.config.eos_token_id = eos
    engine = opened(made)
    try:
        sync.publish(made.policy, engine, 0)
        groups = generate(engine, prompts_of(made), 32, "train")
    finally:
        engine.close()
    rollouts = [r for group in groups for r in group.rollouts]
    assert sum(eos in r.thought_ids[:-1] for r in rollouts) > 4
    assert {r.thought_len for r in rollouts if r.finish == "budget"} == {BUDGET}
    assert any(r.thought_len < BUDGET for r in rollouts if r.finish == "closer")


# ---- probabilities ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tied"), [("bfloat16", True), ("bfloat16", False), ("float16", True)]
)
def test_an_engine_of_half_precision_has_the_weights_and_the_probabilities(
    bench, opened, dtype: str, tied: bool
) -> None:
    """A publication compares every tensor, rounded to the dtype, with the engine's memory."""
    made = bench(tie_embeddings=tied, kv_heads=1)
    policy = made.cfg.policy.model_copy(update={"compute_dtype": dtype})
    made.cfg = made.cfg.model_copy(update={"policy": policy})
    engine = opened(made)
    try:
        assert engine.dtype == dtype
        sync.publish(made.policy, engine, 0)
        found = agreement(made, engine)
    finally:
        engine.close()
    # Some rounding there is: the engine did compute in half precision.
    assert found.rms > 1e-5


def test_a_temperature_is_on_both_sides(bench, opened) -> None:
    made = bench()
    thought = made.cfg.thought.model_copy(update={"temperature": 0.6})
    made.cfg = made.cfg.model_copy(update={"thought": thought})
    engine = opened(made)
    try:
        sync.publish(made.policy, engine, 0)
        assert agreement(made, engine, 0.6).largest < 2e-5
        with pytest.raises(UserError, match="log-probabilities are not the trainer's"):
            agreement(made, engine, 1.0)
    finally:
        engine.close()


def test_greedy_thoughts_and_their_probabilities_are_the_reference_engines(
    shared, bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest ids, whatever the temperature of the other thoughts, with log-probabilities at 1."""
    made, (_, engine) = bench(max_positions=2048), shared
    predicting = {"budget_tokens": BUDGET, "prediction_tokens": PREDICTION}
    thought = engine.thought.model_copy(update=predicting)
    monkeypatch.setattr(engine, "thought", thought)
    reference = TransformersEngine(
        *(made.plan.config, "naive", made.markers, thought, 0, 8, made.world.device)
    )
    prompts = prompts_of(made, 12)
    found = []
    for each in (engine, reference):
        sync.publish(made.policy, each, 0)
        found.append(each.collect(each.submit(prompts, 1, "greedy", greedy=True)))
    for group, expected in zip(*found, strict=True):
        (mine,), (other,) = group.rollouts, expected.rollouts
        assert mine.ids.tolist() == other.ids.tolist()
        assert np.abs(mine.logp - other.logp).max() < 2e-5
