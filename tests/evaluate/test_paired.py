"""Two models at several seeds: what is pooled, what is over seeds, and what must fit."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.evaluate.continuation import measure
from rlpt.evaluate.paired import change, change_over_seeds
from rlpt.evaluate.quantities import Resampling

RESAMPLING = Resampling("document", draws=200, seed=1)


@pytest.fixture
def records(tiny, procedure, world):
    asked = replace(procedure, controls=())
    return measure(tiny.scorer(), tiny.engine(), tiny.prompts(80), asked, world)


def raised(records, nats, noise_seed):
    """The same thoughts, each worth ``nats`` a token more, give or take."""
    draw = np.random.default_rng(noise_seed)
    return [
        replace(r, logp=r.logp | {"own": r.logp["own"] + np.float32(nats + 0.01 * draw.normal())})
        for r in records
    ]


def test_seeds_are_paired_one_by_one_and_pooled_over_prompts(records):
    before = [raised(records, 0.0, seed) for seed in range(3)]
    after = [raised(records, level, 10 + seed) for seed, level in enumerate((0.1, 0.2, 0.6))]
    table = change_over_seeds(before, after, RESAMPLING)
    found, over = table["gain"], table["over_seeds"]["gain"]
    means = [
        change(old, new, RESAMPLING)["gain"].mean for old, new in zip(before, after, strict=True)
    ]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert over["mean"] == pytest.approx(np.mean(means))
    # Student's t of two degrees of freedom: 4.303.
    half = 4.302653 * np.std(means, ddof=1) / np.sqrt(3)
    assert over["ci_high"] - over["mean"] == pytest.approx(half)
    # Documents agree with each other about these changes, seeds do not.
    assert found["ci_high"] - found["ci_low"] < 0.01 < half


def test_a_document_is_drawn_with_its_records_of_all_seeds(records):
    """Three copies of one seed know no more than one."""
    after = raised(records, 0.3, 5)
    once = change(records, after, RESAMPLING)["gain"]
    thrice = change_over_seeds([records] * 3, [after] * 3, RESAMPLING)["gain"]
    assert (thrice["ci_low"], thrice["ci_high"]) == pytest.approx((once.ci_low, once.ci_high))
    assert thrice["clusters"] == once.clusters


def test_two_seeds_have_no_interval_over_seeds(records):
    found = change_over_seeds([records] * 2, [raised(records, 0.1, 0)] * 2, RESAMPLING)
    over = found["over_seeds"]["gain"]
    assert (over["ci_low"], over["ci_high"]) == (None, None)
    assert found["gain"]["ci_low"] is not None
    assert "over_seeds" not in change_over_seeds([records], [records], RESAMPLING)


def test_what_does_not_fit_is_refused(records):
    with pytest.raises(ValueError, match="2 seeds before, 1 after; give each as many"):
        change_over_seeds([records] * 2, [records], RESAMPLING)
    with pytest.raises(ValueError, match="evaluate both on the same prompts"):
        change_over_seeds([records], [records[1:]], RESAMPLING)


def test_only_what_both_have_measured_is_compared(records):
    greedy = [
        replace(
            r,
            logp=r.logp | {"greedy": r.logp["own"]},
            firsts=r.firsts | {"greedy": r.firsts["own"]},
        )
        for r in records
    ]
    assert "gain_greedy" not in change(records, greedy, RESAMPLING)
    assert change(greedy, greedy, RESAMPLING)["gain_greedy"].mean == 0.0
