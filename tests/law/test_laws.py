"""The two laws: their formulas, their derivatives, their coarse grids and what they become without a ceiling."""

import math

import numpy as np
import pytest

from rlpt.law.least_squares import best_with, fit
from rlpt.law.points import Points
from rlpt.law.power import Power
from rlpt.law.sigmoid import Sigmoid

COMPUTE = np.geomspace(300, 20000, 12)
LAWS = {
    "sigmoid": (Sigmoid(0.3), np.array([0.61, math.log(1.92), math.log(2542)])),
    "falling": (Sigmoid(2.4), np.array([1.9, math.log(0.7), math.log(900)])),
    "power": (Power(20000.0), np.array([0.45, math.log(0.4), -0.08])),
}


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]


def test_the_sigmoid_is_half_way_at_c_mid_and_the_papers_formula_everywhere(known) -> None:
    theta = LAWS["sigmoid"][1]
    curve = LAWS["sigmoid"][0].curve(theta[None], np.array([2542.0, 5084.0]))[0]
    assert curve[0] == pytest.approx(0.455, abs=1e-12)
    # .3 + .31 / (1 + 2^-1.92) = .3 + .31 / 1.264255
    assert curve[1] == pytest.approx(0.3 + 0.31 / (1 + 2**-1.92), abs=1e-12)
    many = LAWS["sigmoid"][0].curve(theta[None], COMPUTE)[0]
    np.testing.assert_allclose(many, known.sigmoid(COMPUTE, 2542, 1.92, 0.61), rtol=1e-12)


def test_the_power_law_is_the_papers_formula() -> None:
    law, theta = LAWS["power"]
    plain = law.plain(theta)
    assert plain["A"] == pytest.approx(-0.08 * 20000**0.4)
    by_hand = plain["A"] / COMPUTE ** plain["alpha"] + plain["P*"]
    np.testing.assert_allclose(law.curve(theta[None], COMPUTE)[0], by_hand, rtol=1e-12)


def test_slopes_are_the_derivatives_of_the_curve(law) -> None:
    law, theta = law
    slopes = law.slopes(theta[None], COMPUTE)[0]
    for q in range(3):
        step = np.zeros(3)
        step[q] = 1e-6
        ahead, behind = law.curve(np.stack([theta + step, theta - step]), COMPUTE)
        np.testing.assert_allclose(slopes[:, q], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_a_cell_holds_the_linear_least_squares_of_its_shape(law, weighted: bool) -> None:
    law, theta = law
    random = np.random.default_rng(0)
    sd = random.uniform(0.5, 2.0, len(COMPUTE)) * 0.01
    value = law.curve(theta[None], COMPUTE)[0] + random.normal(0, 0.01, len(COMPUTE))
    points = Points(COMPUTE, value, sd if weighted else None)
    scale = sd if weighted else np.ones(len(COMPUTE))
    cells = law.cells(points)
    for cell in random.integers(len(cells.theta_MQ), size=5):
        shape = cells.theta_MQ[cell].copy()
        linear = [0] if isinstance(law, Sigmoid) else [0, 2]
        columns = law.slopes(shape[None], COMPUTE)[0][:, linear] / scale[:, None]
        shape[linear] = 0.0
        base = law.start * (1 - law.slopes(shape[None], COMPUTE)[0][:, 0]) if linear == [0] else 0.0
        found, *_ = np.linalg.lstsq(columns, (value - base) / scale, rcond=None)
        left = (value - base) / scale - columns @ found
        np.testing.assert_allclose(cells.theta_MQ[cell][linear], found, rtol=1e-5, atol=1e-7)
        assert cells.error_M[cell] == pytest.approx(left @ left, rel=1e-5)
        # The ceiling moved by .1, the other linear parameter at its best for it.
        moved = (value - base) / scale - columns[:, 0] * (found[0] + 0.1)
        if len(linear) == 2:
            moved = moved - columns[:, 1] * (columns[:, 1] @ moved) / (
                columns[:, 1] @ columns[:, 1]
            )
        rise = float(moved @ moved) - float(left @ left)
        assert cells.curvature_M[cell] * 0.01 == pytest.approx(rise, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    "name",
    ["scalerl", "32k", "8gen", "24gen", "32gen", "scout", "bs512", "bs2048", "math", "code"],
)
def test_every_published_curve_is_recovered_exactly_without_noise(known, name: str) -> None:
    compute = np.linspace(400, 16000, 40)
    found = fit(
        Sigmoid(known.R0), Points(compute, known.sigmoid(compute, *known.PUBLISHED[name]))
    ).values
    midpoint, exponent, ceiling = known.PUBLISHED[name]
    assert found == pytest.approx({"A": ceiling, "B": exponent, "C_mid": midpoint}, rel=1e-5)


@pytest.mark.parametrize(
    ("ceiling", "amplitude"), [(0.45, -3.0), (2.0, 30.0)], ids=["rises", "falls"]
)
def test_a_power_law_is_recovered_exactly_without_noise(ceiling: float, amplitude: float) -> None:
    compute = np.linspace(100, 1200, 12)
    found = fit(Power(1200.0), Points(compute, amplitude / compute**0.5 + ceiling)).values
    assert found == pytest.approx({"P*": ceiling, "alpha": 0.5, "A": amplitude}, rel=1e-5)


def test_units_of_compute_and_of_value_change_nothing_but_themselves(known) -> None:
    points = known.measured(1500, 16000, 30)
    plain = fit(Sigmoid(known.R0), points).values
    flops = fit(Sigmoid(known.R0), Points(points.compute_N * 1e18, points.value_N)).values
    mirrored = fit(Sigmoid(-10 * known.R0), Points(points.compute_N, -10 * points.value_N)).values
    assert flops == pytest.approx(plain | {"C_mid": plain["C_mid"] * 1e18}, rel=1e-5)
    assert mirrored == pytest.approx(plain | {"A": -10 * plain["A"]}, rel=1e-5)


def test_a_sigmoid_without_a_ceiling_is_where_the_error_goes_as_the_ceiling_rises(known) -> None:
    points = known.measured(1500, 8000, 30)
    fitted = fit(Sigmoid(known.R0), points)
    far = best_with(fitted, {0: np.array([1e4])})[0]
    assert far[0] == pytest.approx(fitted.law.limit_error(points, 1), rel=1e-3)
    # Downwards there is none: nothing of a rising curve is left but its start.
    rise = points.value_N - known.R0
    assert fitted.law.limit_error(points, -1) == pytest.approx(rise @ rise)


def test_a_power_law_without_a_ceiling_is_a_straight_line_over_log_compute(known) -> None:
    points = known.measured(300, 3000, 30)
    law = Power(3000.0)
    line = np.polynomial.Polynomial.fit(np.log(points.compute_N), points.value_N, 1)
    left = points.value_N - line(np.log(points.compute_N))
    assert law.limit_error(points, 1) == pytest.approx(left @ left)
    spread = points.value_N - points.value_N.mean()
    assert law.limit_error(points, -1) == pytest.approx(spread @ spread)
