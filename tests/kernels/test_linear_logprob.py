"""`linear_logprob` against a float64 formula written here, in every implementation."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlpt_kernels import linear_logprob, slabs
from rlpt_kernels.head import Head, check
from rlpt_kernels.linear_logprob import FULL_LOGITS, choose

IMPLEMENTATIONS = ("reference", "slabs")
pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    """Many slabs and ragged tails at sizes that take milliseconds."""
    monkeypatch.setattr(slabs, "SLAB", 64)


def problem(rows=9, width=8, vocab=777, seed=0, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * spread
    target_N = torch.randint(0, vocab, (rows,), generator=generator)
    target_N[0], target_N[-1] = 0, vocab - 1
    return hidden_ND.to(dtype), weight_VD.to(dtype), target_N


def exact(hidden_ND, weight_VD, target_N, temperature=1.0, bias=None, softcap=None):
    """(logp, logsumexp, entropy, scores) row by row, in float64, from the definition."""
    logp, lse, entropy, scores = [], [], [], []
    for n, target in enumerate(target_N.tolist()):
        z = weight_VD.double() @ hidden_ND[n].double()
        z = z if bias is None else z + bias.double()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / (temperature[n].double() if torch.is_tensor(temperature) else temperature)
        top = z.detach().max()
        total = top + torch.log(torch.exp(z - top).sum())
        p = torch.exp(z - total)
        logp.append(z[target] - total)
        lse.append(total)
        entropy.append((p[p > 0] * (total - z[p > 0])).sum())
        scores.append(z)
    return torch.stack(logp), torch.stack(lse), torch.stack(entropy), torch.stack(scores)


def assert_matches(found, wanted, factor=1.0):
    """The bar of the scorer: 5e-5, more only where scores are so large that float32 is coarser."""
    logp, lse, entropy, scores = wanted
    finite = scores[torch.isfinite(scores)].abs().max().item()
    bar = factor * 5e-5 * max(1.0, finite / 30)
    for name, a, b in zip(
        ("logp", "logsumexp", "entropy"), found[:3], (logp, lse, entropy), strict=True
    ):
        assert a.dtype == torch.float32, name
        assert (a.double() - b).abs().max().item() <= bar, name


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 777, 2049])
@pytest.mark.parametrize("rows", [1, 9])
def test_values_are_those_of_the_formula(impl, vocab, rows):
    hidden_ND, weight_VD, target_N = problem(rows, vocab=vocab)
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, entropy=True, argmax=True, rank=True, impl=impl
    )
    wanted = exact(hidden_ND, weight_VD, target_N)
    assert_matches(found, wanted, factor=0.1)
    assert found.argmax.tolist() == wanted[3].argmax(dim=1).tolist()
    above_N = (wanted[3] > wanted[3].gather(1, target_N[:, None])).sum(dim=1)
    assert found.rank.tolist() == above_N.tolist()


def test_a_distribution_known_by_hand(impl):
    weight_VD = torch.tensor([[math.log(0.5)], [math.log(0.25)], [math.log(0.25)]])
    found = linear_logprob(
        torch.ones(3, 1), weight_VD, torch.tensor([0, 1, 2]), entropy=True, rank=True, impl=impl
    )
    assert found.logp.exp().tolist() == pytest.approx([0.5, 0.25, 0.25], rel=1e-6)
    assert found.logsumexp.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert found.entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 3, rel=1e-6)
    # Strictly above: the two ids of equal score do not outrank each other.
    assert found.rank.tolist() == [0, 1, 1]


def test_the_lowest_of_equal_ids_is_the_argmax(impl):
    hidden_ND, weight_VD, target_N = torch.ones(2, 4), torch.ones(300, 4), torch.tensor([7, 299])
    found = linear_logprob(hidden_ND, weight_VD, target_N, argmax=True, rank=True, impl=impl)
    assert found.argmax.tolist() == [0, 0]
    assert found.rank.tolist() == [0, 0]


@pytest.mark.parametrize("shift", [-300.0, -100.0, 100.0, 300.0])
def test_scores_far_from_zero_lose_no_digits(impl, shift):
    """A maximum that starts at 0, or a sum without one, would give -inf or nan here."""
    hidden_ND, weight_VD, target_N = problem(vocab=200)
    bias_V = torch.full((200,), shift)
    found = linear_logprob(hidden_ND, weight_VD, target_N, bias=bias_V, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, bias=bias_V))


def test_a_peaked_distribution_is_exact(impl):
    weight_VD = torch.zeros(200, 1)
    weight_VD[130], weight_VD[3] = 100.0, -100.0
    hidden_ND, target_N = torch.ones(3, 1), torch.tensor([130, 0, 3])
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl)
    assert found.logp.tolist() == pytest.approx([0.0, -100.0, -200.0], abs=1e-6)
    assert found.entropy.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_every_row_has_its_own_temperature(impl):
    hidden_ND, weight_VD, target_N = problem(vocab=300)
    temperature_N = torch.logspace(-2, 1, len(target_N))
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, temperature=temperature_N, entropy=True, impl=impl
    )
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, temperature=temperature_N))


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_bias_softcap_and_temperature_apply_in_this_order(impl, temperature):
    hidden_ND, weight_VD, target_N = problem(vocab=300, spread=3.0)
    bias_V = torch.linspace(-1, 1, 300)
    settings = {"temperature": temperature, "bias": bias_V, "softcap": 5.0}
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl, **settings)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_float32_logits(impl, dtype):
    """Bfloat16 logits would be off by 1e-2; the same inputs in float64 agree to 5e-5."""
    hidden_ND, weight_VD, target_N = problem(dtype=dtype, vocab=500, spread=2.0)
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N))


def test_autocast_changes_no_bit(impl):
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


def gradients(impl, hidden_ND, weight_VD, target_N, bias=None, weigh=True, **settings):
    """Gradients of a weighted sum of all differentiable outputs, and the outputs' values."""
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD, bias) if x is not None]
    bias = leaves[2] if bias is not None else None
    if impl == "exact":
        found = exact(*leaves[:2], target_N, bias=bias, **settings)[:3]
    else:
        found = linear_logprob(
            *leaves[:2], target_N, bias=bias, entropy=True, impl=impl, **settings
        )[:3]
    loss = sum(
        (torch.sin(torch.arange(len(x)) + k + 1.0).to(x.dtype) * x).sum()
        for k, x in enumerate(found)
        if weigh is True or k in weigh
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("weigh", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"softcap": 4.0}, {"softcap": 4.0, "temperature": 2.0}],
)
def test_gradients_are_those_of_the_formula(impl, weigh, settings):
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


