"""Intervals, aggregates and the verdict, against values by hand and against independent
computations.
"""

import numpy as np
import pytest

from rlpt import statistics
from rlpt.statistics import Interval, log_mean_exp, pair, ratio_intervals, verdict


def one(numerator, denominator, cluster, draws=2000, seed=0):
    sums = {"q": (np.asarray(numerator, float), np.asarray(denominator, float))}
    return ratio_intervals(sums, np.asarray(cluster), draws=draws, seed=seed)["q"]


def test_the_mean_is_a_ratio_of_sums_not_a_mean_of_ratios():
    # 3 nats over 1 token and 1 nat over 7 tokens: 4/8, while the mean of the ratios is 1.571.
    assert one([3, 1], [1, 7], ["a", "b"]).mean == pytest.approx(0.5)


def test_no_interval_under_thirty_clusters_however_many_records():
    few = one(np.arange(290), np.ones(290), np.arange(290) % 29)
    enough = one(np.arange(300), np.ones(300), np.arange(300) % 30)
    assert (few.ci_low, few.ci_high, few.clusters) == (None, None, 29)
    assert few.reason == "29 clusters, fewer than the 30 an interval needs"
    assert enough.ci_low is not None
    assert enough.reason is None


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    found = one(values, np.ones(400), np.arange(400), draws=20_000)
    error = values.std() / np.sqrt(400)
    assert found.ci_low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.ci_high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_the_interval_of_a_ratio_follows_the_delta_method():
    draw = np.random.default_rng(2)
    tokens = draw.integers(1, 20, size=500).astype(float)
    sums = 0.3 * tokens + draw.normal(size=500) * np.sqrt(tokens)
    found = one(sums, tokens, np.arange(500), draws=20_000)
    ratio = sums.sum() / tokens.sum()
    error = np.sqrt(((sums - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert (found.ci_low, found.ci_high) == pytest.approx(
        (ratio - 1.96 * error, ratio + 1.96 * error), abs=0.1 * error
    )


def test_repeating_every_record_within_its_cluster_narrows_nothing():
    values, ones, cluster = np.random.default_rng(3).normal(size=100), np.ones(100), np.arange(100)
    once = one(values, ones, cluster)
    often = one(np.repeat(values, 9), np.ones(900), np.repeat(cluster, 9))
    assert (often.ci_low, often.ci_high) == pytest.approx((once.ci_low, once.ci_high), rel=1e-12)


def test_the_seed_decides_the_draws_and_the_memory_limit_does_not(monkeypatch):
    values, ones, cluster = np.random.default_rng(4).normal(size=60), np.ones(60), np.arange(60)
    whole = one(values, ones, cluster, seed=5)
    assert one(values, ones, cluster, seed=6) != whole
    monkeypatch.setattr(statistics, "_CHUNK", 60 * 7)
    pieces = one(values, ones, cluster, seed=5)
    assert (pieces.ci_low, pieces.ci_high) == pytest.approx(
        (whole.ci_low, whole.ci_high), rel=1e-12
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(6)
    hits = 0
    for trial in range(200):
        level = np.repeat(draw.normal(size=50), 4)
        found = one(
            level + draw.normal(size=200), np.ones(200), np.arange(200) // 4, draws=400, seed=trial
        )
        hits += found.ci_low < 0 < found.ci_high
    # 95% nominal, a little less with 50 clusters; ignoring clusters would give about 70%.
    assert 0.89 <= hits / 200 <= 0.985


def test_log_mean_exp_averages_probabilities():
    probability = np.array([[0.5, 0.25], [1e-3, 3e-3]])
    assert np.exp(log_mean_exp(np.log(probability))) == pytest.approx([0.375, 2e-3])
    assert log_mean_exp(np.array([[-5000.0, -5000.0]])) == pytest.approx([-5000.0])


def interval(low, high):
    return Interval((low + high) / 2, low, high, 100)


ABOVE = interval(0.1, 0.2)
ALL_BEATEN = {"empty": ABOVE, "filler": ABOVE, "other_document": ABOVE}


@pytest.mark.parametrize(
    ("gain", "own_minus", "label"),
    [
        (ABOVE, ALL_BEATEN, "useful"),
        (ABOVE, {**ALL_BEATEN, "empty": interval(-0.01, 0.2)}, "inconclusive"),
        (ABOVE, {**ALL_BEATEN, "filler": interval(0.0, 0.2)}, "inconclusive"),
        (ABOVE, {**ALL_BEATEN, "other_document": interval(-0.2, -0.1)}, "inconclusive"),
        (ABOVE, {"empty": ABOVE, "filler": ABOVE}, "inconclusive"),  # one was not measured
        (interval(-0.01, 0.2), ALL_BEATEN, "inconclusive"),
        (interval(-0.005, 0.005), ALL_BEATEN, "harmless"),
        (interval(-0.0051, 0.004), ALL_BEATEN, "inconclusive"),
        (interval(-0.004, 0.0051), ALL_BEATEN, "inconclusive"),
        (interval(0.001, 0.004), ALL_BEATEN, "useful"),  # small, but it beats everything
        (interval(-0.004, -0.001), ALL_BEATEN, "harmless"),
        (interval(-0.3, -0.1), ALL_BEATEN, "harmful"),
        (interval(-0.3, 0.0), ALL_BEATEN, "inconclusive"),
        (Interval(0.5, None, None, 12), ALL_BEATEN, "inconclusive"),
    ],
)
def test_the_verdict_is_the_first_definition_that_holds(gain, own_minus, label):
    assert verdict(gain, own_minus)[0] == label


def test_the_verdict_gives_its_reasons():
    assert verdict(Interval(0.5, None, None, 12), {})[1] == [
        "no interval: 12 clusters, fewer than the 30 an interval needs"
    ]
    reasons = verdict(ABOVE, {"empty": ABOVE, "filler": interval(-0.1, 0.1)})[1]
    assert "own - filler = +0.0000 [-0.1000, +0.1000]" in reasons
    assert "control other_document was not measured, so useful cannot be claimed" in reasons


def test_pairs_are_matched_by_key_and_a_missing_one_is_refused():
    assert pair([("a", 1), ("b", 1)], [("b", 1), ("a", 1)]).tolist() == [1, 0]
    with pytest.raises(
        ValueError,
        match="2 records before, 2 after, 1 in common; evaluate both on the same prompts",
    ):
        pair([("a", 1), ("b", 1)], [("a", 1), ("c", 1)])


def test_few_clusters_widen_the_percentiles_as_students_t_does():
    from scipy.stats import norm, t

    for clusters in (30, 50, 128, 10_000):
        below, above = statistics.expanded(clusters)
        wide = np.sqrt(clusters / (clusters - 1)) * t.ppf(0.975, clusters - 1)
        assert below == pytest.approx(norm.cdf(-wide), abs=1e-5)
        assert above == pytest.approx(1 - below)
    assert statistics.expanded(10**9)[0] == pytest.approx(0.025, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [30, 60])
def test_ratios_of_clusters_of_all_sizes_are_covered_as_often_as_is_said(clusters):
    """1 to 4 records a cluster, 1 to 19 tokens each, a level of its own and skewed noise; the truth is 0.3."""
    draw, hits = np.random.default_rng(clusters), 0
    for trial in range(2000):
        cluster = np.repeat(np.arange(clusters), draw.integers(1, 5, size=clusters))
        tokens = draw.integers(1, 20, size=len(cluster)).astype(float)
        level = draw.normal(size=clusters)[cluster]
        noise = np.sqrt(tokens) * (draw.standard_exponential(len(cluster)) - 1)
        found = one(tokens * (0.3 + level) + noise, tokens, cluster, draws=800, seed=trial)
        hits += found.ci_low < 0.3 < found.ci_high
    assert 0.93 <= hits / 2000 <= 0.97
