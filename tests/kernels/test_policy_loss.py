"""`linear_policy_loss`: the printed formula in float64, its gradients, and which rows may hold anything."""

import math

import pytest
import torch

from rlpt.objective import TrustRegion, policy_gradient
from rlpt_kernels import chunked, linear_policy_loss
from rlpt_kernels.objective import Ratio
from rlpt_kernels.policy_loss import check_ratio
from rlpt_kernels.rows import TorchRows

TRUST = [
    {},
    {"max_ratio": 1.5},
    {"trust_region": "clip", "clip_low": 0.2, "clip_high": 0.3},
    {"trust_region": "clip", "clip_low": 1.0},
    {"trust_region": "tv", "tv_delta": 0.01, "max_ratio": 3.0},
]


def terms(rows, seed=0):
    """Ratios on both sides of 1, advantages of both signs and 0, padding, and an ignored target."""
    draw = torch.Generator().manual_seed(seed)
    behaviour_N = -5 + 2 * torch.randn(rows, generator=draw)
    advantage_N = torch.randn(rows, generator=draw)
    mask_N = torch.rand(rows, generator=draw) / rows
    advantage_N[1], mask_N[2] = 0.0, 0.0
    return behaviour_N, advantage_N, mask_N


def formula(logp_N, behaviour_N, advantage_N, mask_N, **trust):
    """The loss, row by row, in plain Python over float64: min(rho, cap) outside the trust region is 0."""
    kind, cap = trust.get("trust_region", "none"), trust.get("max_ratio") or math.inf
    low, high = 1 - trust.get("clip_low", 0.2), 1 + trust.get("clip_high", 0.28)
    loss, coefficients = 0.0, []
    for logp, old, advantage, weight in zip(logp_N, behaviour_N, advantage_N, mask_N, strict=True):
        rho, pi, mu = (logp - old).exp().item(), logp.exp().item(), old.exp().item()
        clip = (advantage > 0 and rho > high) or (advantage < 0 and rho < low)
        away = (advantage > 0 and rho > 1) or (advantage < 0 and rho < 1)
        tv = away and abs(pi - mu) > trust.get("tv_delta", 0.2)
        out = {"none": False, "clip": clip, "tv": tv}[kind]
        coefficients.append(
            0.0 if out or weight == 0 else (weight * min(rho, cap) * advantage).item()
        )
        loss = loss - coefficients[-1] * logp
    return loss, coefficients