def test_gradients_follow_every_rows_temperature(impl):
    hidden_ND, weight_VD, target_N = problem(vocab=150)
    temperature_N = torch.linspace(0.3, 3.0, len(target_N))
    wanted = gradients(
        "exact", hidden_ND.double(), weight_VD.double(), target_N, temperature=temperature_N
    )
    found = gradients(impl, hidden_ND, weight_VD, target_N, temperature=temperature_N)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


def test_gradients_pass_finite_differences_in_float64(impl):
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


def test_half_precision_gradients_are_rounded_once(impl):
    """Within half a unit of the last place of the exact gradient, plus float32 noise."""
    hidden_ND, weight_VD, target_N = problem(dtype=torch.bfloat16, vocab=300)
    wanted = gradients("exact", hidden_ND.double(), weight_VD.double(), target_N)
    found = gradients(impl, hidden_ND, weight_VD, target_N)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        bound = b.abs() * 2**-8 * 1.001 + 1e-6 * b.abs().max()
        assert bool(((a.double() - b).abs() <= bound).all())


def test_ignored_rows_score_zero_and_send_nothing(impl):
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


def test_one_ignored_row_leaves_the_others_alone(impl):
    hidden_ND, weight_VD, target_N = problem()
    kept = torch.arange(len(target_N)) != 4
    wanted = gradients(impl, hidden_ND[kept], weight_VD, target_N[kept], weigh=(0,))
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD)]
    target_N[4] = 3
    found = linear_logprob(*leaves, target_N, ignore_index=3, impl=impl)
    assert found.logp[4].item() == 0.0
    scale_N = torch.zeros(len(target_N))
    scale_N[kept] = torch.sin(torch.arange(int(kept.sum())) + 1.0)
    d_hidden_ND, d_weight_VD = torch.autograd.grad((scale_N * found.logp).sum(), leaves)
    assert torch.allclose(d_hidden_ND[kept], wanted[0], atol=1e-6)
    assert not d_hidden_ND[4].any()
    assert torch.allclose(d_weight_VD, wanted[1], atol=1e-6)


def test_banned_ids_are_outside_the_softmax(impl):
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


def test_a_banned_target_is_impossible_and_silent(impl):
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


def test_bias_of_minus_infinity_bans_like_a_ban(impl):
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


