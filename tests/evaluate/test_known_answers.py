"""Models whose figures are known beforehand: uniform, copying, solving; and the ways of reading a next token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from rlpt import rng
from rlpt.evaluate.bits_per_byte import bits_per_byte, measure_windows
from rlpt.evaluate.continuation import measure
from rlpt.evaluate.evaluation import evaluate
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.summary import summarise
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.types import Certainty, Scores

RESAMPLING = Resampling("document", 100, 0)


def test_a_uniform_model_takes_exactly_log2_of_its_vocabulary_for_every_token(tiny, world):
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lm = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(lm.lm_head.weight)
    windows = measure_windows(
        Scorer(Policy(lm), (), world, 300), [p.trunk for p in tiny.prompts(40)], world
    )
    single = [replace(window, num_bytes=window.num_tokens) for window in windows]
    found = bits_per_byte(single, "document", draws=10, seed=0)
    assert found.mean == pytest.approx(3.0, rel=1e-7)
    assert bits_per_byte(windows, "document", draws=10, seed=0).mean == pytest.approx(1.5, rel=1e-7)


def test_a_thought_that_is_the_gold_text_gains_what_its_copy_implies(tiny, procedure, world):
    """d different ids, three times as likely as the other 6 - d: log(6 * 3 / (3 d + 6 - d)) a token."""
    prompts, engine = tiny.prompts(40), tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(prompt.continuation_ids.tolist())
    procedure = replace(procedure, controls=())
    found = summarise(measure(tiny.scorer(), engine, prompts, procedure, world), [], RESAMPLING)
    different = [len(set(prompt.continuation_ids.tolist())) for prompt in prompts]
    implied = np.mean([math.log(18 / (3 * d + 6 - d)) for d in different])
    assert found["gain_heldout"]["mean"] == pytest.approx(implied, abs=1e-6)
    blind = summarise(
        measure(tiny.scorer(), tiny.engine(), prompts, procedure, world), [], RESAMPLING
    )
    assert found["thought"]["named_answer_rate"] == 1.0
    assert blind["thought"]["named_answer_rate"] < 0.6


DIGITS = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)
"""Ids beside those of the markers."""


class Trusting:
    """Without a thought every digit is as likely as any other; after one, what it says is certain."""

    def branches(self, pairs):
        return [self._score(b.ids[b.score_start :], self._said(b)) for _, b in pairs]

    def trunks(self, spans):
        return [self._score(trunk.ids[start:stop], None) for trunk, start, stop in spans]

    def _said(self, branch):
        said = [i for i in branch.ids[: branch.score_start].tolist() if i in DIGITS]
        return said[-1] if said else None

    def _score(self, target, said):
        p = [0.1 if said is None else (1 - 1e-9 if i == said else 1e-10) for i in target]
        top = DIGITS[0] if said is None else said
        sure = Certainty(0.0, math.log(0.1 if said is None else 1.0))
        return Scores(np.log(p).astype(np.float32), np.full(len(target), top), sure)


def test_a_thought_that_computes_the_answer_gains_the_optimum_of_the_proving_ground(
    tiny, procedure, world
):
    """Running sums modulo ten: ln 10 per answer, from the context alone, and no control has it."""
    draw = np.random.default_rng(0)
    prompts = [page(tiny, i, draw.integers(10, size=6)) for i in range(40)]
    engine = tiny.engine()

    def solve(prompt, purpose, sample):
        total = sum(DIGITS.index(i) for i in prompt.policy_ids.tolist() if i in DIGITS)
        return tiny.rollout([DIGITS[total % 10]])

    engine._rollout = solve
    asked = replace(
        procedure, controls=("empty", "filler", "other_document", "wrong_target"), leak_prompts=8
    )
    table = evaluate(Trusting(), engine, prompts, [], asked, RESAMPLING, world).summary
    assert table["gain_heldout"]["mean"] == pytest.approx(math.log(10), abs=1e-6)
    assert table["verdict"] == "useful"
    assert table["leak"]["passes"]
    assert table["next_token_accuracy_majority"]["mean"] == 1.0
    assert table["controls"]["empty"]["gain"]["mean"] == pytest.approx(0.0)


def page(tiny, number, digits):
    ids = [DIGITS[d] for d in digits]
    return tiny.prompt(f"page{number}", ids, [DIGITS[int(digits.sum()) % 10]])


def test_greedy_majority_and_sampled_are_three_readings_of_the_next_token(tiny, procedure, world):
    """Thoughts [3], [2], [2] and greedily [3], where the text says 2: 2/3, 1 and 0 are right."""
    prompts, engine = [tiny.prompt(f"d{i}", [1, 1], [2]) for i in range(40)], tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(
        [3 if purpose == "greedy" or sample == 0 else 2]
    )
    asked = replace(procedure, thoughts=3, greedy=True, controls=("empty",))
    records = measure(tiny.scorer(), engine, prompts, asked, world)
    table = summarise(records, [], RESAMPLING)
    assert table["next_token_accuracy_no_think"] == 0.0
    assert table["next_token_accuracy_thought"] == pytest.approx(2 / 3)
    assert table["next_token_accuracy_majority"]["mean"] == 1.0
    assert table["next_token_accuracy_greedy"]["mean"] == 0.0
    assert table["next_token_accuracy_majority_change"]["mean"] == 1.0
    # 3/8 of what the thought says, 1/8 of the rest, 1/6 without a thought.
    gains = {right: math.log((3 if right else 1) / 8 * 6) for right in (True, False)}
    assert table["gain_heldout"]["mean"] == pytest.approx(
        (2 * gains[True] + gains[False]) / 3, abs=1e-6
    )
    assert table["gain_greedy"]["mean"] == pytest.approx(gains[False], abs=1e-6)
    assert records[0].greedy.thought_ids == (3,)
    k = table["at_k"]
    assert list(k) == ["1", "2", "3"]
    assert [k[i]["pass_next_token"]["mean"] for i in k] == pytest.approx([2 / 3, 1.0, 1.0])
    assert [k[i]["mean_gain"]["mean"] for i in k] == pytest.approx(
        [table["gain_heldout"]["mean"]] * 3
    )
    assert [k[i]["best_gain"]["mean"] for i in k] == pytest.approx(
        [table["gain_heldout"]["mean"], gains[True], gains[True]], abs=1e-6
    )


def test_the_first_tokens_certainty_is_that_of_its_distribution(tiny, procedure, world):
    """Uniform over six without a thought; 3/8 against five times 1/8 after one of one id."""
    prompts, engine = [tiny.prompt(f"d{i}", [1, 1], [2]) for i in range(4)], tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout([2])
    records = measure(tiny.scorer(), engine, prompts, procedure, world)
    before, after = records[0].firsts["no_think"], records[0].firsts["own"]
    assert before.entropy == pytest.approx(math.log(6))
    assert after.confidence == pytest.approx(math.log(3 / 8))
    assert after.entropy == pytest.approx(
        -(3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(1 / 8)), rel=1e-6
    )
    found = summarise(records, [], RESAMPLING)["calibration"]
    assert found["no_think"]["ece"] == pytest.approx(1 / 6)
    assert found["thought"]["ece"] == pytest.approx(1 - 3 / 8)
    assert [found[name]["bins"][0]["count"] for name in ("no_think", "thought")] == [1, 1]
    assert "greedy" not in found


def test_thoughts_are_counted_in_nats_of_what_was_sampled(tiny, procedure, world):
    """-log p of thought and sampled closer; a forced closer was not sampled."""

    class Talkative(tiny.engine):
        def _rollout(self, prompt, purpose, sample):
            made = tiny.rollout([0, 1, 2])
            logp = np.array([-0.5, -1.0, -1.5, -2.0], np.float32)
            if sample == 0:
                return replace(made, logp=logp)
            action = np.array([True, True, True, False])
            return replace(made, logp=np.where(action, logp, 0), action=action, finish="budget")

    records = measure(tiny.scorer(), Talkative(), tiny.prompts(4), procedure, world)
    assert [(r.thought_nats, r.thought_actions) for r in records[:2]] == [(5.0, 4), (3.0, 3)]
    assert summarise(records, [], RESAMPLING)["thought"]["entropy"] == pytest.approx(8 / 7)


def test_sampled_thoughts_have_the_entropy_of_what_they_were_drawn_from(tiny, procedure, world):
    """The mean of -log p over many draws is the entropy of the distribution."""
    share = np.array([0.5, 0.25, 0.125, 0.125])

    class Drawing(tiny.engine):
        def _rollout(self, prompt, purpose, sample):
            draw = rng.generator(0, purpose, *prompt.key, sample)
            said = draw.choice(4, size=20, p=share)
            made = tiny.rollout(said.tolist())
            logp = np.append(np.log(share[said]), 0.0).astype(np.float32)
            return replace(made, logp=logp, action=np.arange(21) < 20)

    records = measure(
        tiny.scorer(), Drawing(), tiny.prompts(60), replace(procedure, controls=()), world
    )
    entropy = summarise(records, [], RESAMPLING)["thought"]["entropy"]
    assert entropy == pytest.approx(-(share @ np.log(share)), abs=0.03)
