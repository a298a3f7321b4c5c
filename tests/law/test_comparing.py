"""Several runs under one ceiling, and a law that is asked to predict."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import f

from rlpt.law.ceiling import shared
from rlpt.law.holdout import held_out
from rlpt.law.least_squares import fit
from rlpt.law.points import Points
from rlpt.law.profile import intervals
from rlpt.law.sigmoid import Sigmoid


def alone(known, *truths, noise=0.006):
    """One fit a truth, over half of ScaleRL's compute and all of it in turn."""
    highs = (16000, 8000, 12000)
    return [
        fit(Sigmoid(known.R0), known.measured(1500, highs[i], 30, truth, seed=i, noise=noise))
        for i, truth in enumerate(truths)
    ]


def test_runs_with_one_ceiling_share_it_and_keep_their_own_shapes(known) -> None:
    truths = ((2542, 1.92, 0.61), (4000, 1.5, 0.61), (3000, 2.2, 0.61))
    together = shared(alone(known, *truths, noise=1e-6))
    assert together.ceiling == pytest.approx(0.61, abs=1e-4)
    for found, (midpoint, exponent, _) in zip(together.fits, truths, strict=True):
        assert found.values == pytest.approx(
            {"A": 0.61, "B": exponent, "C_mid": midpoint}, rel=1e-3
        )


def test_the_shared_fit_is_scipys_over_all_points(known) -> None:
    fits = alone(known, (2542, 1.92, 0.61), (4000, 1.5, 0.60))

    def residual(theta):
        parts = [
            each.points.value_N
            - known.sigmoid(
                each.points.compute_N, np.exp(theta[2 + 2 * i]), np.exp(theta[1 + 2 * i]), theta[0]
            )
            for i, each in enumerate(fits)
        ]
        return np.concatenate(parts)

    found = least_squares(residual, [0.6, 0.6, 7.8, 0.4, 8.3], xtol=1e-14, ftol=1e-14)
    together = shared(fits)
    assert together.ceiling == pytest.approx(found.x[0], rel=1e-5)
    assert together.fits[1].theta_Q[1:] == pytest.approx(found.x[3:], rel=1e-4)
    # One parameter fewer than two runs alone have.
    least, separate = 2 * found.cost, sum(each.error for each in fits)
    statistic = (least - separate) / (separate / (60 - 6))
    assert together.p_value == pytest.approx(f.sf(statistic, 1, 54), rel=1e-3)


def test_three_runs_have_two_ceilings_to_lose(known) -> None:
    fits = alone(known, (2542, 1.92, 0.61), (4000, 1.5, 0.60), (3000, 2.2, 0.61))
    together = shared(fits)
    least, separate = (sum(each.error for each in group) for group in (together.fits, fits))
    statistic = (least - separate) / 2 / (separate / (90 - 9))
    assert together.p_value == pytest.approx(f.sf(statistic, 2, 81), rel=1e-6)


def test_an_interval_from_two_runs_is_narrower_than_from_one(known) -> None:
    fits = alone(known, (2542, 1.92, 0.61), (4000, 1.5, 0.61))
    low, high = shared(fits).bounds
    assert low is not None
    assert high is not None
    assert low < 0.61 < high
    for each in fits:
        own_low, own_high = intervals(each)["A"]
        assert own_low is not None
        assert own_high is not None
        assert high - low < own_high - own_low


def test_runs_that_go_elsewhere_do_not_fit_one_ceiling(known) -> None:
    assert shared(alone(known, (2542, 1.92, 0.61), (2542, 1.92, 0.52))).p_value < 1e-6
    assert shared(alone(known, (2542, 1.92, 0.61), (4000, 1.5, 0.61))).p_value > 0.05


def test_a_run_that_cannot_say_borrows_the_ceiling_of_one_that_can(known) -> None:
    sure = fit(Sigmoid(known.R0), known.measured(1500, 16000, 30))
    early = fit(Sigmoid(known.R0), known.measured(100, 1500, 15, seed=3))
    assert intervals(early)["A"][1] is None
    together = shared([sure, early])
    assert together.ceiling == pytest.approx(0.61, abs=0.01)
    assert None not in together.bounds
    assert together.fits[1].values["C_mid"] == pytest.approx(2542, rel=0.3)


def test_a_law_without_noise_predicts_its_second_half_and_a_shift_is_its_miss(known) -> None:
    compute = np.linspace(400, 16000, 40)
    exact = known.sigmoid(compute, 2542, 1.92, 0.61)
    miss = held_out(lambda _: Sigmoid(known.R0), Points(compute, exact), 0.5)
    assert miss
    assert (len(miss.fitted.points), len(miss.points), miss.until) == (20, 20, 8000)
    assert miss.rms == pytest.approx(0, abs=1e-6)
    # The later half 0.03 and 0.01 higher in turn: mean .02, rms sqrt((.0009 + .0001) / 2).
    later = exact + np.where(compute > 8000, np.where(np.arange(40) % 2, 0.03, 0.01), 0.0)
    shifted = held_out(lambda _: Sigmoid(known.R0), Points(compute, later), 0.5)
    assert shifted
    assert shifted.signed == pytest.approx(0.02, abs=1e-6)
    assert shifted.rms == pytest.approx(np.sqrt(0.0005), abs=1e-6)


def test_the_law_that_predicts_has_seen_the_first_part_alone(known) -> None:
    points = known.measured(400, 16000, 40)
    seen = []

    def law(part: Points) -> Sigmoid:
        seen.append(part.compute_N)
        return Sigmoid(known.R0)

    assert held_out(law, points, 0.25)
    assert seen[0].max() == 12000
    # Three points are no fit.
    assert held_out(law, points, 0.92) is None
    assert held_out(law, points, 0.9)