def test_a_tied_weight_gets_both_of_its_gradients(impl):
    weight_VD = problem(vocab=130)[1].requires_grad_()
    target_N = torch.tensor([5, 129, 0])
    found = linear_logprob(weight_VD[target_N].tanh(), weight_VD, target_N, impl=impl)
    (d_weight_VD,) = torch.autograd.grad(found.logp.sum(), weight_VD)
    leaf = weight_VD.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(leaf[target_N].tanh(), leaf, target_N)[0].sum(), leaf)
    assert (d_weight_VD - wanted).norm() <= 2e-6 * wanted.norm()


def test_layout_and_index_width_do_not_matter(impl):
    hidden_ND, weight_VD, target_N = problem()
    wanted = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp
    strided = linear_logprob(
        hidden_ND.T.contiguous().T, weight_VD.T.contiguous().T, target_N.int(), impl=impl
    ).logp
    assert torch.allclose(strided, wanted, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one(impl):
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


def test_no_rows_is_an_answer_too(impl):
    hidden_ND, weight_VD = torch.zeros(0, 4, requires_grad=True), torch.ones(70, 4)
    found = linear_logprob(hidden_ND, weight_VD, torch.zeros(0, dtype=torch.long), impl=impl)
    assert found.logp.tolist() == []
    found.logp.sum().backward()
    assert hidden_ND.grad is not None


def test_nan_is_never_hidden(impl):
    hidden_ND, weight_VD, target_N = problem()
    hidden_ND[2, 0] = math.nan
    logp_N = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp
    assert torch.isnan(logp_N).tolist() == [n == 2 for n in range(len(target_N))]


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return found


def test_slabs_never_hold_the_logits(impl):
    hidden_ND, weight_VD, target_N = problem(rows=100, width=4, vocab=2000)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
    with _LargestTensor() as largest:
        found = linear_logprob(*leaves, target_N, entropy=True, argmax=True, rank=True, impl=impl)
        (found.logp + found.entropy).sum().backward()
    assert largest.numel == (100 * 2000 if impl == "reference" else 2000 * 4)


def test_auto_takes_slabs_once_the_logits_are_large(impl):
    assert choose(1, FULL_LOGITS) == "reference"
    assert choose(1, FULL_LOGITS + 1) == "slabs"
    hidden_ND, weight_VD, target_N = problem()
    auto = linear_logprob(hidden_ND, weight_VD, target_N)
    chosen = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl)
    assert torch.allclose(auto.logp, chosen.logp, atol=1e-5)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"group: vocabulary-parallel", {"group": object()}),
        (r"vocab_start = 2, vocab_stop = None", {"vocab_start": 2}),
        (r"vocab_start = 0, vocab_stop = 7", {"vocab_stop": 7}),
        (r"target\[1\] = 10 is outside \[0, 10\)", {"target_N": torch.tensor([0, 10, 9])}),
        (r"target\[2\] = -1 is outside \[0, 10\)", {"target_N": torch.tensor([0, 9, -1])}),
        (r"temperature must be > 0; got 0", {"temperature": 0.0}),
        (
            r"temperature must be > 0; its least is 0",
            {"temperature": torch.tensor([1.0, 0.0, 2.0])},
        ),
        (r"temperature requires grad", {"temperature": torch.ones(3, requires_grad=True)}),
        (r"softcap must be > 0 or None; got -1", {"softcap": -1.0}),
        (r"banned holds 10, outside the vocabulary", {"banned": (3, 10)}),
        (r"banned holds all 10 ids", {"banned": range(10)}),
        (r"bias is -inf for every id", {"bias": torch.full((10,), -math.inf)}),
    ],
)
def test_mistakes_are_refused_by_name(impl, message, settings):
    hidden_ND, weight_VD, target_N = problem(rows=3, vocab=10)
    arguments = {"target_N": target_N, "impl": impl, **settings}
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden_ND, weight_VD, **arguments)


def test_a_vocabulary_stop_at_the_end_is_the_whole(impl):
    hidden_ND, weight_VD, target_N = problem(vocab=10)
    whole = linear_logprob(hidden_ND, weight_VD, target_N, vocab_stop=10, impl=impl)
    assert torch.equal(whole.logp, linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"must share D; got \(3, 4\) and \(10, 5\)", {"weight_VD": torch.ones(10, 5)}),
        (r"V = 0", {"weight_VD": torch.ones(0, 4)}),
        (r"hidden must be floating point", {"hidden_ND": torch.ones(3, 4, dtype=torch.long)}),
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
        "hidden_ND": torch.ones(3, 4),
        "weight_VD": torch.ones(10, 4),
        "bias_V": None,
        "target_N": torch.zeros(3, dtype=torch.long),
        "head": Head(),
    }
    with pytest.raises(ValueError, match=message):
        check(**{**arguments, **change})
