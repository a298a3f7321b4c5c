"""What PyTorch around the operator must not change: compilers, autocast, process-wide settings, other rows."""

import logging
import threading

import pytest
import torch

from rlpt_kernels import fused, linear_logprob, notes
from rlpt_kernels.linear_logprob import choose
from rlpt_kernels.matmul import exact
from rlpt_kernels.ops import IMPLEMENTATIONS, linear_logprob_backward_op, linear_logprob_op
from rlpt_kernels.policy_op import linear_policy_loss_op
from rlpt_kernels.rows import TritonRows

OPAQUE = ["slabs", "chunked", "triton"]


@pytest.mark.parametrize("impl", OPAQUE)
def test_the_operator_keeps_torchs_rules(impl, problem):
    """Schema, fake kernels, autograd registration: PyTorch's own checks."""
    hidden_ND, weight_VD, target_N = problem(rows=5, vocab=100)
    across = [x.T.contiguous().T for x in (hidden_ND, weight_VD)]
    leaves = [x.requires_grad_() for x in (*across, torch.zeros(100))]
    rows_N = torch.tensor([1, 1, 0, 4, 2])
    call = (*leaves, target_N, rows_N, torch.linspace(0.5, 2, 5), 1.0, 5.0, -100, (3,))
    settings = (True, True, True, 0, 100, "", impl)
    torch.library.opcheck(linear_logprob_op, (*call, *settings))
    logp, _, entropy, _, _, top, total = (x.detach() for x in linear_logprob_op(*call, *settings))
    ones = torch.ones(5)
    backward = (logp, entropy, top, total, ones, None, ones, True, True, True)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    torch.library.opcheck(linear_logprob_backward_op, (*detached, *settings, *backward))
    terms = (torch.full((5,), -4.0), torch.linspace(-1, 1, 5), torch.ones(5))
    rest = (1.0, None, -100, (3,), 100, "clip", 0.2, 0.2, 0.2, 5.0, True, True, True, True)
    torch.library.opcheck(linear_policy_loss_op, (*leaves, target_N, rows_N, None, *terms, *rest))