@pytest.mark.parametrize("trust", TRUST)
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "softcap": 6.0, "banned": (3, 100)}])
def test_the_loss_and_its_gradients_are_the_formula(impl, trust, head, problem, exact):
    hidden_ND, weight_VD, target_N = problem(vocab=150, spread=1.5)
    bias_V = torch.linspace(-1, 1, 150)
    banned_V = bias_V.clone()
    for v in head.get("banned", ()):
        banned_V[v] = -math.inf
    old_N, advantage_N, mask_N = terms(len(target_N))
    wide = [x.double().requires_grad_() for x in (hidden_ND, weight_VD, banned_V)]
    settings = {k: v for k, v in head.items() if k != "banned"}
    logp_N = exact(wide[0], wide[1], target_N, bias=wide[2], **settings)[0]
    # Some ratios close to 1, where the borders of the trust regions are.
    old_N[3:] = (logp_N.detach() - torch.linspace(-0.5, 0.5, len(old_N)).double()).float()[3:]
    wanted, coefficients = formula(logp_N, old_N.double(), advantage_N, mask_N, **trust)
    wanted_gradients = torch.autograd.grad(wanted, wide)
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    found = linear_policy_loss(
        *leaves[:2],
        target_N,
        old_N,
        advantage_N,
        mask_N,
        bias=leaves[2],
        impl=impl,
        **head,
        **trust,
    )
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert found.coefficient.tolist() == pytest.approx(coefficients, rel=1e-4, abs=1e-7)
    for a, b in zip(torch.autograd.grad(found.loss, leaves), wanted_gradients, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()


@pytest.mark.parametrize("trust", [*TRUST, {"trust_region": "tv", "tv_delta": 0.15}])
def test_coefficients_over_the_whole_plane(impl, trust):
    """Policies and behaviours from unlikely to certain, both signs of advantage: every side of every border."""
    values = torch.tensor([0.02, 0.3, 0.45, 0.55, 0.7, 0.98])
    pi_N, mu_N, sign_N = (
        x.flatten()
        for x in torch.meshgrid(values, values, torch.tensor([-1.5, 0.7]), indexing="ij")
    )
    # Two ids whose scores are h and 0: log p of the first is log sigmoid(h).
    hidden_N1, weight_21 = (
        torch.logit(pi_N)[:, None],
        torch.tensor([[1.0], [0.0]], requires_grad=True),
    )
    target_N, mask_N = torch.zeros(len(pi_N)).long(), torch.full((len(pi_N),), 0.25)
    found = linear_policy_loss(
        hidden_N1, weight_21, target_N, mu_N.log(), sign_N, mask_N, impl=impl, **trust
    )
    _, wanted = formula(pi_N.double().log(), mu_N.double().log(), sign_N, mask_N, **trust)
    on_a_border = {"none": (), "clip": (), "tv": (0.15,)}[trust.get("trust_region", "none")]
    far_N = torch.tensor(
        [
            all(abs(abs(a - b) - c) > 1e-3 for c in on_a_border)
            for a, b in zip(pi_N, mu_N, strict=True)
        ]
    )
    pairs = zip(
        found.coefficient[far_N].tolist(), torch.tensor(wanted)[far_N].tolist(), strict=True
    )
    assert all(a == pytest.approx(b, rel=2e-5, abs=1e-7) for a, b in pairs)
    assert len({round(x, 4) for x in wanted}) > 10


def test_it_is_the_objective_of_the_trainer(impl, problem):
    """One definition: what `rlpt.objective` makes of log-probabilities, the kernel makes of hidden states."""
    hidden_ND, weight_VD, target_N = problem(rows=40, vocab=150)
    old_N, advantage_N, mask_N = terms(40)
    found = linear_policy_loss(
        hidden_ND, weight_VD.requires_grad_(), target_N, old_N, advantage_N, mask_N, impl=impl,
        trust_region="tv", tv_delta=0.001, max_ratio=2.0,
    )  # fmt: skip
    logp_N = torch.log_softmax(hidden_ND @ weight_VD.detach().T, 1).gather(1, target_N[:, None])[
        :, 0
    ]
    loss, _ = policy_gradient(
        logp_N,
        old_N,
        advantage_N,
        mask_N,
        TrustRegion("tv", tv_delta=0.001, max_ratio=2.0),
    )
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    used_N = mask_N != 0
    assert torch.allclose(found.logp[used_N], logp_N[used_N], atol=1e-5)
    assert found.logp[2].item() == 0.0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_padding_may_hold_anything(impl, problem):
    """NaN in a row of mask 0 reaches neither the loss nor a gradient. (The reference multiplies by 0: not there.)"""
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))

    def run(spoil):
        hidden, target = hidden_ND.clone(), target_N.clone()
        old, advantage = old_N.clone(), advantage_N.clone()
        if spoil:
            old[2], advantage[2] = math.nan, math.inf
            hidden[2] = 1e30 if impl == "reference" else math.nan
            target[2] = 10_000
        leaves = [hidden.requires_grad_(), weight_VD.clone().requires_grad_()]
        loss = linear_policy_loss(*leaves, target, old, advantage, mask_N, impl=impl).loss
        return loss, *torch.autograd.grad(loss, leaves)

    for spoiled, clean in zip(run(True), run(False), strict=True):
        assert torch.allclose(spoiled, clean, rtol=1e-6, atol=1e-9)


