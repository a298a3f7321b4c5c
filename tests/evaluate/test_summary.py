"""The summary's numbers against an independent float64 computation, and its warnings against what
they warn of.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rlpt.evaluate.bits_per_byte import bits_per_byte, measure_windows
from rlpt.evaluate.continuation import measure
from rlpt.evaluate.evaluation import evaluate, headline
from rlpt.evaluate.paired import bits_change, change
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.summary import summarise
from rlpt.evaluate.thoughts import thought_statistics

RESAMPLING = Resampling("document", draws=300, seed=1)


@pytest.fixture
def records(tiny, procedure, world):
    return measure(tiny.scorer(), tiny.engine(), tiny.prompts(80), procedure, world)


def average(records, of):
    return float(np.mean([of(record) for record in records]))


def test_gain_controls_and_accuracies_agree_with_their_definitions(records):
    table = summarise(records, [], RESAMPLING)
    # Every continuation has 2 tokens and 4 bytes, so ratios of sums are plain means here.
    gain = average(records, lambda r: (r.logp["own"].sum() - r.logp["no_think"].sum()) / 2)
    assert table["gain_heldout"]["mean"] == pytest.approx(gain, abs=1e-6)
    assert table["gain_heldout"]["per_byte"] == pytest.approx(gain / 2, abs=1e-6)
    for name in ("empty", "filler", "context_copy", "other_document", "shuffled"):
        against_none = average(
            records, lambda r, n=name: (r.logp[n].sum() - r.logp["no_think"].sum()) / 2
        )
        against_own = average(
            records, lambda r, n=name: (r.logp["own"].sum() - r.logp[n].sum()) / 2
        )
        assert table["controls"][name]["gain"]["mean"] == pytest.approx(against_none, abs=1e-6)
        assert table["controls"][name]["own_minus_control"]["mean"] == pytest.approx(
            against_own, abs=1e-6
        )
    wrong = average(
        records, lambda r: (r.logp["wrong_target"].sum() - r.logp["wrong_no_think"].sum()) / 2
    )
    assert table["wrong_target"]["mean"] == pytest.approx(wrong, abs=1e-6)
    assert table["next_token_accuracy_thought"] == average(
        records, lambda r: r.first_correct("own")
    )
    assert table["next_token_accuracy_no_think"] == average(
        records, lambda r: r.first_correct("no_think")
    )
    first = average(records, lambda r: r.logp["own"][0] - r.logp["no_think"][0])
    assert table["first_token"]["gain"]["mean"] == pytest.approx(first, abs=1e-6)
    assert table["logp_thought"]["mean"] == pytest.approx(
        average(records, lambda r: r.logp["own"].sum() / 2), abs=1e-6
    )


def test_ratios_weigh_prompts_by_their_tokens(tiny, procedure, world):
    prompts = [tiny.prompt("a", [1], [2]), tiny.prompt("b", [1], [3, 3, 3])]
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout([2])
    table = summarise(measure(tiny.scorer(), engine, prompts, procedure, world), [], RESAMPLING)
    # One token rises from 1/6 to 3/8, three fall from 1/6 to 1/8: together four tokens.
    assert table["gain_heldout"]["mean"] == pytest.approx(
        (math.log(18 / 8) + 3 * math.log(6 / 8)) / 4, abs=1e-6
    )
    assert table["gain_heldout"]["ci_low"] is None
    assert table["verdict"] == "inconclusive"


def test_marginal_gain_is_the_log_of_the_mean_probability_over_thoughts(tiny, procedure, world):
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout([2] if sample else [])
    records = measure(
        tiny.scorer(), engine, [tiny.prompt(d, [1], [2]) for d in "abc"], procedure, world
    )
    gain = summarise(records, [], RESAMPLING)["gain_heldout"]
    marginal = math.log((1 / 6 + 3 / 8) / 2) - math.log(1 / 6)
    mean = (0 + math.log(18 / 8)) / 2
    assert gain["marginal_n"] == pytest.approx(marginal, abs=1e-6)
    assert gain["marginal_minus_mean"]["mean"] == pytest.approx(marginal - mean, abs=1e-6)
    assert gain["num_thoughts"] == 2


def test_a_clean_seam_passes_the_null_and_a_broken_one_is_named(tiny, procedure, world):
    prompts = tiny.prompts(40)
    clean = summarise(
        measure(tiny.scorer(), tiny.engine(), prompts, procedure, world), [], RESAMPLING
    )
    assert clean["null"] == {"mean": 0.0, "max_abs": 0.0, "limit": 1e-5, "passes": True}
    broken = measure(tiny.scorer(seam=-5e-4), tiny.engine(), prompts, procedure, world)
    table = summarise(broken, [], RESAMPLING)
    assert table["null"]["mean"] == pytest.approx(-5e-4, rel=1e-3)
    assert not table["null"]["passes"]
    assert any("null control" in reason for reason in table["verdict_reasons"])
    assert summarise(broken, [], RESAMPLING, "bfloat16")["null"]["passes"]


def test_a_thought_that_helps_any_continuation_fails_the_wrong_target(tiny, procedure, world):
    prompts = [tiny.prompt(f"d{i}", [0, 1], [2 + i % 2, 2]) for i in range(60)]
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout([2, 3])
    table = summarise(measure(tiny.scorer(), engine, prompts, procedure, world), [], RESAMPLING)
    assert table["wrong_target"]["mean"] == pytest.approx(math.log(18 / 10), abs=1e-6)
    assert not table["wrong_target"]["passes"]
    assert any("wrong_target" in reason for reason in table["verdict_reasons"])
    # The same thought stands in every document: it cannot beat other_document.
    assert table["controls"]["other_document"]["own_minus_control"]["mean"] == pytest.approx(
        0, abs=1e-6
    )
    assert table["verdict"] == "inconclusive"


def oracle(tiny):
    """Names the answer, which a real engine cannot see."""
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(prompt.continuation_ids.tolist())
    return engine


def test_a_thought_that_names_the_answer_is_useful(tiny, procedure, world):
    table = summarise(
        measure(tiny.scorer(), oracle(tiny), tiny.prompts(80), procedure, world), [], RESAMPLING
    )
    assert table["verdict"] == "useful"
    assert table["wrong_target"]["passes"]
    assert table["thought"]["named_answer_rate"] == 1.0


def test_a_thought_that_spreads_mass_elsewhere_is_harmful(tiny, procedure, world):
    engine = tiny.engine()
    engine._rollout = lambda prompt, purpose, sample: tiny.rollout(
        [i for i in range(6) if i not in prompt.continuation_ids]
    )
    table = summarise(
        measure(tiny.scorer(), engine, tiny.prompts(80), procedure, world), [], RESAMPLING
    )
    assert table["verdict"] == "harmful"


def test_thoughts_that_change_nothing_are_harmless(tiny, procedure, world):
    table = summarise(
        measure(tiny.scorer(1.0), tiny.engine(), tiny.prompts(80), procedure, world), [], RESAMPLING
    )
    assert table["verdict"] == "harmless"


def test_domains_are_summarised_apart_with_documents_as_units(records):
    table = summarise(records, [], Resampling("domain", 300, 1))
    assert table["gain_heldout"]["clusters"] == 2
    assert table["gain_heldout"]["ci_low"] is None
    part = [record for record in records if record.domain == "a"]
    block = table["per_domain"]["a"]
    assert block["gain_heldout"]["mean"] == pytest.approx(
        summarise(part, [], RESAMPLING)["gain_heldout"]["mean"]
    )
    assert block["gain_heldout"]["clusters"] == len({record.document for record in part})
    assert (
        sum(table["per_domain"][d]["prompts"] for d in table["per_domain"])
        == table["evaluation"]["prompts"]
    )


def test_thought_statistics_by_hand(records):
    sizes = [0, 3, 3, 1]
    chosen = [
        replace(record, thought_ids=np.arange(size), finish=finish, named_prefix=named)
        for record, size, finish, named in zip(
            records, sizes, ("budget", "closer", "closer", "closer"), (0, 2, 0, 1), strict=False
        )
    ]
    table = thought_statistics(chosen)
    assert table["mean_len"] == 7 / 4
    assert table["len_histogram"] == [1, 1, 0, 2]
    assert (table["closer_rate"], table["empty_rate"], table["distinct_rate"]) == (0.75, 0.25, 0.75)
    assert (table["named_answer_rate"], table["named_prefix_mean"]) == (0.5, 0.75)


def test_a_missing_wrong_target_is_counted_not_filled_in(tiny, procedure, world):
    prompts = [tiny.prompt(f"d{i}", [1], [2]) for i in range(4)]
    records = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world)
    assert "wrong_target" not in summarise(records, [], RESAMPLING)
    mixed = [*records, *measure(tiny.scorer(), tiny.engine(), tiny.prompts(4), procedure, world)]
    assert summarise(mixed, [], RESAMPLING)["wrong_target"]["records_without"] == 8


def test_the_wrong_target_is_compared_with_its_own_score_without_a_thought(records):
    easier = [
        replace(r, logp={**r.logp, "wrong_no_think": r.logp["wrong_no_think"] + np.float32(0.25)})
        for r in records
    ]
    means = [summarise(r, [], RESAMPLING)["wrong_target"]["mean"] for r in (records, easier)]
    assert means[1] - means[0] == pytest.approx(-0.25, abs=1e-6)


def test_change_is_paired_by_key_whatever_the_order(tiny, procedure, world):
    prompts = tiny.prompts(80)
    before = measure(tiny.scorer(1.0), tiny.engine(), prompts, procedure, world)
    after = measure(tiny.scorer(), tiny.engine(), prompts, procedure, world)
    found = change(list(reversed(before)), after, RESAMPLING)["gain"]
    gains = [summarise(r, [], RESAMPLING)["gain_heldout"]["mean"] for r in (before, after)]
    assert found.mean == pytest.approx(gains[1] - gains[0], abs=1e-6)
    # Pairing removes what prompts have in common: against itself nothing is left to spread.
    still = change(list(reversed(after)), after, RESAMPLING)["gain"]
    assert (still.mean, still.ci_low, still.ci_high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="evaluate both on the same prompts"):
        change(before[1:], after, RESAMPLING)


def test_bits_per_byte_by_hand(tiny, world):
    trunks = [tiny.prompt("a", [1, 2, 3], [4]).trunk, tiny.prompt("b", [1], [2]).trunk]
    windows = measure_windows(tiny.scorer(), trunks, world, batch=1)
    # Each token but the first of its window costs log2(6) bits and has two bytes.
    assert bits_per_byte(windows, "document", draws=9, seed=0).mean == pytest.approx(
        math.log2(6) / 2, rel=1e-6
    )
    assert [(w.num_tokens, w.num_bytes) for w in windows] == [(3, 6), (1, 2)]
    better = [replace(window, nats=window.nats - 0.5 * window.num_bytes) for window in windows]
    moved = bits_change(list(reversed(windows)), better, RESAMPLING)
    assert moved.mean == pytest.approx(-0.5 / math.log(2))


def test_an_evaluation_is_plain_json_and_its_headline_has_the_contracts_keys(
    tiny, procedure, world
):
    prompts = tiny.prompts(80)
    trunks = [prompt.trunk for prompt in prompts]
    ends = [
        evaluate(tiny.scorer(odds), oracle(tiny), prompts, trunks, procedure, RESAMPLING, world)
        for odds in (1.0, 3.0)
    ]
    assert json.loads(json.dumps(ends[1].summary, allow_nan=False)) == ends[1].summary
    table = json.loads(json.dumps(headline(*ends), allow_nan=False))
    for name in (
        "gain_heldout_before",
        "gain_heldout_after",
        "gain_change",
        "bits_per_byte_before",
    ):
        assert {"mean", "ci_low", "ci_high"} <= table[name].keys()
    moved = table["gain_heldout_after"]["mean"] - table["gain_heldout_before"]["mean"]
    assert table["gain_change"]["mean"] == pytest.approx(moved)
    assert ends[1].gain == table["gain_heldout_after"]["mean"]
    assert table["bits_per_byte_change"]["mean"] == 0.0
    assert (table["verdict_before"], table["verdict"]) == ("harmless", "useful")
    assert "next_token_accuracy_thought_after" in table


def test_the_same_evaluation_twice_gives_the_same_summary(tiny, procedure, world):
    def run():
        return evaluate(
            tiny.scorer(), tiny.engine(), tiny.prompts(70), [], procedure, RESAMPLING, world
        ).summary

    assert run() == run()
