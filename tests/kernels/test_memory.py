"""What each implementation holds at a time, by the allocator's record: operators are opaque to dispatch modes."""

import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlpt_kernels import chunked, linear_logprob, linear_policy_loss, slabs

ROWS, WIDTH, VOCAB = 2000, 8, 3000
LOGITS = ROWS * VOCAB * 4


@pytest.fixture
def shipped_sizes():
    """Asked for by name: `_small_pieces` then leaves the sizes alone."""


@pytest.fixture(autouse=True)
def _pieces(shipped_sizes, monkeypatch):
    """A few pieces each, in proportion to these logits what the shipped ones are to real logits."""
    monkeypatch.setattr(slabs, "SLAB", 128)
    monkeypatch.setattr(slabs, "BLOCK", {"cpu": 1024})
    monkeypatch.setattr(chunked, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": LOGITS // 40})


def peak(call):
    """The most bytes held during a call beyond what was held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_meter_sees_into_an_operator():
    assert 4_000_000 <= peak(lambda: torch.ones(1_000_000).add(1).sum()) <= 8_100_000


@pytest.mark.parametrize(
    ("impl", "share"),
    [("reference", 10.0), ("slabs", 1 / 8), ("slabs_bf16", 1 / 8), ("chunked", 1 / 8)],
)
def test_nothing_of_the_size_of_the_logits_is_held(impl, share, problem):
    """Forward and backward, with every output; the reference shows that the meter would see it."""
    hidden_ND, weight_VD, target_N = problem(rows=ROWS, width=WIDTH, vocab=VOCAB)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]

    def call():
        found = linear_logprob(*leaves, target_N, entropy=True, argmax=True, rank=True, impl=impl)
        (found.logp + found.entropy).sum().backward()

    found = peak(call)
    assert found <= share * LOGITS
    if impl == "reference":
        assert found >= LOGITS


def test_the_one_pass_loss_holds_chunks_and_gradients(problem):
    hidden_ND, weight_VD, target_N = problem(rows=ROWS, width=WIDTH, vocab=VOCAB)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
    terms = (torch.full((ROWS,), -8.0), torch.linspace(-1, 1, ROWS), torch.ones(ROWS))
    assert peak(lambda: linear_policy_loss(*leaves, target_N, *terms).loss.backward()) <= LOGITS / 8
