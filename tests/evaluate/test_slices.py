"""Parts of an evaluation: who is in them, and that a part's figures are those of its records alone."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.evaluate.continuation import measure
from rlpt.evaluate.quantities import Resampling, Sheet
from rlpt.evaluate.records import First
from rlpt.evaluate.slices import buckets, by_entropy, by_thought_length
from rlpt.evaluate.summary import summarise
from rlpt.evaluate.thoughts import distinct, template_rate

RESAMPLING = Resampling("document", draws=20, seed=1)


@pytest.fixture
def records(tiny, procedure, world):
    asked = replace(procedure, controls=("empty",))
    return measure(tiny.scorer(), tiny.engine(), tiny.prompts(32), asked, world)


def with_entropy(records, entropies, annotated=None):
    """Entropy number p for both thoughts of prompt p."""
    return [
        replace(
            record,
            firsts=record.firsts | {"no_think": First(0, -1.0, entropies[i // 2])},
            annotated_entropy=None if annotated is None else annotated[i // 2],
        )
        for i, record in enumerate(records)
    ]


def test_tiers_nest_and_begin_above_their_bound(records):
    entropies = [0.5, 0.51, 1.0, 1.01, 1.5, 1.51, *[0.1] * 26]
    found = by_entropy(Sheet.of(with_entropy(records, entropies)), RESAMPLING)["entropy_tiers"]
    assert (found["source"], found["nested"]) == ("policy", True)
    assert [found[t]["prompts"] for t in ("easy", "medium", "hard")] == [5, 3, 1]
    assert [found[t]["above"] for t in ("easy", "medium", "hard")] == [0.5, 1.0, 1.5]
    alone = summarise(records[10:12], [], RESAMPLING)
    assert found["hard"]["gain_heldout"]["mean"] == alone["gain_heldout"]["mean"]
    assert found["hard"]["next_token_accuracy_majority"] == alone["next_token_accuracy_majority"]


def test_annotations_come_before_the_policys_own_entropy(records):
    given = with_entropy(records, [0.0] * 32, [2.0] * 8 + [0.0] * 24)
    found = by_entropy(Sheet.of(given), RESAMPLING)
    assert found["entropy_tiers"]["source"] == found["entropy_quantiles"]["source"] == "annotations"
    assert found["entropy_tiers"]["hard"]["prompts"] == 8
    easier = with_entropy(records, [0.0] * 32)
    assert by_entropy(Sheet.of(easier), RESAMPLING)["entropy_tiers"]["easy"] == {
        "above": 0.5,
        "prompts": 0,
    }


def test_without_any_entropy_there_are_no_tiers(records):
    blind = [replace(r, firsts={n: First(f.token) for n, f in r.firsts.items()}) for r in records]
    assert by_entropy(Sheet.of(blind), RESAMPLING) == {}
    table = summarise(blind, [], RESAMPLING)
    assert "entropy_tiers" not in table
    assert table["calibration"] == {}


def test_quantiles_share_out_the_prompts(records):
    entropies = np.random.default_rng(0).permutation(32).astype(float).tolist()
    found = by_entropy(Sheet.of(with_entropy(records, entropies)), RESAMPLING)
    parts = found["entropy_quantiles"]["parts"]
    assert [(part["from"], part["to"], part["prompts"]) for part in parts] == [
        (0.0, 7.0, 8),
        (8.0, 15.0, 8),
        (16.0, 23.0, 8),
        (24.0, 31.0, 8),
    ]


def test_equal_values_share_a_bucket():
    found = buckets(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]), 4)
    assert [(members.tolist(), low, high) for members, low, high in found] == [
        ([0, 1, 2, 3, 4], 0.0, 0.0),
        ([5], 1.0, 1.0),
        ([6, 7], 2.0, 3.0),
    ]


def test_thoughts_are_told_apart_by_their_length(records):
    found = by_thought_length(Sheet.of(records), RESAMPLING)
    lengths = np.array([len(record.thought_ids) for record in records])
    assert sum(part["thoughts"] for part in found) == len(records)
    for part in found:
        own = [r for r, n in zip(records, lengths, strict=True) if part["from"] <= n <= part["to"]]
        gain = np.mean([(r.total("own") - r.total("no_think")) / 2 for r in own])
        assert part["gain_heldout"]["mean"] == pytest.approx(gain, abs=1e-9)
        assert part["thoughts"] == len(own)


def test_the_template_rate_is_the_share_of_the_commonest_opening():
    thoughts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9], [1, 2, 3, 9], [], [7]]
    assert template_rate(thoughts) == 2 / 5
    assert template_rate([[], []]) == 0.0
    assert template_rate([[7], [7], [7, 8]]) == 2 / 3


def test_distinct_n_counts_n_grams_of_all_thoughts_together():
    thoughts = [[1, 1, 2], [1, 2], [3], []]
    assert distinct(thoughts, 1) == 3 / 6
    # 11, 12, 12.
    assert distinct(thoughts, 2) == 2 / 3
    assert distinct(thoughts, 4) is None
