"""The compiled kernels on a GPU, against float64. Run with `-m gpu`; CI has none."""

import pytest
import torch

from rlpt_kernels import fused, linear_logprob, linear_policy_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("shipped_sizes")]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def shipped_sizes():
    """Asked for by name: `_small_pieces` then leaves the sizes alone."""


def on_gpu(rows, width, vocab, dtype=torch.bfloat16, spread=2.0):
    torch.manual_seed(0)
    hidden_ND = torch.randn(rows, width, device="cuda").to(dtype)
    weight_VD = (torch.randn(vocab, width, device="cuda") * spread / width**0.5).to(dtype)
    target_N = torch.randint(vocab, (rows,), device="cuda")
    target_N[0], target_N[-1] = 0, vocab - 1
    return hidden_ND, weight_VD, target_N


def float64(hidden_ND, weight_VD, target_N):
    score_NV = hidden_ND.double() @ weight_VD.double().T
    logp_NV = torch.log_softmax(score_NV, 1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], entropy_N, score_NV


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 1), (129, 64, 777), (300, 1024, 32_000), (257, 1000, 50_257), (512, 2048, 151_936)],
)
@pytest.mark.parametrize("impl", ["triton", "chunked", "slabs"])
def test_compiled_values_are_float64s(impl, shape, dtype):
    hidden_ND, weight_VD, target_N = on_gpu(*shape, dtype)
    found = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, argmax=True, impl=impl)
    logp_N, entropy_N, score_NV = float64(hidden_ND, weight_VD, target_N)
    bar = 5e-5 * max(1.0, score_NV.abs().max().item() / 30)
    assert (found.logp - logp_N).abs().max().item() <= bar
    assert (found.entropy - entropy_N).abs().max().item() <= bar
    best_N = score_NV.gather(1, found.argmax[:, None])[:, 0]
    assert bool((score_NV.amax(1) - best_N <= 1e-5).all())


@pytest.mark.parametrize("impl", ["triton", "chunked", "slabs"])
def test_compiled_gradients_are_at_most_twice_as_wrong_as_plain_torch(impl):
    hidden_ND, weight_VD, target_N = on_gpu(1000, 512, 20_001)
    scale_N = torch.linspace(-1, 1, 1000, device="cuda")

    def gradients(logp_of, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        return torch.autograd.grad((scale_N * logp_of(*leaves)).sum(), leaves)

    def plain(hidden, weight):
        return torch.log_softmax((hidden @ weight.T).float(), 1).gather(1, target_N[:, None])[:, 0]

    truth = gradients(
        lambda h, w: float64(h, w, target_N)[0], hidden_ND.double(), weight_VD.double()
    )
    peers = gradients(plain, hidden_ND, weight_VD)
    ours = gradients(
        lambda h, w: linear_logprob(h, w, target_N, impl=impl).logp, hidden_ND, weight_VD
    )
    for a, b, c in zip(ours, peers, truth, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


def test_pointers_and_descriptors_agree(monkeypatch):
    hidden_ND, weight_VD, target_N = on_gpu(300, 512, 20_001)
    described = linear_logprob(hidden_ND, weight_VD, target_N, impl="triton").logp
    monkeypatch.setattr(fused, "tma", lambda problem: False)
    by_pointer = linear_logprob(hidden_ND, weight_VD, target_N, impl="triton").logp
    assert torch.allclose(described, by_pointer, atol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_company():
    hidden_ND, weight_VD, target_N = on_gpu(5000, 1024, 50_257)
    together = linear_logprob(hidden_ND, weight_VD, target_N, entropy=True, impl="triton")
    some_K = torch.tensor([4999, 3, 150], device="cuda")
    apart = linear_logprob(
        hidden_ND[some_K], weight_VD, target_N[some_K], entropy=True, impl="triton"
    )
    assert torch.equal(together.logp[some_K], apart.logp)
    assert torch.equal(together.entropy[some_K], apart.entropy)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_more_logits_than_32_bits_count(impl):
    """N x V = 2.3e9: the last rows are as right as the first, forward and backward."""
    hidden_ND, weight_VD, target_N = on_gpu(15_200, 64, 151_936)
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    found = linear_logprob(*leaves, target_N, impl=impl)
    tail = slice(-64, None)
    wanted_N = float64(hidden_ND[tail].detach(), weight_VD.detach(), target_N[tail])[0]
    assert (found.logp[tail] - wanted_N).abs().max().item() <= 5e-5
    d_hidden_ND = torch.autograd.grad(found.logp.sum(), leaves)[0]
    alone = hidden_ND[tail].detach().clone().requires_grad_()
    again = linear_logprob(alone, weight_VD.detach(), target_N[tail], impl=impl).logp
    (wanted_ND,) = torch.autograd.grad(again.sum(), alone)
    assert (d_hidden_ND[tail] - wanted_ND).norm() <= 1e-2 * wanted_ND.norm()


@pytest.mark.parametrize("trust_region", ["none", "clip", "tv"])
def test_the_one_pass_loss_is_the_recomputed_one(trust_region):
    hidden_ND, weight_VD, target_N = on_gpu(700, 512, 20_001)
    behaviour_N = linear_logprob(hidden_ND, weight_VD, target_N).logp + 0.3 * torch.randn(
        700, device="cuda"
    )
    terms = (behaviour_N, torch.randn(700, device="cuda"), torch.rand(700, device="cuda"))
    results = []
    for impl in ("chunked", "triton"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden_ND, weight_VD)]
        loss = linear_policy_loss(
            *leaves, target_N, *terms, trust_region=trust_region, impl=impl
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() <= 5e-3 * b.float().norm()


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_every_feature_at_once_is_the_references(impl):
    """Bans, bias, softcap, a temperature a row, ignored rows, repeated rows, rank, and the gradient of it all."""
    hidden_ND, weight_VD, target_N = on_gpu(300, 512, 20_001)
    target_N = target_N.clamp(10, 20_000)
    target_N[7] = -100
    rows_N = torch.randint(300, (300,), device="cuda")
    settings = {
        "bias": torch.linspace(-1, 1, 20_001, device="cuda"), "softcap": 20.0, "banned": (0, 1, 9_999),
        "temperature": torch.linspace(0.5, 2, 300, device="cuda"), "rows": rows_N,
        "entropy": True, "argmax": True, "rank": True,
    }  # fmt: skip
    results = []
    for name in (impl, "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden_ND, weight_VD)]
        found = linear_logprob(*leaves, target_N, impl=name, **settings)
        gradients = torch.autograd.grad((found.logp + found.entropy).sum(), leaves)
        results.append((found, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert (a - b).abs().max().item() <= 5e-5
    assert (ours.rank - theirs.rank).abs().max().item() <= 1
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


def test_auto_takes_the_kernel_for_half_precision():
    hidden_ND, weight_VD, target_N = on_gpu(8, 64, 100)
    chosen = linear_logprob(hidden_ND, weight_VD, target_N).logp
    assert torch.equal(chosen, linear_logprob(hidden_ND, weight_VD, target_N, impl="triton").logp)
