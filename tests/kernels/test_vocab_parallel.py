"""Vocabulary-parallel heads on real process groups: unequal and padded shares, one gather, every rank the same bits."""

import datetime
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlpt_kernels import linear_logprob, linear_policy_loss
from rlpt_kernels.softmax import Softmax

VOCAB = 300
SHARES = {
    2: [(0, 131), (131, 300)],
    3: [(200, 300), (0, 1), (1, 200)],  # the ranks are not in the order of the ids
    4: [(0, 64), (64, 65), (65, 299), (299, 300)],
}
SETTINGS = {
    "plain": {},
    "everything": {"temperature": 0.7, "softcap": 6.0, "banned": (0, 64, 299)},
}


def problem():
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(11, 8, generator=draw)
    weight_VD, bias_V = torch.randn(VOCAB, 8, generator=draw), torch.randn(VOCAB, generator=draw)
    target_N = torch.tensor([1, 63, 65, 298, 130, 131, -100, 199, 200, 2, 250])
    return hidden_ND, weight_VD, bias_V, target_N


def weigh(found):
    values = [x for x in found[:3] if x is not None]
    return sum((torch.sin(torch.arange(len(x)) + k + 1.0) * x).sum() for k, x in enumerate(values))


def policy_terms():
    draw = torch.Generator().manual_seed(5)
    return (
        torch.randn(11, generator=draw) - 6,
        torch.randn(11, generator=draw),
        torch.rand(11, generator=draw),
    )


def whole(settings):
    """The answer of one process that holds everything."""
    leaves = [x.requires_grad_() for x in problem()[:3]]
    target_N = problem()[3]
    found = linear_logprob(
        *leaves[:2],
        target_N,
        bias=leaves[2],
        entropy=True,
        argmax=True,
        rank=True,
        impl="reference",
        **settings,
    )
    gradients = torch.autograd.grad(weigh(found), leaves)
    loss = linear_policy_loss(
        *leaves[:2],
        target_N,
        *policy_terms(),
        bias=leaves[2],
        impl="reference",
        trust_region="clip",
        **settings,
    ).loss
    return [x.detach() for x in found], gradients, loss.detach(), torch.autograd.grad(loss, leaves)


def share(rank, ranks, padding):
    """This rank's rows of the weight and bias, with rows of rubbish after them."""
    start, stop = SHARES[ranks][rank]
    _, weight_VD, bias_V, _ = problem()
    weight_SD = torch.cat([weight_VD[start:stop], torch.full((padding, 8), 1e9)])
    bias_S = torch.cat([bias_V[start:stop], torch.full((padding,), 1e9)])
    return start, stop, weight_SD.requires_grad_(), bias_S.requires_grad_()


def parallel(rank, ranks, group, impl, settings):
    start, stop, weight_SD, bias_S = share(rank, ranks, padding=3 if rank % 2 else 0)
    hidden_ND, target_N = problem()[0].requires_grad_(), problem()[3]
    leaves = [hidden_ND, weight_SD, bias_S]
    where = {"vocab_start": start, "vocab_stop": stop, "group": group, "bias": bias_S, "impl": impl}
    found = linear_logprob(
        hidden_ND, weight_SD, target_N, entropy=True, argmax=True, rank=True, **where, **settings
    )
    gradients = torch.autograd.grad(weigh(found), leaves)
    loss = linear_policy_loss(
        hidden_ND, weight_SD, target_N, *policy_terms(), trust_region="clip", **where, **settings
    ).loss
    return [x.detach() for x in found], gradients, loss.detach(), torch.autograd.grad(loss, leaves)


def refusals(rank, group):
    """Every rank must raise the same, or the others would wait for it."""
    hidden_ND, weight_VD, _, target_N = problem()
    stray_N = target_N.clone()
    stray_N[2] = VOCAB
    cases = {
        "gap": ([(0, 100), (101, 300)], target_N),
        "overlap": ([(0, 100), (99, 300)], target_N),
        "late start": ([(1, 100), (100, 300)], target_N),
        "stray": ([(0, 100), (100, 300)], stray_N),
        "empty row": ([(0, 100), (100, 300)], target_N),
    }
    told = {}
    for name, (shares, target) in cases.items():
        start, stop = shares[rank]
        bias = torch.full((stop - start,), -torch.inf) if name == "empty row" else None
        try:
            linear_logprob(
                hidden_ND, weight_VD[start:stop], target, vocab_start=start, vocab_stop=stop,
                group=group, bias=bias,
            )  # fmt: skip
        except ValueError as error:
            told[name] = str(error)
    return told


def gathers(rank, group):
    """How many collectives one forward makes, and in which dtype."""
    seen, gather, reduce = [], dist.all_gather_single, dist.all_reduce
    dist.all_gather_single = lambda out, x, **kw: (
        seen.append(("gather", x.dtype)) or gather(out, x, **kw)
    )
    dist.all_reduce = lambda x, **kw: seen.append(("reduce", x.dtype)) or reduce(x, **kw)
    start, _, weight_SD, _ = share(rank, 2, padding=0)
    hidden_ND, target_N = problem()[0].bfloat16().requires_grad_(), problem()[3]
    found = linear_logprob(
        hidden_ND,
        weight_SD.bfloat16(),
        target_N,
        vocab_start=start,
        group=group,
        entropy=True,
        argmax=True,
    )
    forward = list(seen)
    found.logp.sum().backward()
    dist.all_gather_single, dist.all_reduce = gather, reduce
    return {"forward": forward, "backward": seen[len(forward) :]}


