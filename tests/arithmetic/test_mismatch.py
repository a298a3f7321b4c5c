"""The mismatch monitor by hand, in float64, and over any split of the rows."""

import math

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.guards import coarser, mean_bound, verdict
from rlpt.limits import HaltLimits, MismatchConfig, WarnLimits
from rlpt.mismatch import finished, measured, raise_to
from rlpt.update import add, reduced


def rows(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def metrics_of(logp_R, behaviour_R, used_R=None, current_R=None) -> dict[str, float]:
    every = torch.ones_like(logp_R, dtype=torch.bool)
    return finished(
        *measured(
            logp_R,
            behaviour_R,
            every if used_R is None else used_R,
            every if current_R is None else current_R,
        )
    )


def drawn(count: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Behaviour log-probabilities, and a trainer's beside them; float32, as in training."""
    draw = np.random.default_rng(seed)
    behaviour = -draw.exponential(2.0, count)
    logp = np.minimum(behaviour + spread * draw.normal(size=count), -1e-6)
    return torch.from_numpy(logp).float(), torch.from_numpy(behaviour).float()


def test_the_mismatch_by_hand() -> None:
    """Ratios 2.5, 0.25 and 1, the third not current; the last row is padding and may hold anything."""
    logp_R = rows(math.log(0.5), math.log(0.1), math.log(0.003), math.nan)
    behaviour_R = rows(math.log(0.2), math.log(0.4), math.log(0.003), math.inf)
    up, down = math.log(2.5), math.log(4)
    found = metrics_of(
        logp_R,
        behaviour_R,
        torch.tensor([True, True, True, False]),
        torch.tensor([True, True, False, True]),
    )
    squares = 6.25 + 0.0625 + 1
    assert found == pytest.approx(
        {
            "mismatch/rows": 3.0,
            "mismatch/k1": (down - up) / 3,
            "mismatch/k3": ((2.5 - 1 - up) + (0.25 - 1 + down)) / 3,
            "mismatch/abs_log_ratio": (up + down) / 3,
            "mismatch/exp_abs_log_ratio": (2.5 + 4 + 1) / 3,
            "mismatch/rms_log_ratio": math.sqrt((up**2 + down**2) / 3),
            "mismatch/max_abs_log_ratio": down,
            "mismatch/ratio": 3.75 / 3,
            "mismatch/ratio_min": 0.25,
            "mismatch/ratio_max": 2.5,
            "mismatch/abs_probability": (0.3 + 0.3) / 3,
            "mismatch/out_of_band": 2 / 3,
            "mismatch/ess": 3.75**2 / (3 * squares),
            "mismatch/chi2": squares / 3 - 1,
            "mismatch/current_share": 2 / 3,
            "mismatch/current_k1": (down - up) / 2,
            "mismatch/current_abs_log_ratio": (up + down) / 2,
            "mismatch/current_exp_abs_log_ratio": 3.25,
            "mismatch/current_rms_log_ratio": math.sqrt((up**2 + down**2) / 2),
            "mismatch/current_max_abs_log_ratio": down,
            "mismatch/p00_share": 1 / 3,
            "mismatch/p01_share": 0.0,
            "mismatch/p10_share": 2 / 3,
            "mismatch/p50_share": 0.0,
            "mismatch/p00_abs_log_ratio": 0.0,
            "mismatch/p10_abs_log_ratio": (up + down) / 2,
        },
        abs=1e-12,
    )


def test_the_largest_difference_is_found_on_either_side() -> None:
    """Of all rows the trainer's lead is the largest, of the current ones the engine's."""
    current_R = torch.tensor([False, True, True])
    found = metrics_of(rows(-1.0, -3.0, -2.0), rows(-3.0, -2.5, -2.1), current_R=current_R)
    assert found["mismatch/max_abs_log_ratio"] == pytest.approx(2.0)
    assert found["mismatch/current_max_abs_log_ratio"] == pytest.approx(0.5)
    assert found["mismatch/ratio_max"] == pytest.approx(math.exp(2.0))
    assert found["mismatch/ratio_min"] == pytest.approx(math.exp(-0.5))


def test_ratios_that_are_all_below_one_have_a_largest_below_one() -> None:
    """Neither padding nor rows of older weights count as a ratio of one."""
    used_R, current_R = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    found = metrics_of(rows(-2.0, -1.5, 0.0), rows(-1.0, -1.0, 0.0), used_R, current_R)
    assert found["mismatch/ratio_max"] == pytest.approx(math.exp(-0.5))
    assert found["mismatch/current_max_abs_log_ratio"] == pytest.approx(1.0)


def test_buckets_hold_every_token_once() -> None:
    """Edges belong to the bucket above; a log-probability that rounds to above 0 is a likely token."""
    behaviour_R = rows(math.log(0.01) - 1e-9, math.log(0.01) + 1e-9, math.log(0.5) + 1e-9, 1e-7)
    found = metrics_of(behaviour_R, behaviour_R)
    shares = {name: found[f"mismatch/{name}_share"] for name in ("p00", "p01", "p10", "p50")}
    assert shares == {"p00": 0.25, "p01": 0.25, "p10": 0.0, "p50": 0.5}
    assert "mismatch/p10_abs_log_ratio" not in found
    at_edge = metrics_of(rows(math.log(0.5)), rows(math.log(0.5)))
    assert (at_edge["mismatch/p10_share"], at_edge["mismatch/p50_share"]) == (0.0, 1.0)


def test_a_ratio_of_two_is_the_edge_of_the_band() -> None:
    found = metrics_of(
        rows(-1.0 + 0.693, -1.0 + 0.694, -1.0 - 0.693, -1.0 - 0.694), rows(-1.0, -1.0, -1.0, -1.0)
    )
    assert found["mismatch/out_of_band"] == 0.5


def test_float32_rows_give_the_numbers_of_float64() -> None:
    logp_R, behaviour_R = drawn(5000, 0.1)
    found = metrics_of(logp_R, behaviour_R)
    d = logp_R.numpy().astype(np.float64) - behaviour_R.numpy().astype(np.float64)
    rho = np.exp(d)
    assert found["mismatch/ess"] == pytest.approx(
        rho.sum() ** 2 / (len(d) * (rho**2).sum()), rel=1e-12
    )
    assert found["mismatch/chi2"] == pytest.approx(np.mean(rho**2) - 1, rel=1e-12)
    assert found["mismatch/k1"] == pytest.approx(-d.mean(), rel=1e-12)
    assert found["mismatch/k3"] == pytest.approx(np.mean(rho - 1 - d), rel=1e-9)
    assert found["mismatch/rms_log_ratio"] == pytest.approx(np.sqrt(np.mean(d**2)), rel=1e-12)
    assert found["mismatch/exp_abs_log_ratio"] == pytest.approx(np.exp(np.abs(d)).mean(), rel=1e-12)
    apart = np.abs(np.expm1(d)) * np.exp(behaviour_R.numpy().astype(np.float64))
    assert found["mismatch/abs_probability"] == pytest.approx(apart.mean(), rel=1e-12)


def test_any_split_of_the_rows_gives_the_same_metrics(world: dist.World) -> None:
    """Micro-batches add and compare; one of them has no row."""
    logp_R, behaviour_R = drawn(300, 0.5)
    used_R, current_R = torch.arange(300) % 7 != 0, torch.arange(300) % 3 == 0
    whole = metrics_of(logp_R, behaviour_R, used_R, current_R)
    sums, extremes = {}, {}
    for part in (slice(0, 1), slice(1, 120), slice(120, 120), slice(120, 300)):
        more, peaks = measured(logp_R[part], behaviour_R[part], used_R[part], current_R[part])
        add(sums, more)
        raise_to(extremes, peaks)
    assert reduced(sums, extremes, world) == pytest.approx(whole, rel=1e-12)


def test_a_token_that_one_side_calls_impossible_is_not_hidden() -> None:
    for d in (-2000.0, 2000.0):
        found = metrics_of(rows(-1.0, -1.0 + d), rows(-1.0, -1.0))
        assert found["mismatch/max_abs_log_ratio"] == 2000.0
        assert (found["mismatch/ratio_max"], found["mismatch/ratio_min"]) == (
            (math.inf, 1.0) if d > 0 else (1.0, 0.0)
        )
        halts = verdict(found, MismatchConfig(), "bfloat16")[1]
        assert "mismatch/k1" in halts


def test_on_policy_every_ratio_is_one() -> None:
    logp_R, _ = drawn(50, 0.0)
    found = metrics_of(logp_R, logp_R)
    assert (found["mismatch/ess"], found["mismatch/chi2"], found["mismatch/k3"]) == (1.0, 0.0, 0.0)
    assert (found["mismatch/ratio_min"], found["mismatch/ratio_max"]) == (1.0, 1.0)


def test_no_current_row_means_no_current_metric() -> None:
    logp_R, behaviour_R = drawn(20, 0.1)
    found = metrics_of(logp_R, behaviour_R, current_R=torch.zeros(20, dtype=torch.bool))
    assert [name for name in found if "current" in name] == ["mismatch/current_share"]
    assert found["mismatch/current_share"] == 0.0
    assert finished({"loss/policy": (1.0, 1.0)}, {}) == {}
    empty_R, none_R = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert finished(*measured(empty_R, empty_R, none_R, none_R)) == {}


def test_other_metrics_are_means_of_something_and_tokens_are_totals(world: dist.World) -> None:
    sums = {"loss/policy": (3.0, 2.0), "tokens/train": (7.0, 4.0), "loss/gold": (0.0, 0.0)}
    assert reduced(sums, {}, world) == {"loss/policy": 1.5, "tokens/train": 7.0}


def means(**changed: float) -> dict[str, float]:
    """An engine that agrees, but for what is changed."""
    found = {
        "ratio": 1.0, "ess": 1.0, "chi2": 0.0, "k1": 0.0, "rows": 1000.0, "current_share": 1.0,
        "current_k1": 0.0, "current_rms_log_ratio": 1e-6, "current_exp_abs_log_ratio": 1.0,
    }  # fmt: skip
    return {f"mismatch/{name}": value for name, value in (found | changed).items()}


@pytest.mark.parametrize(
    ("limit", "metric", "least"),
    [
        ("current_exp_abs_log_ratio", "current_exp_abs_log_ratio", False),
        ("current_rms_log_ratio", "current_rms_log_ratio", False),
        ("k1", "k1", False),
        ("chi2", "chi2", False),
        ("ess", "ess", True),
        ("ratio_low", "ratio", True),
        ("ratio_high", "ratio", False),
    ],
)
def test_every_limit_warns_and_halts_where_it_is_passed(limit, metric, least) -> None:
    cfg = MismatchConfig(warn=WarnLimits(current_rms_log_ratio=0.06))
    warn, halt = getattr(cfg.warn, limit), getattr(cfg.halt, limit)
    assert (halt < warn) == least
    outwards = 0.999 if least else 1.001
    for value, expected in (
        (warn / outwards, (0, 0)),
        (warn, (0, 0)),
        (warn * outwards, (1, 0)),
        (halt / outwards, (1, 0)),
        (halt * outwards, (1, 1)),
    ):
        warnings, halts = verdict(means(**{metric: value}), cfg, "float32")
        assert (len(warnings), len(halts)) == expected, value
    word = "is below" if least else "exceeds"
    assert halts[f"mismatch/{metric}"].startswith(
        f"mismatch/{metric} = {halt * outwards:.4g} {word} mismatch.halt.{limit} = {halt:.4g}; the "
    )


def test_a_handful_of_current_tokens_is_not_judged() -> None:
    """Under asynchronous training few tokens of a step may be the newest weights' own."""
    for rows_, share, expected in ((320.0, 0.101, 1), (320.0, 0.1, 1), (320.0, 0.099, 0)):
        changed = means(rows=rows_, current_share=share, current_rms_log_ratio=1.5)
        halts = verdict(changed, MismatchConfig(), "float32")[1]
        assert len(halts) == expected


def test_the_sign_of_k1_does_not_save_it() -> None:
    for k1 in (0.2, -0.2):
        (line,) = verdict(means(k1=k1), MismatchConfig(), "float32")[0].values()
        assert line.startswith(f"mismatch/k1 = {k1} exceeds mismatch.warn.k1 = 0.1; ")


def test_ratios_that_are_small_have_no_second_moment_to_fear() -> None:
    """chi2 = E[rho^2] - 1 is negative where most ratios are below 1; that is for the ratio's own limit to say."""
    warnings, _ = verdict(means(chi2=-0.9), MismatchConfig(), "float32")
    assert warnings == {}


def test_a_mean_over_few_tokens_may_lie_further_off() -> None:
    """0.003 and four standard errors of rms / sqrt(n)."""
    assert mean_bound(0.003, 0.05, 100) == pytest.approx(0.003 + 4 * 0.05 / 10)
    noisy = {"current_rms_log_ratio": 0.05, "current_k1": 0.02, "current_share": 0.5}
    few = verdict(means(**noisy, rows=200.0), MismatchConfig(), "bfloat16")
    many = verdict(means(**noisy, rows=20_000.0), MismatchConfig(), "bfloat16")
    assert (list(few[0]), list(many[0])) == ([], ["mismatch/current_k1"])


def test_rounding_is_judged_by_the_coarser_dtype() -> None:
    for dtype, expected in (("float32", 1), ("float16", 1), ("bfloat16", 0)):
        warnings, _ = verdict(means(current_rms_log_ratio=0.05), MismatchConfig(), dtype)
        assert len(warnings) == expected
    assert coarser("float32", "bfloat16") == "bfloat16"
    assert coarser("float16", "float32") == "float16"
    assert coarser("float16", "bfloat16") == "bfloat16"


def test_what_is_not_a_number_is_out_of_bounds() -> None:
    warnings, halts = verdict(means(ess=math.nan, chi2=math.nan), MismatchConfig(), "float32")
    assert list(warnings) == list(halts) == ["mismatch/chi2", "mismatch/ess"]


def test_a_limit_can_be_lifted() -> None:
    cfg = MismatchConfig(halt=HaltLimits(chi2=math.inf, ess=0.0))
    assert verdict(means(ess=0.01, chi2=99.0), cfg, "float32")[1] == {}


def test_steps_without_rollouts_are_not_judged() -> None:
    assert verdict({"loss/next_token": 9.0}, MismatchConfig(), "float32") == ({}, {})


@pytest.fixture(scope="module")
def world():
    with dist.world() as joined:
        yield joined
