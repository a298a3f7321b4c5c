"""Calibration by hand: bins of equal mass, the error, the Brier score."""

import numpy as np
import pytest

from rlpt.evaluate.calibration import calibration


def test_the_error_is_the_gap_of_each_bin_weighed_by_its_size():
    confidence = np.array([0.9, 0.2, 0.6, 0.4, 0.8])
    right = np.array([True, False, False, True, True])
    # Two bins in the order of confidence: {.2, .4, .6} with 1/3 right, {.8, .9} with all right.
    found = calibration(confidence, right, bins=2)
    assert [row["count"] for row in found["bins"]] == [3, 2]
    assert [row["confidence"] for row in found["bins"]] == pytest.approx([0.4, 0.85])
    assert [row["accuracy"] for row in found["bins"]] == pytest.approx([1 / 3, 1.0])
    assert found["ece"] == pytest.approx(3 / 5 * (0.4 - 1 / 3) + 2 / 5 * 0.15)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.36 + 0.04) / 5)
    assert (found["confidence"], found["accuracy"]) == pytest.approx((0.58, 0.6))


def test_a_forecaster_that_is_right_as_often_as_it_says_has_little_error():
    draw = np.random.default_rng(0)
    confidence = draw.random(20_000)
    honest = calibration(confidence, draw.random(20_000) < confidence)
    boastful = calibration(np.sqrt(confidence), draw.random(20_000) < confidence)
    assert honest["ece"] < 0.02
    assert boastful["ece"] == pytest.approx(2 / 3 - 1 / 2, abs=0.02)
    # E[c (1 - c)] of a uniform c.
    assert honest["brier"] == pytest.approx(1 / 6, abs=0.01)


def test_fewer_forecasts_than_bins_have_a_bin_each():
    found = calibration(np.array([0.5, 0.25]), np.array([True, False]))
    assert [row["count"] for row in found["bins"]] == [1, 1]
    assert found["ece"] == pytest.approx(0.375)
