"""Values of `linear_logprob` against the float64 formula."""

import math

import pytest
import torch

from rlpt_kernels import linear_logprob
from rlpt_kernels.linear_logprob import FULL_LOGITS, choose


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 777, 2049])
@pytest.mark.parametrize("rows", [1, 9])
def test_values_are_those_of_the_formula(impl, vocab, rows, problem, exact, assert_matches):
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
def test_scores_far_from_zero_lose_no_digits(impl, shift, problem, exact, assert_matches):
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


def test_every_row_has_its_own_temperature(impl, problem, exact, assert_matches):
    hidden_ND, weight_VD, target_N = problem(vocab=300)
    temperature_N = torch.logspace(-2, 1, len(target_N))
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, temperature=temperature_N, entropy=True, impl=impl
    )
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, temperature=temperature_N))


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_bias_softcap_and_temperature_apply_in_this_order(
    impl, temperature, problem, exact, assert_matches
):
    hidden_ND, weight_VD, target_N = problem(vocab=300, spread=3.0)
    bias_V = torch.linspace(-1, 1, 300)
    settings = {"temperature": temperature, "bias": bias_V, "softcap": 5.0}
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl, **settings)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_float32_logits(impl, dtype, problem, exact, assert_matches):
    """Bfloat16 logits would be off by 1e-2; the same inputs in float64 agree to 5e-5."""
    hidden_ND, weight_VD, target_N = problem(dtype=dtype, vocab=500, spread=2.0)
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N))


def test_layout_and_index_width_do_not_matter(impl, problem):
    hidden_ND, weight_VD, target_N = problem()
    wanted = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp
    strided = linear_logprob(
        hidden_ND.T.contiguous().T, weight_VD.T.contiguous().T, target_N.int(), impl=impl
    ).logp
    assert torch.allclose(strided, wanted, atol=1e-6)


def test_no_rows_is_an_answer_too(impl):
    hidden_ND, weight_VD = torch.zeros(0, 4, requires_grad=True), torch.ones(70, 4)
    found = linear_logprob(hidden_ND, weight_VD, torch.zeros(0, dtype=torch.long), impl=impl)
    assert found.logp.tolist() == []
    found.logp.sum().backward()
    assert hidden_ND.grad is not None


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_is_never_hidden(impl, problem):
    hidden_ND, weight_VD, target_N = problem()
    hidden_ND[2, 0] = math.nan
    logp_N = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp
    assert torch.isnan(logp_N).tolist() == [n == 2 for n in range(len(target_N))]


def test_auto_takes_slabs_once_the_logits_are_large(impl, problem):
    wide_VD = torch.zeros(FULL_LOGITS, 1)
    assert choose(torch.zeros(1, 1), wide_VD, 1) == "reference"
    assert choose(torch.zeros(2, 1), wide_VD, 2) == "slabs"
    hidden_ND, weight_VD, target_N = problem()
    auto = linear_logprob(hidden_ND, weight_VD, target_N)
    chosen = linear_logprob(hidden_ND, weight_VD, target_N, impl=impl)
    assert torch.allclose(auto.logp, chosen.logp, atol=1e-5)


def test_a_vocabulary_stop_at_the_end_is_the_whole(impl, problem):
    hidden_ND, weight_VD, target_N = problem(vocab=10)
    whole = linear_logprob(hidden_ND, weight_VD, target_N, vocab_stop=10, impl=impl)
    assert torch.equal(whole.logp, linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp)
