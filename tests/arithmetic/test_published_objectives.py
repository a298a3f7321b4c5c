"""Published objectives: the update is the gradient of the printed formula, by autograd in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpt.objective import (
    TrustRegion,
    gold_shares,
    kl_terms,
    m2_threshold,
    policy_gradient,
    token_weights,
)

LENGTHS = [3, 1, 4]
ADVANTAGES = [1.3, -0.7, 0.4]


def drawn(seed=4):
    """Log-probabilities of 8 actions of three rollouts, now and when they were sampled."""
    draw = np.random.default_rng(seed)
    behaviour_R = torch.tensor(draw.uniform(-3, -0.1, 8))
    return behaviour_R + torch.tensor(draw.normal(0, 0.4, 8)), behaviour_R


def update(region, weight_R, seed=4, **more):
    """What each log-probability is pushed by."""
    logp_R, behaviour_R = drawn(seed)
    leaf_R = logp_R.requires_grad_()
    advantage_R = torch.tensor(np.repeat(ADVANTAGES, LENGTHS))
    loss, stats = policy_gradient(
        leaf_R, behaviour_R, advantage_R, weight_R, region, lengths=LENGTHS, **more
    )
    (gradient_R,) = torch.autograd.grad(loss, leaf_R)
    return -gradient_R, stats


def printed(formula, seed=4):
    """The gradient of a printed objective, a function of (log pi, log mu) of every rollout."""
    logp_R, behaviour_R = drawn(seed)
    leaf_R = logp_R.requires_grad_()
    pieces = zip(leaf_R.split(LENGTHS), behaviour_R.split(LENGTHS), ADVANTAGES, strict=True)
    objective = sum(formula(new, old, a) for new, old, a in pieces)
    (gradient_R,) = torch.autograd.grad(objective, leaf_R)
    return gradient_R


def per_rollout(values):
    return torch.tensor(np.repeat(values, LENGTHS))


@pytest.mark.parametrize("seed", range(6))
def test_gspo_is_the_gradient_of_its_sequence_ratio(seed):
    """1/G sum_i min(s A, clip(s) A), s = (pi(y) / mu(y))^(1 / |y|)."""

    def formula(new, old, a):
        s = ((new - old).mean()).exp()
        return torch.minimum(s * a, s.clamp(0.9, 1.1) * a) / 3

    region = TrustRegion("clip", clip_low=0.1, clip_high=0.1, ratio="sequence")
    weight_R = per_rollout([1 / (3 * n) for n in LENGTHS])
    torch.testing.assert_close(update(region, weight_R, seed)[0], printed(formula, seed))


def test_reinforce_takes_no_ratio():
    """sum_i A_i log pi(y_i)."""
    region = TrustRegion("none", ratio="none")
    found_R, _ = update(region, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(found_R, printed(lambda new, _, a: a * new.sum()))


@pytest.mark.parametrize("seed", range(6))
def test_grpo_is_the_gradient_of_the_clipped_mean_over_each_rollout(seed):
    def formula(new, old, a):
        r = (new - old).exp()
        return torch.minimum(r * a, r.clamp(0.8, 1.2) * a).mean() / 3

    region = TrustRegion("clip", clip_low=0.2, clip_high=0.2)
    weight_R = per_rollout([1 / (3 * n) for n in LENGTHS])
    torch.testing.assert_close(update(region, weight_R, seed)[0], printed(formula, seed))


def test_dr_grpo_divides_by_a_constant():
    """1 / (G L) sum_i sum_t A_i r_it with L = 16."""
    (weights,) = token_weights(
        [LENGTHS], "constant", total_actions=8, num_prompts=1, constant_tokens=16
    )
    assert weights == [1 / 48] * 3
    found_R, _ = update(TrustRegion(), per_rollout(weights))
    expected_R = printed(lambda new, old, a: a * (new - old).exp().sum() / 48)
    torch.testing.assert_close(found_R, expected_R)


@pytest.mark.parametrize("seed", range(6))
def test_icepop_keeps_only_ratios_inside_its_band(seed):
    """sum_t 1[alpha <= rho <= beta] rho A log pi, whatever the sign of A."""

    def formula(new, old, a):
        rho = (new - old).exp().detach()
        return (((rho >= 0.7) & (rho <= 1.4)) * rho * a * new).sum()

    region = TrustRegion("band", band_low=0.7, band_high=1.4)
    found_R, stats = update(region, torch.ones(8, dtype=torch.float64), seed)
    torch.testing.assert_close(found_R, printed(formula, seed))
    assert stats["masked"] == float((found_R == 0).sum())


def test_a_band_is_closed_and_need_not_have_a_lower_end():
    """Ratios 1/100, 1 and 2 in [0, 1], and on-policy ones in [1, 1]."""
    leaf_R = torch.tensor([0.01, 1.0, 2.0], dtype=torch.float64).log().requires_grad_()
    ones_R = torch.ones(3, dtype=torch.float64)
    for low, masked in ((0.0, 1.0), (1.0, 2.0)):
        region = TrustRegion("band", band_low=low, band_high=1.0)
        loss, stats = policy_gradient(leaf_R, torch.zeros_like(ones_R), ones_R, ones_R, region)
        assert stats["masked"] == masked
        (gradient_R,) = torch.autograd.grad(loss, leaf_R)
        assert gradient_R.tolist() == pytest.approx([0.0 if low else -0.01, -1.0, 0.0])


def test_cispo_caps_the_detached_ratio():
    """sum_t sg(min(rho, eps)) A log pi."""
    region = TrustRegion("none", max_ratio=1.1)
    found_R, stats = update(region, torch.ones(8, dtype=torch.float64))
    expected_R = printed(
        lambda new, old, a: (a * (new - old).exp().detach().clamp(max=1.1) * new).sum()
    )
    torch.testing.assert_close(found_R, expected_R)
    new_R, old_R = drawn()
    assert stats["capped"] == float((new_R - old_R > math.log(1.1)).sum()) > 0


def slow_m2(log_ratio, advantage, limit):
    """Which tokens M2PO leaves out: the largest that move away, one by one, until the mean square is small enough."""
    left = list(range(len(log_ratio)))
    while left and np.mean([log_ratio[i] ** 2 for i in left]) > limit:
        away = [i for i in left if log_ratio[i] * advantage[i] > 0]
        if not away:
            break
        left.remove(max(away, key=lambda i: abs(log_ratio[i])))
    return sorted(set(range(len(log_ratio))) - set(left))


@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.04, 0.2]))
def test_m2po_leaves_out_the_largest_violators_until_the_second_moment_is_small(seed, limit):
    draw = np.random.default_rng(seed)
    log_ratio_R = draw.normal(0, 0.3, 30)
    advantage_R = draw.normal(size=30) * (draw.random(30) < 0.7)
    threshold = m2_threshold(log_ratio_R, advantage_R, limit)
    away_R = log_ratio_R * advantage_R > 0
    found = np.flatnonzero(away_R & (np.abs(log_ratio_R) > threshold))
    assert found.tolist() == slow_m2(log_ratio_R, advantage_R, limit)


@pytest.mark.parametrize("seed", range(4))
def test_m2po_masks_these_and_no_others(seed):
    """In float32; the token at the threshold stays, and one without an advantage moves nowhere."""
    draw = np.random.default_rng(seed)
    log_ratio_R = draw.normal(0, 0.3, 30).astype(np.float32)
    advantage_R = draw.normal(size=30).astype(np.float32) * (draw.random(30) < 0.7)
    gone = slow_m2(log_ratio_R.astype(np.float64), advantage_R, 0.04)
    leaf_R, ones_R = torch.from_numpy(log_ratio_R).requires_grad_(), torch.ones(30)
    loss, stats = policy_gradient(
        leaf_R, torch.zeros(30), torch.from_numpy(advantage_R), ones_R, TrustRegion("m2"),
        m2_threshold=m2_threshold(log_ratio_R, advantage_R, 0.04),
    )  # fmt: skip
    (gradient_R,) = torch.autograd.grad(loss, leaf_R)
    silent_R = (gradient_R == 0).numpy() & (advantage_R != 0)
    assert np.flatnonzero(silent_R).tolist() == gone != []
    assert stats["masked"] == len(gone)


def test_kl_estimators_by_hand_and_their_gradients():
    """d = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2; slopes 1, d and 1 - exp(-d)."""
    d = math.log(2)
    leaf = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    for name, value, slope in (
        ("k1", d, 1.0),
        ("k2", d * d / 2, d),
        ("k3", 0.5 - 1 + d, 0.5),
    ):
        found = kl_terms(leaf, name)
        assert found.item() == pytest.approx(value)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert gradient.item() == pytest.approx(slope), name


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    """E_pi[grad k2] = grad KL(pi || ref), by enumeration of a softmax over five tokens."""
    draw = torch.Generator().manual_seed(3)
    theta_V = torch.randn(5, generator=draw, dtype=torch.float64, requires_grad=True)
    reference_V = torch.randn(5, generator=draw, dtype=torch.float64).log_softmax(0)
    logp_V = theta_V.log_softmax(0)
    exact = (logp_V.exp() * (logp_V - reference_V)).sum()
    (expected_V,) = torch.autograd.grad(exact, theta_V, retain_graph=True)
    sampled = (logp_V.exp().detach() * kl_terms(logp_V - reference_V, "k2")).sum()
    (found_V,) = torch.autograd.grad(sampled, theta_V)
    torch.testing.assert_close(found_V, expected_V)


def test_jepo_is_the_gradient_of_the_log_mean_exp():
    """grad of log 1/n sum_j p_j by its continuations: softmax(log p) weighs grad log p(y | z_j)."""
    leaf_G = torch.tensor([-3.0, -1.0, -7.5, -2.0], dtype=torch.float64, requires_grad=True)
    (expected_G,) = torch.autograd.grad(leaf_G.logsumexp(0) - math.log(4), leaf_G)
    found_PG = gold_shares(leaf_G.detach().numpy()[None], "softmax", np.ones((1, 4), bool))
    np.testing.assert_allclose(found_PG[0], expected_G.numpy(), rtol=1e-12)


def test_shares_of_the_gold_term_know_no_smallest_probability():
    """exp(-2000) is 0 in float64, and yet one of two may be three times as likely, or all there is."""
    gold_PG = np.array([[-2000.0, -2000.0 - math.log(3)], [0.0, -2000.0]])
    found_PG = gold_shares(gold_PG, "softmax", np.ones((2, 2), bool))
    np.testing.assert_allclose(found_PG, [[0.75, 0.25], [1.0, 0.0]], rtol=1e-12)


def test_verifree_weighs_the_gold_text_by_its_probability():
    """grad p(y | z) = p grad log p."""
    leaf_G = torch.tensor([-3.0, -1.0], dtype=torch.float64, requires_grad=True)
    (expected_G,) = torch.autograd.grad(leaf_G.exp().sum(), leaf_G)
    found_PG = gold_shares(leaf_G.detach().numpy()[None], "probability", np.ones((1, 2), bool))
    np.testing.assert_allclose(found_PG[0], expected_G.numpy(), rtol=1e-12)


def test_masked_rollouts_have_no_share_of_the_gold_term():
    kept_PG = np.array([[True, False, True], [False, False, False]])
    gold_PG = np.log([[0.2, 0.9, 0.6], [0.1, 0.1, 0.1]])
    found_PG = gold_shares(gold_PG, "softmax", kept_PG)
    np.testing.assert_allclose(found_PG, [[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]], rtol=1e-12)
