"""Figures as lines: the verdict first, intervals whole, nothing a reader has to decode."""

from rlpt import summary

GAIN = {"mean": 0.123456, "ci_low": -0.5, "ci_high": 1.0, "clusters": 40}


def test_the_verdict_comes_first_and_intervals_show_their_bounds() -> None:
    figures = {"steps": 1300, "why": ["a", "b"], "verdict": "harmful", "controls": {"empty": GAIN}}
    assert summary.text(figures).splitlines() == [
        "verdict         harmful",
        "steps           1,300",
        "why             a; b",
        "controls.empty  0.1235 [-0.5, 1]",
    ]


def test_an_interval_that_was_refused_says_so() -> None:
    refused = GAIN | {"ci_low": None, "ci_high": None}
    assert summary.text({"gain": refused, "passed": False}).splitlines() == [
        "gain    0.1235 (too few documents for an interval)",
        "passed  False",
    ]


def test_a_proving_run_shows_its_strata_and_leaves_the_seeds_to_the_file() -> None:
    stratum = {"verdict": "useful", "gain_heldout_after": GAIN, "logp_answer": GAIN, "controls": {}}
    shown = summary.proving_text(
        {"verdict": "useful", "strata": {"R": stratum}, "seeds": {"0": {}}}
    )
    assert [line.split()[0] for line in shown.splitlines()] == [
        "verdict",
        "strata.R.verdict",
        "strata.R.gain_heldout_after",
        "strata.R.logp_answer",
    ]
