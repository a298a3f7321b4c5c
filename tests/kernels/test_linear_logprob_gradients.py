"""Gradients of `linear_logprob`, and what must send none."""

import math

import pytest
import torch

from rlpt_kernels import linear_logprob


def test_autocast_changes_no_bit(impl, problem):
    leaves = [x.requires_grad_() for x in problem()[:2]]
    target_N = problem()[2]
    plain = linear_logprob(*leaves, target_N, impl=impl).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_logprob(*leaves, target_N, impl=impl).logp
    assert torch.equal(plain, cast)
    ones_N = torch.ones(len(target_N))
    for a, b in zip(
        torch.autograd.grad(plain, leaves, ones_N),
        torch.autograd.grad(cast, leaves, ones_N),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weigh", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"softcap": 4.0}, {"softcap": 4.0, "temperature": 2.0}],
)
def test_gradients_are_those_of_the_formula(impl, weigh, settings, problem, gradients):
    hidden_ND, weight_VD, target_N = problem(vocab=150, spread=2.0)
    bias_V = torch.linspace(-1, 1, 150)
    wanted = gradients(
        "exact",
        hidden_ND.double(),
        weight_VD.double(),
        target_N,
        bias_V.double(),
        weigh,
        **settings,
    )
    found = gradients(impl, hidden_ND, weight_VD, target_N, bias_V, weigh, **settings)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


def test_gradients_follow_every_rows_temperature(impl, problem, gradients):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    temperature_N = torch.linspace(0.3, 3.0, len(target_N))
    wanted = gradients(
        "exact", hidden_ND.double(), weight_VD.double(), target_N, temperature=temperature_N
    )
    found = gradients(impl, hidden_ND, weight_VD, target_N, temperature=temperature_N)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


def test_gradients_pass_finite_differences_in_float64(impl, problem):
    if impl == "triton":
        pytest.skip("triton computes in float32")
    hidden_ND, weight_VD, target_N = problem(rows=4, width=3, vocab=130, dtype=torch.float64)
    target_N[1] = -100

    def outputs(hidden_ND, weight_VD, bias_V):
        found = linear_logprob(
            hidden_ND, weight_VD, target_N, bias=bias_V, softcap=3.0, temperature=0.8,
            banned=(5, 100), entropy=True, impl=impl,
        )  # fmt: skip
        return found[:3]

    leaves = (hidden_ND, weight_VD, torch.linspace(-1, 1, 130, dtype=torch.float64))
    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in leaves], fast_mode=True)


def test_half_precision_gradients_are_rounded_once(impl, problem, gradients):
    """Within half a unit of the last place of the exact gradient, plus float32 noise."""
    hidden_ND, weight_VD, target_N = problem(dtype=torch.bfloat16, vocab=300)
    wanted = gradients("exact", hidden_ND.double(), weight_VD.double(), target_N)
    found = gradients(impl, hidden_ND, weight_VD, target_N)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        bound = b.abs() * 2**-8 * 1.001 + 1e-6 * b.abs().max()
        assert bool(((a.double() - b).abs() <= bound).all())


def test_the_slabs_backward_is_float32_inside_autocast_too(problem):
    """Its matmuls are its own; those of the reference are autograd's, to be called outside."""
    hidden_ND, weight_VD, target_N = problem()
    leaves, ones_N = [x.requires_grad_() for x in (hidden_ND, weight_VD)], torch.ones(len(target_N))
    plain = torch.autograd.grad(
        linear_logprob(*leaves, target_N, impl="slabs").logp, leaves, ones_N
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.autograd.grad(
            linear_logprob(*leaves, target_N, impl="slabs").logp, leaves, ones_N
        )
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_ignored_rows_score_zero_and_send_nothing(impl, problem):
    hidden_ND, weight_VD, target_N = problem()
    target_N[:] = -100
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    found = linear_logprob(hidden_ND, weight_VD, target_N, rank=True, impl=impl)
    assert found.logp.tolist() == [0.0] * len(target_N)
    assert found.rank.tolist() == [-1] * len(target_N)
    d_hidden_ND, d_weight_VD = torch.autograd.grad(found.logp.sum(), [hidden_ND, weight_VD])
    assert not d_hidden_ND.any()
    assert not d_weight_VD.any()


def test_one_ignored_row_leaves_the_others_alone(impl, problem, gradients):
    hidden_ND, weight_VD, target_N = problem()
    kept = torch.arange(len(target_N)) != 4
    wanted = gradients(impl, hidden_ND[kept], weight_VD, target_N[kept], weigh=(0,))
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD)]
    target_N[4] = 3
    found = linear_logprob(*leaves, target_N, ignore_index=3, impl=impl)
    assert found.logp[4].item() == 0.0
    scale_N = torch.ones(len(target_N))
    scale_N[kept] = torch.sin(torch.arange(int(kept.sum())) + 1.0)
    d_hidden_ND, d_weight_VD = torch.autograd.grad((scale_N * found.logp).sum(), leaves)
    assert torch.allclose(d_hidden_ND[kept], wanted[0], atol=1e-6)
    assert not d_hidden_ND[4].any()
    assert torch.allclose(d_weight_VD, wanted[1], atol=1e-6)


