"""Mistakes are named, never turned into a NaN or an illegal access."""

import math

import pytest
import torch

from rlpt_kernels import linear_logprob
from rlpt_kernels.checks import check
from rlpt_kernels.head import Head


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"vocab_start = 2 without a group", {"vocab_start": 2}),
        (r"vocab_stop = 11 - vocab_start = 0 is more than the 10 rows", {"vocab_stop": 11}),
        (r"vocab_start = 0 and vocab_stop = 0 hold no ids", {"vocab_stop": 0}),
        (r"target\[2\] = 9 is outside \[0, 9\)", {"vocab_stop": 9}),
        (r"rows\[1\] = 3 is outside the 3 rows", {"rows": torch.tensor([0, 3, 1])}),
        (r"rows\[0\] = -1 is outside the 3 rows", {"rows": torch.tensor([-1, 2, 1])}),
        (r"target\[1\] = 10 is outside \[0, 10\)", {"target_N": torch.tensor([0, 10, 9])}),
        (r"target\[2\] = -1 is outside \[0, 10\)", {"target_N": torch.tensor([0, 9, -1])}),
        (r"temperature must be > 0 .* got 0", {"temperature": 0.0}),
        (
            r"temperature .* neither below 1e-30 nor above 1e\+30; got inf",
            {"temperature": math.inf},
        ),
        (r"temperature .* got 1e-40", {"temperature": 1e-40}),
        (
            r"temperature must be > 0 .* its least is 0",
            {"temperature": torch.tensor([1.0, 0.0, 2.0])},
        ),
        (r"temperature requires grad", {"temperature": torch.ones(3, requires_grad=True)}),
        (r"softcap must be > 0 and finite, or None; got -1", {"softcap": -1.0}),
        (r"softcap must be > 0 and finite, or None; got inf", {"softcap": math.inf}),
        (r"bias holds NaN or \+inf", {"bias": torch.tensor([math.nan] + [0.0] * 9)}),
        (r"bias holds NaN or \+inf", {"bias": torch.tensor([math.inf] + [0.0] * 9)}),
        (r"banned holds 10, outside the vocabulary", {"banned": (3, 10)}),
        (r"banned holds all 10 ids", {"banned": range(10)}),
        (r"bias is -inf for every id", {"bias": torch.full((10,), -math.inf)}),
        (
            r"bias is -inf for every id that is not banned",
            {"bias": torch.tensor([0.0] + [-math.inf] * 9), "banned": (0,)},
        ),
    ],
)
def test_mistakes_are_refused_by_name(impl, message, settings, problem):
    hidden_ND, weight_VD, target_N = problem(rows=3, vocab=10)
    arguments = {"target_N": target_N, "impl": impl, **settings}
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden_ND, weight_VD, **arguments)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"must share D; got \(3, 4\) and \(10, 5\)", {"weight_VD": torch.ones(10, 5)}),
        (r"weight \(0, 4\) is empty", {"weight_VD": torch.ones(0, 4)}),
        (r"rows must be one of int32, int64", {"rows_N": torch.zeros(3)}),
        (r"hidden must be floating point", {"hidden_MD": torch.ones(3, 4, dtype=torch.long)}),
        (r"target must have shape \(3,\); got \(2,\)", {"target_N": torch.zeros(2).long()}),
        (
            r"target must be one of int32, int64; got torch.uint8",
            {"target_N": torch.zeros(3).byte()},
        ),
        (r"bias must have shape \(10,\); got \(3,\)", {"bias_V": torch.ones(3)}),
        (r"bias is on meta, hidden on cpu", {"bias_V": torch.ones(10, device="meta")}),
        (r"weight is on meta, hidden on cpu", {"weight_VD": torch.ones(10, 4, device="meta")}),
        (r"temperature must have shape \(3,\)", {"head": Head(temperature=torch.ones(1))}),
    ],
)
def test_shapes_devices_and_dtypes_are_refused_by_name(impl, message, change):
    """Asked of `check` itself: in tests the shape hook would answer first."""
    arguments = {
        "hidden_MD": torch.ones(3, 4),
        "weight_VD": torch.ones(10, 4),
        "bias_V": None,
        "target_N": torch.zeros(3, dtype=torch.long),
        "rows_N": None,
        "head": Head(),
    }
    with pytest.raises(ValueError, match=message):
        check(**{**arguments, **change})