def test_process_wide_matmul_settings_change_no_bit(impl, problem):
    """TF32 or bfloat16 products, allowed for a model's body, must not reach the rewards."""
    hidden_ND, weight_VD, target_N = problem(rows=12, width=64)

    def run():
        leaves = [x.clone().requires_grad_() for x in (hidden_ND, weight_VD)]
        found = linear_logprob(*leaves, target_N, impl=impl)
        return [found.logp.detach(), *torch.autograd.grad(found.logp.sum(), leaves)]

    plain = run()
    torch.set_float32_matmul_precision("medium")
    try:
        product = hidden_ND @ weight_VD.T
        fast = run()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(hidden_ND @ weight_VD.T, product)
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(plain, fast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0, "temperature": 0.5}])
def test_rows_are_gathered_before_the_head_and_their_gradients_after_it(impl, extra, problem):
    hidden_MD, weight_VD, _ = problem(rows=6, vocab=150)
    rows_N, target_N = torch.tensor([5, 5, 0, 3, 5, 3]), torch.tensor([0, 149, 7, -100, 9, 80])
    leaves = [x.clone().requires_grad_() for x in (hidden_MD, weight_VD)]
    found = linear_logprob(*leaves, target_N, rows=rows_N, entropy=True, impl=impl, **extra)
    again = [x.clone().requires_grad_() for x in (hidden_MD, weight_VD)]
    gathered = again[0].index_select(0, rows_N)
    wanted = linear_logprob(gathered, again[1], target_N, entropy=True, impl=impl, **extra)
    assert torch.equal(found.logp, wanted.logp)
    scale_N = torch.linspace(-1, 2, 6)
    pairs = zip(
        torch.autograd.grad((scale_N * found.logp + found.entropy).sum(), leaves),
        torch.autograd.grad((scale_N * wanted.logp + wanted.entropy).sum(), again),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert not leaves[0].detach()[[1, 2, 4]].isnan().any()


@pytest.mark.parametrize("name", ["slabs", "chunked", "triton"])
def test_rows_without_a_gradient_reach_no_matmul(name, problem, monkeypatch):
    hidden_ND, weight_VD, target_N = problem(rows=12)
    scale_N = torch.ones(12)
    scale_N[[1, 5, 6]] = 0.0
    target_N[8] = -100
    seen, kind = [], type(IMPLEMENTATIONS[name])
    pull = kind.pull
    monkeypatch.setattr(
        kind,
        "pull",
        lambda self, problem, *rest: (
            seen.append(len(problem.target_N)) or pull(self, problem, *rest)
        ),
    )
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
    found = torch.autograd.grad(
        (scale_N * linear_logprob(*leaves, target_N, impl=name).logp).sum(), leaves
    )
    assert seen == [8]
    wanted = torch.autograd.grad(
        (scale_N * linear_logprob(*leaves, target_N, impl="reference").logp).sum(), leaves
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()
    assert not found[0][[1, 5, 6, 8]].any()


@pytest.mark.parametrize("settings", [{}, {"entropy": True, "argmax": True}])
def test_a_rows_bits_do_not_depend_on_its_company(settings, problem, monkeypatch):
    """The fused kernel: alone, in a batch, in another place, the same to the last bit; and twice the same."""
    monkeypatch.setattr(fused, "ROWS", 256)
    hidden_ND, weight_VD, target_N = problem(rows=300, width=40)
    call = {"impl": "triton", **settings}
    together = linear_logprob(hidden_ND, weight_VD, target_N, **call)
    again = linear_logprob(hidden_ND, weight_VD, target_N, **call)
    assert torch.equal(together.logp, again.logp)
    some_K = torch.tensor([299, 3, 150])
    apart = linear_logprob(hidden_ND[some_K], weight_VD, target_N[some_K], **call)
    for a, b in zip(together, apart, strict=True):
        if a is not None:
            assert torch.equal(a[some_K], b)


@pytest.mark.parametrize("by_descriptor", [True, False])
@pytest.mark.parametrize("width", [1, 7, 40, 64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_width_is_right_by_descriptor_and_by_pointer(
    by_descriptor, width, dtype, problem, exact, assert_matches, monkeypatch, caplog
):
    """Widths that no copy in bulk can read are padded, and the log says so."""
    monkeypatch.setattr(fused, "tma", lambda problem: by_descriptor)
    monkeypatch.setattr(notes, "_said", set())
    hidden_ND, weight_VD, target_N = problem(width=width, vocab=300, dtype=dtype)
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    with caplog.at_level(logging.INFO, logger="rlpt_kernels"):
        found = linear_logprob(*leaves, target_N, entropy=True, impl="triton")
    assert ("triton: copies weight" in caplog.text) == (width % 16 != 0)
    assert_matches(found, exact(*(x.detach() for x in leaves), target_N))
    ours = torch.autograd.grad(found.logp.sum(), leaves)
    wanted = torch.autograd.grad(
        linear_logprob(*leaves, target_N, impl="reference").logp.sum(), leaves
    )
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).norm() <= (2e-6 if dtype == torch.float32 else 4e-3) * b.norm()


def test_operands_that_start_anywhere_or_lie_across_are_copied(problem, exact, assert_matches):
    """A slice whose first row is not at 16 bytes, a transposed weight, a row stride that is odd."""
    hidden_ND, weight_VD, target_N = problem(width=33, vocab=300)
    across_VD = weight_VD[:, 1:].T.contiguous().T
    for hidden, weight in ((hidden_ND[:, 1:], weight_VD[:, 1:]), (hidden_ND[:, :32], across_VD)):
        found = linear_logprob(hidden, weight, target_N, entropy=True, impl="triton")
        assert_matches(found, exact(hidden, weight, target_N))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_inputs_of_two_dtypes_meet_in_float32(impl, dtypes, problem, exact, assert_matches):
    hidden_ND, weight_VD, target_N = problem(vocab=200)
    hidden_ND, weight_VD = hidden_ND.to(dtypes[0]), weight_VD.to(dtypes[1])
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    found = linear_logprob(*leaves, target_N, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND.detach(), weight_VD.detach(), target_N))
    for leaf, gradient in zip(leaves, torch.autograd.grad(found.logp.sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype


def test_gradients_are_at_most_twice_as_wrong_as_plain_torch(impl, problem, exact, monkeypatch):
    """Both dtypes, against float64: full logits in the inputs' dtype are the peer."""
    monkeypatch.setattr(fused, "ROWS", 64)
    monkeypatch.setattr(TritonRows, "BLOCK", 512)
    for dtype in (torch.float32, torch.bfloat16):
        hidden_ND, weight_VD, target_N = problem(
            rows=60, width=32, vocab=500, dtype=dtype, spread=0.5
        )
        wide = [x.double().requires_grad_() for x in (hidden_ND, weight_VD)]
        truth = torch.autograd.grad(exact(*wide, target_N)[0].sum(), wide)
        leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
        logits_NV = (leaves[0] @ leaves[1].T).float()
        plain = torch.log_softmax(logits_NV, 1).gather(1, target_N[:, None]).sum()
        peers = torch.autograd.grad(plain, leaves)
        ours = torch.autograd.grad(linear_logprob(*leaves, target_N, impl=impl).logp.sum(), leaves)
        for a, b, c in zip(ours, peers, truth, strict=True):
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


def test_bfloat16_logits_are_named_for_what_they_are(problem, exact):
    """`slabs_bf16` is off by 1e-3 and more where the exact ones are not; `auto` never takes it."""
    hidden_ND, weight_VD, target_N = problem(rows=64, width=64, spread=0.25, dtype=torch.bfloat16)
    wanted_N = exact(hidden_ND, weight_VD, target_N)[0]
    errors = {
        impl: (linear_logprob(hidden_ND, weight_VD, target_N, impl=impl).logp - wanted_N)
        .abs()
        .max()
        .item()
        for impl in ("slabs", "slabs_bf16")
    }
    assert errors["slabs"] < 5e-6
    assert 1e-3 < errors["slabs_bf16"] < 5e-2
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    fast = torch.autograd.grad(
        linear_logprob(*leaves, target_N, impl="slabs_bf16").logp.sum(), leaves
    )
    slow = torch.autograd.grad(linear_logprob(*leaves, target_N, impl="slabs").logp.sum(), leaves)
    for a, b in zip(fast, slow, strict=True):
        assert (a.float() - b.float()).norm() <= 3e-2 * b.float().norm()


def test_auto_says_once_what_it_took(caplog, problem, monkeypatch):
    hidden_ND, weight_VD, target_N = problem()
    monkeypatch.setattr(notes, "_said", set())
    with caplog.at_level(logging.INFO, logger="rlpt_kernels"):
        for _ in range(3):
            linear_logprob(hidden_ND, weight_VD, target_N)
    assert [record.getMessage() for record in caplog.records] == [
        "linear_logprob: auto takes reference for torch.float32 on cpu"
    ]


def test_auto_never_takes_what_is_inexact(problem):
    hidden_ND, weight_VD, _ = problem(dtype=torch.bfloat16)
    chosen = {choose(hidden_ND, weight_VD, rows) for rows in (1, 1 << 30)}
    assert chosen == {"reference", "slabs"}


def test_a_second_derivative_is_refused_not_wrong(problem):
    hidden_ND, weight_VD, target_N = problem()
    hidden_ND.requires_grad_()
    found = linear_logprob(hidden_ND, weight_VD, target_N, impl="slabs").logp.sum()
    (gradient,) = torch.autograd.grad(found, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), hidden_ND)


def test_the_backward_runs_in_any_thread(problem):
    """A backward on autograd's thread, and one from a thread of our own: the same gradient."""
    hidden_ND, weight_VD, target_N = problem()
    gradients = []

    def run():
        leaf = hidden_ND.clone().requires_grad_()
        linear_logprob(leaf, weight_VD, target_N, impl="triton").logp.sum().backward()
        gradients.append(leaf.grad)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
    assert torch.equal(*gradients)


def test_unknown_and_unfit_implementations_are_refused(problem, monkeypatch):
    hidden_ND, weight_VD, target_N = problem()
    with pytest.raises(ValueError, match="for float64 choose slabs or reference"):
        linear_logprob(hidden_ND.double(), weight_VD, target_N, impl="triton")
    monkeypatch.setattr("rlpt_kernels.launch.interpreted", lambda: False)
    with pytest.raises(
        ValueError, match="impl = 'triton': tensors are on cpu; move the tensors to a GPU"
    ):
        linear_logprob(hidden_ND, weight_VD, target_N, impl="triton")


def test_two_threads_inside_leave_the_process_as_it_was():
    """The first one in saves the settings, the last one out restores them, in whatever order they leave."""
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = exact(torch.device("cpu")), exact(torch.device("cpu"))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("softcap", [5.0, 30.0, 1e3, 1e5])
def test_a_softcap_far_above_the_scores_loses_no_digits(
    impl, softcap, problem, exact, assert_matches
):
    """tanh near 0: 2 sigmoid(2x) - 1 cancels, and the softcap multiplies what is left."""
    hidden_ND, weight_VD, target_N = problem(vocab=300, spread=1.5)
    found = linear_logprob(hidden_ND, weight_VD, target_N, softcap=softcap, entropy=True, impl=impl)
    assert_matches(found, exact(hidden_ND, weight_VD, target_N, softcap=softcap))


def test_many_bans_in_many_tiles(impl, problem, exact, assert_matches):
    """In any order, some twice, whole tiles of them."""
    hidden_ND, weight_VD, target_N = problem(vocab=1500)
    target_N = target_N.clamp(100, 200)
    banned = [*range(1499, 700, -3), *range(512, 768), 0, 0, 7]
    bias_V = torch.zeros(1500)
    bias_V[banned] = -torch.inf
    found = linear_logprob(
        hidden_ND,
        weight_VD,
        target_N,
        banned=banned,
        entropy=True,
        argmax=True,
        rank=True,
        impl=impl,
    )
    wanted = exact(hidden_ND, weight_VD, target_N, bias=bias_V)
    assert_matches(found, wanted)
    assert found.argmax.tolist() == wanted[3].argmax(dim=1).tolist()
    assert (
        found.rank.tolist() == (wanted[3] > wanted[3].gather(1, target_N[:, None])).sum(1).tolist()
    )