def test_banned_ids_are_outside_the_softmax(impl, problem, exact, assert_matches, gradients):
    """Equal to a head whose columns were removed; nothing flows to the removed rows."""
    hidden_ND, weight_VD, target_N = problem(vocab=200)
    banned = (0, 70, 128, 199)
    target_N = torch.randint(1, 60, (len(target_N),), generator=torch.Generator().manual_seed(3))
    kept = [v for v in range(200) if v not in banned]
    moved_N = torch.tensor([kept.index(v) for v in target_N.tolist()])
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, banned=banned, entropy=True, argmax=True, impl=impl
    )
    wanted = exact(hidden_ND, weight_VD[kept], moved_N)
    assert_matches(found, wanted, factor=0.1)
    assert found.argmax.tolist() == [kept[v] for v in wanted[3].argmax(dim=1).tolist()]
    d_hidden_ND, d_weight_VD = gradients(impl, hidden_ND, weight_VD, target_N, banned=banned)
    w_hidden_ND, w_weight_KD = gradients(
        "exact", hidden_ND.double(), weight_VD.double()[kept], moved_N
    )
    assert not d_weight_VD[list(banned)].any()
    assert (d_hidden_ND - w_hidden_ND).norm() <= 2e-6 * w_hidden_ND.norm()
    assert (d_weight_VD[kept] - w_weight_KD).norm() <= 2e-6 * w_weight_KD.norm()


def test_a_banned_target_is_impossible_and_silent(impl, problem):
    hidden_ND, weight_VD, target_N = problem(rows=2, vocab=200)
    target_N[:] = torch.tensor([70, 3])
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD)]
    found = linear_logprob(*leaves, target_N, banned=(70,), rank=True, impl=impl)
    assert found.logp[0].item() == -math.inf
    assert found.rank[0].item() == 199
    d_hidden_ND, d_weight_VD = torch.autograd.grad(found.logp, leaves, torch.ones(2))
    assert not d_hidden_ND[0].any()
    assert d_hidden_ND[1].any()
    assert bool(torch.isfinite(d_weight_VD).all())


def test_bias_of_minus_infinity_bans_like_a_ban(impl, problem, exact, assert_matches, gradients):
    hidden_ND, weight_VD, target_N = problem(vocab=200)
    target_N.clamp_(65, 130)
    bias_V = torch.zeros(200)
    # A whole slab of 64 ids, the first one, has no finite score.
    bias_V[:64] = -math.inf
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, bias=bias_V, entropy=True, argmax=True, impl=impl
    )
    banned = linear_logprob(
        hidden_ND, weight_VD, target_N, banned=range(64), entropy=True, argmax=True, impl=impl
    )
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, bias=bias_V), factor=0.1)
    assert torch.equal(found.logp, banned.logp)
    assert torch.equal(found.argmax, banned.argmax)
    for gradient in gradients(impl, hidden_ND, weight_VD, target_N, bias_V):
        assert bool(torch.isfinite(gradient).all())


def test_a_tied_weight_gets_both_of_its_gradients(impl, problem, exact):
    weight_VD = problem(vocab=130)[1].requires_grad_()
    target_N = torch.tensor([5, 129, 0])
    found = linear_logprob(weight_VD[target_N].tanh(), weight_VD, target_N, impl=impl)
    (d_weight_VD,) = torch.autograd.grad(found.logp.sum(), weight_VD)
    leaf = weight_VD.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(leaf[target_N].tanh(), leaf, target_N)[0].sum(), leaf)
    assert (d_weight_VD - wanted).norm() <= 2e-6 * wanted.norm()


def test_only_what_needs_a_gradient_gets_one(impl, problem, gradients):
    hidden_ND, weight_VD, target_N = problem()
    both = gradients(impl, hidden_ND, weight_VD, target_N)
    for position in (0, 1):
        leaves = [hidden_ND.clone(), weight_VD.clone()]
        leaves[position].requires_grad_()
        found = linear_logprob(*leaves, target_N, entropy=True, impl=impl)[:3]
        loss = sum(
            (torch.sin(torch.arange(len(x)) + k + 1.0) * x).sum() for k, x in enumerate(found)
        )
        (gradient,) = torch.autograd.grad(loss, leaves[position])
        assert torch.allclose(gradient, both[position], atol=1e-6)
