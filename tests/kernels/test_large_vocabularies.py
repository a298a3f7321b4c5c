"""The vocabularies of real models, with the shipped sizes of slabs, chunks and tiles, against float64."""

import pytest
import torch

from rlpt_kernels import linear_logprob

IMPLEMENTATIONS = ["reference", "slabs", "chunked", "triton"]


LARGEST = pytest.param(151_936, marks=pytest.mark.slow)
"""Twenty seconds of the interpreter."""


@pytest.fixture
def shipped_sizes():
    """Asked for by name: `_small_pieces` then leaves the sizes alone."""


@pytest.mark.usefixtures("shipped_sizes")
@pytest.mark.parametrize("vocab", [1, 777, 1000, 2049, 32_000, 50_257, LARGEST])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_first_and_last_columns_of_every_vocabulary(impl, vocab, problem, exact, assert_matches):
    hidden_ND, weight_VD, target_N = problem(
        rows=3, width=16, vocab=vocab, dtype=torch.bfloat16, spread=1.2
    )
    # A rank is a second walk, which takes the interpreter seconds at the largest sizes.
    rank = impl != "triton" or vocab <= 2049
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, entropy=True, argmax=True, rank=rank, impl=impl
    )
    wanted = exact(hidden_ND, weight_VD, target_N)
    assert_matches(found, wanted)
    assert found.argmax.tolist() == wanted[3].argmax(dim=1).tolist()
    if rank:
        above_NV = wanted[3] - wanted[3].gather(1, target_N[:, None])
        # Scores that differ by less than float32 can tell may fall on either side.
        doubt_N = (above_NV.abs() < 1e-5).sum(dim=1)
        assert bool(((found.rank - (above_NV > 0).sum(dim=1)).abs() < doubt_N).all())


@pytest.mark.usefixtures("shipped_sizes")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 10.0])
def test_temperatures_from_a_hundredth_to_ten(impl, temperature, problem, exact, assert_matches):
    hidden_ND, weight_VD, target_N = problem(rows=5, width=16, vocab=2049)
    found = linear_logprob(
        hidden_ND, weight_VD, target_N, temperature=temperature, entropy=True, impl=impl
    )
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, temperature=temperature))


@pytest.mark.usefixtures("shipped_sizes")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_logits_all_beyond_two_hundred(impl, shift, problem, exact, assert_matches):
    """Through hidden and weight, not a bias: one more column carries the shift."""
    hidden_ND, weight_VD, target_N = problem(rows=5, width=16, vocab=2049, spread=0.5)
    hidden_ND[:, 0], weight_VD[:, 0] = 16.0, shift / 16.0 * 1.1
    scores = exact(hidden_ND, weight_VD, target_N)[3]
    assert bool((scores.sign() == (1 if shift > 0 else -1)).all())
    assert scores.abs().min() > 200
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N))


@pytest.mark.slow
@pytest.mark.usefixtures("shipped_sizes")
def test_gradients_at_the_shipped_sizes(problem, gradients):
    """One slab and a ragged rest, in torch and in the kernel."""
    hidden_ND, weight_VD, target_N = problem(rows=4, width=16, vocab=8197, spread=0.5)
    wanted = gradients("exact", hidden_ND.double(), weight_VD.double(), target_N)
    for impl in ("slabs", "chunked", "triton"):
        for a, b in zip(gradients(impl, hidden_ND, weight_VD, target_N), wanted, strict=True):
            assert (a.double() - b).norm() <= 2e-6 * b.norm()
