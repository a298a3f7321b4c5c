"""One problem, one float64 formula, one bar for every implementation of `linear_logprob`."""

import pytest
import torch

from rlpt_kernels import chunked, fused, linear_logprob, slabs
from rlpt_kernels.rows import TritonRows

IMPLEMENTATIONS = ["reference", "slabs", "chunked", "chunked+triton", "triton"]
"""Exact ones, all held to the same bar. `chunked+triton` runs its row kernels in the interpreter."""


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, monkeypatch):
    if request.param == "chunked+triton":
        monkeypatch.setattr(chunked, "rows_for", _triton_rows)
    return request.param.removesuffix("+triton")


def _triton_rows(problem, rank=False):
    return chunked.TorchRows() if rank or problem.dtype == torch.float64 else TritonRows()


@pytest.fixture(autouse=True)
def _small_pieces(request, monkeypatch):
    """Many slabs, blocks and chunks with ragged tails, at sizes that take milliseconds."""
    if "shipped_sizes" in request.fixturenames:
        return
    monkeypatch.setattr(slabs, "SLAB", 64)
    monkeypatch.setattr(slabs, "BLOCK", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(chunked, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 4 * 777 * 4, "cuda": 1 << 20})
    monkeypatch.setattr(TritonRows, "BLOCK", 128)
    monkeypatch.setattr(fused, "ROWS", 8)
    monkeypatch.setattr(fused, "SLAB", 256)


@pytest.fixture(name="problem")
def _problem():
    return problem


def problem(rows=9, width=8, vocab=777, seed=0, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * spread
    target_N = torch.randint(0, vocab, (rows,), generator=generator)
    target_N[0], target_N[-1] = 0, vocab - 1
    return hidden_ND.to(dtype), weight_VD.to(dtype), target_N


@pytest.fixture(name="exact")
def _exact():
    return exact


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


@pytest.fixture(name="assert_matches")
def _assert_matches():
    return assert_matches


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


@pytest.fixture(name="gradients")
def _gradients():
    return gradients


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
