"""The leak test: other text after the cut, the same requests, the same thoughts; an engine that peeks is found out."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.evaluate.evaluation import evaluate
from rlpt.evaluate.leak import leak, with_other_text
from rlpt.evaluate.quantities import Resampling
from rlpt.types import concat

RESAMPLING = Resampling("document", 50, 0)


def peeking(tiny):
    """Begins its thoughts with what the text says next."""
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(
        [int(prompt.continuation_ids[0]), 1]
    )
    return engine


def test_every_token_after_the_cut_is_replaced_and_none_before_it(tiny):
    known = np.arange(6)
    for prompt in tiny.prompts(20):
        other = with_other_text(prompt, known, tiny.markers, seed=1)
        assert np.array_equal(other.trunk.ids[: prompt.cut], prompt.trunk.ids[: prompt.cut])
        assert (other.trunk.ids[prompt.cut :] != prompt.trunk.ids[prompt.cut :]).all()
        assert set(other.trunk.ids) <= set(known)
        assert (other.key, other.cut, other.horizon) == (prompt.key, prompt.cut, prompt.horizon)


def test_an_engine_that_reads_its_request_alone_passes(tiny, procedure, world):
    found = leak(tiny.engine(), tiny.prompts(8), procedure, world)
    assert found.as_dict() == {
        "passes": True,
        "prompts": 8,
        "requests_changed": 0,
        "thoughts_changed": 0,
        "unrepeatable": 0,
    }


def test_an_engine_that_peeks_fails_at_every_prompt_and_the_verdict_says_so(tiny, procedure, world):
    prompts, asked = tiny.prompts(80), replace(procedure, leak_prompts=5)
    given = (prompts, [], asked, RESAMPLING, world)
    summary = evaluate(tiny.scorer(), peeking(tiny), *given).summary
    assert (summary["leak"]["passes"], summary["leak"]["thoughts_changed"]) == (False, 5)
    assert summary["leak"]["requests_changed"] == 0
    assert summary["verdict_reasons"][-1] == (
        "warning: the text after the cut leaks: with other text 0 of 5 requests and the thoughts of 5 changed"
    )
    honest = evaluate(tiny.scorer(), tiny.engine(), *given).summary
    assert honest["leak"]["passes"]
    assert not any("leak" in reason for reason in honest["verdict_reasons"])


def test_a_request_with_text_from_after_the_cut_is_found(tiny, procedure, world):
    prompts = [
        replace(prompt, policy_ids=concat(prompt.policy_ids, prompt.continuation_ids[:1]))
        for prompt in tiny.prompts(6)
    ]
    found = leak(tiny.engine(), prompts, procedure, world)
    assert (found.passes, found.requests_changed, found.thoughts_changed) == (False, 6, 0)


def test_of_an_engine_that_never_repeats_itself_nothing_is_said(tiny, procedure, world):
    engine, draw = tiny.engine(), np.random.default_rng(0)
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(
        draw.integers(6, size=9).tolist()
    )
    found = leak(engine, tiny.prompts(6), procedure, world)
    assert (found.passes, found.unrepeatable, found.thoughts_changed) == (True, 6, 0)


@pytest.mark.parametrize("changed", [{"leak_prompts": 0}, {"leak_prompts": 5, "budget": 0}])
def test_it_costs_nothing_where_it_is_not_asked_for_or_nothing_is_thought(
    tiny, procedure, world, changed
):
    asked = replace(procedure, **changed)
    summary = evaluate(
        tiny.scorer(), peeking(tiny), tiny.prompts(8), [], asked, RESAMPLING, world
    ).summary
    assert "leak" not in summary
