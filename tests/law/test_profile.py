"""Intervals: their ends against an independent optimiser, their words where there is none, their coverage."""

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize
from scipy.stats import t

from rlpt.law.least_squares import fit
from rlpt.law.points import Points
from rlpt.law.power import Power
from rlpt.law.profile import intervals
from rlpt.law.sigmoid import Sigmoid

FREEDOM = 20 - 3


@pytest.fixture(scope="module")
def fitted(known):
    return fit(Sigmoid(known.R0), known.measured(1500, 8000, 20))


def error_of(known, points, theta, scale=1.0):
    """Independent of rlpt.law: (A, ln B, ln C_mid) -> sum of squares."""
    curve = known.sigmoid(points.compute_N, np.exp(theta[2]), np.exp(theta[1]), theta[0])
    return float((((points.value_N - curve) / scale) ** 2).sum())


def best_with(known, points, q, value, start, scale=1.0):
    """The least error with parameter q held, by scipy."""
    free = [i for i in range(3) if i != q]

    def error(found):
        theta = np.array(start)
        theta[q], theta[free] = value, found
        return error_of(known, points, theta, scale)

    begin = np.array(start)[free]
    return minimize(
        error, begin, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}
    ).fun


def test_the_fit_is_scipys(known, fitted) -> None:
    def residual(theta):
        points = fitted.points
        return points.value_N - known.sigmoid(
            points.compute_N, np.exp(theta[2]), np.exp(theta[1]), theta[0]
        )

    found = least_squares(residual, [0.6, np.log(2.0), np.log(2500)], xtol=1e-14, ftol=1e-14)
    assert fitted.error == pytest.approx(2 * found.cost, rel=1e-9)
    np.testing.assert_allclose(fitted.theta_Q, found.x, rtol=1e-5)
    assert fitted.noise == pytest.approx(np.sqrt(2 * found.cost / FREEDOM))


@pytest.mark.parametrize("q", [0, 1, 2], ids=["A", "B", "C_mid"])
def test_at_the_ends_of_an_interval_the_error_is_students(known, fitted, q: int) -> None:
    bounds = intervals(fitted)[Sigmoid.names[q]]
    rise = fitted.error * t.ppf(0.975, FREEDOM) ** 2 / FREEDOM
    for end in bounds:
        assert end is not None
        value = end if q == 0 else np.log(end)
        least = best_with(known, fitted.points, q, value, fitted.theta_Q)
        assert least - fitted.error == pytest.approx(rise, rel=1e-2)
    assert bounds[0] < fitted.values[Sigmoid.names[q]] < bounds[1]


def test_with_standard_errors_given_the_error_rises_by_the_square_of_1_96(known) -> None:
    points = known.measured(1500, 8000, 20)
    sd = np.linspace(0.004, 0.008, 20)
    weighted = fit(Sigmoid(known.R0), Points(points.compute_N, points.value_N, sd))
    for end in intervals(weighted)["A"]:
        assert end is not None
        least = best_with(known, points, 0, end, weighted.theta_Q, sd)
        assert least - weighted.error == pytest.approx(1.959964**2, rel=1e-2)


def test_a_curve_that_has_not_begun_to_bend_has_a_ceiling_without_an_upper_end(known) -> None:
    early = fit(Sigmoid(known.R0), known.measured(100, 1500, 15))
    low, high = intervals(early)["A"]
    assert high is None
    assert low is not None
    assert known.R0 < low < 0.61
    # The same seen from above: bits per byte that have only begun to fall.
    falling = Points(early.points.compute_N, -early.points.value_N)
    assert intervals(fit(Sigmoid(-known.R0), falling))["A"] == (None, pytest.approx(-low, rel=1e-3))


def test_noise_alone_bounds_nothing(known) -> None:
    compute = np.linspace(100, 1500, 15)
    flat = Points(compute, known.R0 + 0.006 * (-1.0) ** np.arange(15))
    assert intervals(fit(Sigmoid(known.R0), flat)) == dict.fromkeys(Sigmoid.names, (None, None))