def test_a_sampled_token_that_the_policy_calls_impossible_is_not_hidden(impl, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    target_N[4] = 70
    loss = linear_policy_loss(
        hidden_ND,
        weight_VD.requires_grad_(),
        target_N,
        old_N,
        advantage_N,
        mask_N,
        banned=(70,),
        impl=impl,
    ).loss
    assert math.isnan(loss.item())


def test_rows_that_repeat_sum_their_gradients(impl, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    rows_N = torch.tensor([5, 0, 5, 3, 3, 3, 8, 1, 0])

    def gradients(hidden, weight, rows):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = linear_policy_loss(
            *leaves, target_N, old_N, advantage_N, mask_N, rows=rows, impl=impl
        )
        return torch.autograd.grad(found.loss, leaves)

    d_hidden, d_weight = gradients(hidden_ND, weight_VD, rows_N)
    apart, same = gradients(hidden_ND[rows_N], weight_VD, None)
    wanted = torch.zeros_like(hidden_ND).index_add_(0, rows_N, apart)
    assert torch.allclose(d_hidden, wanted, rtol=1e-5, atol=1e-8)
    assert torch.allclose(d_weight, same, rtol=1e-5, atol=1e-8)
    assert not d_hidden[[2, 4, 6, 7]].any()


def test_entropy_is_that_of_the_rows_in_use(impl, problem, exact):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    found = linear_policy_loss(
        hidden_ND,
        weight_VD.requires_grad_(),
        target_N,
        old_N,
        advantage_N,
        mask_N,
        entropy=True,
        impl=impl,
    )
    wanted_N = exact(hidden_ND, weight_VD.detach(), target_N)[2]
    wanted_N[2] = 0.0
    assert torch.allclose(found.entropy.double(), wanted_N, atol=1e-5)
    assert not found.entropy.requires_grad
    assert not found.logp.requires_grad


def test_the_gradient_scales_with_what_comes_from_above(impl, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    loss = linear_policy_loss(*leaves, target_N, old_N, advantage_N, mask_N, impl=impl).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(-3 * loss, leaves)
    for a, b in zip(once, thrice, strict=True):
        assert (-3 * a - b).norm() <= 1e-6 * b.norm()


def test_half_precision_gets_half_precision_gradients(impl, problem, exact):
    """Summed in float32 and rounded once: within a unit of the last place of float64's."""
    hidden_ND, weight_VD, target_N = problem(rows=40, vocab=150, dtype=torch.bfloat16)
    old_N, advantage_N, mask_N = terms(40)
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    loss = linear_policy_loss(*leaves, target_N, old_N, advantage_N, mask_N, impl=impl).loss
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted, _ = formula(exact(*wide, target_N)[0], old_N.double(), advantage_N, mask_N)
    assert loss.dtype == torch.float32
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, wide), strict=True)
    for a, b in pairs:
        assert a.dtype == torch.bfloat16
        assert bool(
            ((a.double() - b).abs() <= b.abs() * 2**-8 * 1.001 + 1e-5 * b.abs().max()).all()
        )


def test_rows_without_mask_or_advantage_reach_no_matmul_of_a_gradient(problem, monkeypatch):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    target_N[5] = -100
    seen = []
    policy = TorchRows.policy
    monkeypatch.setattr(
        TorchRows,
        "policy",
        lambda self, raw, *rest: seen.append(len(raw)) or policy(self, raw, *rest),
    )
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 1 << 20})
    linear_policy_loss(hidden_ND, weight_VD.requires_grad_(), target_N, old_N, advantage_N, mask_N)
    # Nine rows, less one without advantage, one of padding and one without a target.
    assert seen == [6]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(
    "trust", [{}, {"trust_region": "clip", "max_ratio": 5.0}, {"trust_region": "tv"}]
)
def test_a_ratio_that_is_not_a_number_is_not_hidden(impl, trust, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    old_N[4] = math.nan
    found = linear_policy_loss(
        hidden_ND,
        weight_VD.requires_grad_(),
        target_N,
        old_N,
        advantage_N,
        mask_N,
        impl=impl,
        **trust,
    )
    assert math.isnan(found.coefficient[4].item())
    assert math.isnan(found.loss.item())


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(impl, problem):
    """Weights of 1e-7 underflow in float16, and times 65536 they do not."""
    hidden_ND, weight_VD, target_N = problem(rows=40, vocab=150, dtype=torch.float16)
    old_N, advantage_N, _ = terms(40)
    mask_N = torch.full((40,), 1e-7)
    small, large = [], []
    for scale, into in ((1.0, small), (65536.0, large)):
        leaves = [
            x.clone().float().requires_grad_() if scale == 1.0 else x.clone().requires_grad_()
            for x in (hidden_ND, weight_VD)
        ]
        loss = linear_policy_loss(*leaves, target_N, old_N, advantage_N, mask_N, impl=impl).loss
        into += torch.autograd.grad(loss * scale, leaves)
    for a, b in zip(small, large, strict=True):
        assert (65536 * a - b.float()).norm() <= 1e-3 * b.float().norm()


def test_nothing_to_learn_is_a_zero(impl, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    loss = linear_policy_loss(*leaves, target_N, old_N, advantage_N, 0 * mask_N, impl=impl).loss
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"clip_low must be 0 or more; got -0.1", {"clip_low": -0.1}),
        (r"tv_delta must be 0 or more; got nan", {"tv_delta": math.nan}),
        (r"max_ratio must be > 0 or None; got 0", {"max_ratio": 0.0}),
        (r"target\[0\] = 150 is outside", {"target_N": torch.full((9,), 150)}),
        (r"temperature must be > 0", {"temperature": -1.0}),
        (r"bias is -inf for every id", {"bias": torch.full((150,), -math.inf)}),
    ],
)
def test_mistakes_are_refused_by_name(message, change, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    old_N, advantage_N, mask_N = terms(len(target_N))
    target_N = change.pop("target_N", target_N)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(
            hidden_ND, weight_VD.requires_grad_(), target_N, old_N, advantage_N, mask_N, **change
        )


def test_an_unknown_trust_region_is_refused_by_name():
    """Asked of the check itself: in tests the type hook would answer first."""
    ratio = Ratio()
    object.__setattr__(ratio, "trust_region", "ppo")
    with pytest.raises(
        ValueError, match="trust_region = 'ppo' is unknown; choose one of none, clip"
    ):
        check_ratio(ratio)