def work(rank, folder):
    """Four ranks; the first two, and the first three, are groups of their own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    results = {}
    for ranks in SHARES:
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            results[ranks] = answers_of(rank, ranks, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def answers_of(rank, ranks, group):
    # Two ranks run the kernel too: the interpreter is slow.
    impls = ("slabs", "triton") if ranks == 2 else ("slabs",)
    results = {
        (impl, name): parallel(rank, ranks, group, impl, settings)
        for impl in impls
        for name, settings in SETTINGS.items()
    }
    if ranks == 2:
        results |= {"refusals": refusals(rank, group), "gathers": gathers(rank, group)}
    return results


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(params=[2, 3, 4])
def answers(request, everything):
    return [answer[request.param] for answer in everything[: request.param]]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("impl", ["slabs", "triton"])
def test_every_rank_gets_the_answer_of_the_whole(answers, impl, name):
    ranks = len(answers)
    if (impl, name) not in answers[0]:
        pytest.skip("triton runs with two ranks: the interpreter is slow")
    wanted, wanted_gradients, loss, loss_gradients = whole(SETTINGS[name])
    for rank, answer in enumerate(answers):
        found, gradients, found_loss, found_loss_gradients = answer[impl, name]
        for a, b in zip(found[:3], wanted[:3], strict=True):
            assert torch.allclose(a, b, atol=2e-5)
        assert found[3].tolist() == wanted[3].tolist()
        assert found[4].tolist() == wanted[4].tolist()
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        own = slice(*SHARES[ranks][rank])
        for theirs, ours in ((wanted_gradients, gradients), (loss_gradients, found_loss_gradients)):
            # hidden is the same everywhere, so its gradient is whole everywhere; a share's is its own rows'.
            expected = (theirs[0], theirs[1][own], theirs[2][own])
            for a, b in zip(ours, expected, strict=True):
                assert (a[: len(b)] - b).norm() <= 2e-5 * b.norm() + 1e-8
                assert not a[len(b) :].any()


@pytest.mark.slow
def test_every_rank_has_the_same_bits(answers):
    for key in [key for key in answers[0] if isinstance(key, tuple)]:
        for answer in answers[1:]:
            for a, b in zip(answers[0][key][0], answer[key][0], strict=True):
                assert torch.equal(a, b)
            assert torch.equal(answers[0][key][1][0], answer[key][1][0])


@pytest.mark.slow
@pytest.mark.parametrize("answers", [2], indirect=True)
def test_shares_that_make_no_vocabulary_are_refused_on_every_rank(answers):
    assert answers[0]["refusals"] == answers[1]["refusals"]
    told = answers[0]["refusals"]
    assert (
        "vocab_start = 101 of rank 1 in the group, but the ids before it end at 100" in told["gap"]
    )
    assert (
        "vocab_start = 99 of rank 1 in the group, but the ids before it end at 100"
        in told["overlap"]
    )
    assert (
        "vocab_start = 1 of rank 0 in the group, but the ids before it end at 0"
        in told["late start"]
    )
    assert "target[2] = 300 is outside [0, 300)" in told["stray"]
    assert "row 0 has no distribution" in told["empty row"]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [2], indirect=True)
def test_one_float32_gather_forward_and_one_float32_sum_backward(answers):
    for answer in answers:
        assert answer["gathers"]["forward"] == [("gather", torch.float32)]
        assert answer["gathers"]["backward"] == [("reduce", torch.float32)]


def test_of_equal_scores_in_two_shares_the_lower_id_wins():
    def part(maximum, argmax):
        maximum_N, one_N = torch.tensor([maximum]), torch.ones(1)
        return Softmax(maximum_N, one_N, torch.full((1,), -torch.inf), None, torch.tensor([argmax]))

    equal, above = part(2.0, 7), part(2.0, 7)
    equal.merge(part(2.0, 200))
    above.merge(part(3.0, 200))
    assert equal.argmax_N.tolist() == [7]
    assert above.argmax_N.tolist() == [200]
    assert equal.logsumexp().item() == pytest.approx(2.0 + math.log(2))


def test_what_needs_the_whole_vocabulary_says_so():
    hidden_ND, weight_VD, _, target_N = problem()
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with pytest.raises(ValueError, match="'reference' holds the whole vocabulary"):
            linear_logprob(hidden_ND, weight_VD, target_N, group=group, impl="reference")
        with pytest.raises(ValueError, match="'chunked' needs the whole vocabulary on one rank"):
            linear_policy_loss(
                hidden_ND, weight_VD, target_N, *policy_terms(), group=group, impl="chunked"
            )
        alone = linear_logprob(hidden_ND, weight_VD, target_N, group=group).logp
        assert torch.equal(alone, linear_logprob(hidden_ND, weight_VD, target_N, impl="slabs").logp)
    finally:
        if owned:
            dist.destroy_process_group()