def test_a_logarithm_has_no_ceiling_for_the_power_law() -> None:
    compute = np.linspace(100, 1500, 15)
    rising = Points(compute, 0.1 * np.log(compute) + np.random.default_rng(0).normal(0, 0.003, 15))
    low, high = intervals(fit(Power(1500.0), rising))["P*"]
    assert high is None
    assert low is not None


def test_a_curve_without_noise_is_known_exactly(known) -> None:
    compute = np.linspace(400, 16000, 8)
    exact = fit(Sigmoid(known.R0), Points(compute, known.sigmoid(compute, 2542, 1.92, 0.61)))
    for name, value in {"A": 0.61, "B": 1.92, "C_mid": 2542}.items():
        assert intervals(exact)[name] == pytest.approx((value, value), rel=1e-5)


def recovered(known, high: float, count: int, curves: int):
    """A and B of simulated ScaleRL runs, evaluated with their cadence and noise, from 1.5k GPU-hours on."""
    fits = [
        fit(Sigmoid(known.R0), known.measured(1500, high, count, seed=seed)).values
        for seed in range(curves)
    ]
    return np.array([[values["A"], values["B"]] for values in fits])


def test_scalerls_curve_is_recovered_to_the_spread_of_its_noise(known) -> None:
    # 100 evaluations over 16k GPU-hours. Half of them: A .611 +- .007, B 1.92 +- .11; all: A .610 +- .002.
    half, whole = recovered(known, 8000, 41, 30), recovered(known, 16000, 91, 12)
    assert half[:, 0].mean() == pytest.approx(0.611, abs=0.004)
    assert half[:, 0].std() == pytest.approx(0.007, abs=0.0025)
    assert half[:, 1].mean() == pytest.approx(1.92, abs=0.06)
    assert half[:, 1].std() == pytest.approx(0.11, abs=0.03)
    assert whole[:, 0].mean() == pytest.approx(0.610, abs=0.001)
    assert whole[:, 0].std() == pytest.approx(0.002, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scalerl", "scout", "8gen", "code"])
def test_the_interval_of_the_ceiling_covers_the_truth_95_times_in_100(known, name: str) -> None:
    truth = known.PUBLISHED[name]
    covered = [0, 0]
    for seed in range(200):
        fitted = fit(Sigmoid(known.R0), known.measured(1500, 8000, 41, truth, seed))
        found = intervals(fitted)
        for place, (parameter, value) in enumerate((("A", truth[2]), ("B", truth[1]))):
            low, high = found[parameter]
            covered[place] += (low is None or low <= value) and (high is None or value <= high)
    # 95% of 200, three standard deviations to either side.
    assert 180 <= covered[0] <= 199
    assert 180 <= covered[1] <= 199


def window_of(known, low: float, high: float):
    """The 100k run: 75 evaluations, of which some are fitted."""
    points = known.measured(1351, 100_000, 74, (10909, 1.70, 0.645), seed=1)
    return points.where((points.compute_N >= low) & (points.compute_N <= high))


@pytest.mark.parametrize("low", [0, 1500, 5000])
@pytest.mark.parametrize("high", [50_000, 100_000])
def test_the_window_hardly_moves_the_ceiling(known, low: int, high: int) -> None:
    # Published: A .645, .655, .645 and .645, B 1.70, 1.56, 1.70 and 1.67, by window.
    found = fit(Sigmoid(known.R0), window_of(known, low, high)).values
    assert found["A"] == pytest.approx(0.645, abs=0.01)
    assert found["B"] == pytest.approx(1.70, abs=0.15)


def test_a_power_law_reads_too_high_a_ceiling_off_early_points(known) -> None:
    # Published: 1.0 from 1.5k on, .74 from 5k on, where the sigmoid says .645.
    early = fit(Power(50_000.0), window_of(known, 1500, 50_000)).values["P*"]
    late = fit(Power(50_000.0), window_of(known, 5000, 50_000)).values["P*"]
    assert early > late > 0.68
    assert early > 0.8
