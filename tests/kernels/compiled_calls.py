"""Run by test_compile in a process of its own: the hook that checks shapes in tests cannot be compiled.

Prints one JSON object: per case the largest difference between eager and compiled, or what was raised.
"""

import json
import sys

import torch

from rlpt_kernels import linear_logprob, linear_policy_loss

BACKEND = sys.argv[1]
draw = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(9, 8, generator=draw), torch.randn(777, 8, generator=draw)
TARGET = torch.randint(0, 777, (9,), generator=draw)
TARGET[2] = -100


def difference(loss, fullgraph=True):
    results = []
    for call in (loss, torch.compile(loss, backend=BACKEND, fullgraph=fullgraph)):
        leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
        value, *rest = call(*leaves)
        results.append([value.detach(), *rest, *torch.autograd.grad(value, leaves)])
    assert all(bool(gradient.any()) for gradient in results[0][-2:])
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(*results, strict=True))


def logprob(impl):
    def loss(hidden, weight):
        found = linear_logprob(
            hidden,
            weight,
            TARGET,
            bias=weight[:, 0],
            banned=(5,),
            entropy=True,
            argmax=True,
            rank=True,
            impl=impl,
        )
        return (found.logp.cos() + found.entropy).sum(), found.argmax, found.rank

    return loss


def policy(impl):
    terms = (torch.full((9,), -6.0), torch.linspace(-1, 1, 9), torch.ones(9) / 9)

    def loss(hidden, weight):
        found = linear_policy_loss(
            hidden, weight, TARGET, *terms, trust_region="clip", entropy=True, impl=impl
        )
        return found.loss * 2, found.logp, found.coefficient, found.entropy

    return loss


def raised(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main():
    found = {
        f"logprob {impl}": difference(logprob(impl))
        for impl in ("auto", "slabs", "chunked", "triton")
    }
    found |= {f"policy {impl}": difference(policy(impl)) for impl in ("auto", "slabs")}
    found["logprob reference"] = difference(logprob("reference"), fullgraph=False)
    stray = TARGET.clone()
    stray[4] = 777
    call = torch.compile(lambda h, w, t: linear_logprob(h, w, t).logp, backend=BACKEND)
    found["stray"] = raised(call, HIDDEN, WEIGHT, stray)
    print(json.dumps(found))


main()
