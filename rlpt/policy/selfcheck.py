"""At the start of every run: does sharing trunks change a number?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.policy.attention import implementation
from rlpt.policy.load import local
from rlpt.policy.packing import Layout, Packed, Rows, pack, rows
from rlpt.policy.policy import Policy, scores_of
from rlpt.policy.scoring import Pair
from rlpt.prompts import prompt_stream, prompts_of, trunk
from rlpt.types import Markers, Prompt, thought_branch
from rlpt_data.shards import Split
from rlpt_data.strict import UserError

LARGEST_ERROR = 5e-4
"""Nats, in float32: rounding is a hundredth of it, a mask that is one token short twenty times as much."""
GRADIENT_ERROR = 1e-2
"""Of any tensor's gradient, or of a thousandth of the whole one's norm where a tensor's is less."""


class Found(NamedTuple):
    logp_R: Tensor
    gradients: list[Tensor]
    """This rank's shards; none where the policy is not trained."""


def documents_to_check(
    split: Split, cfg: PromptConfig, markers: Markers, seed: int
) -> list[Prompt]:
    """Every cut of two documents: neighbours in one row that must not see each other."""
    stream = prompt_stream(split, cfg, seed, "layout")
    trunks = [trunk(document, epoch, cfg, seed) for epoch, document in map(stream.at, range(2))]
    return [prompt for each in trunks for prompt in prompts_of(each, cfg, markers)]


def check_layout(
    policy: Policy, prompts: Sequence[Prompt], markers: Markers, budget: int, world: dist.World
) -> float:
    """Compute ``prompts`` in the shared layout and as transformers would, sequence by sequence; the largest error of a
    log-probability in nats. Gradients are compared, too, where the policy has any. Collective.

    ``policy`` computes in float32, where every wrong mask shows. Thoughts have up to ``budget`` tokens. Raises
    UserError where the two disagree: some layer looks where the tree forbids it, or nowhere it allows.
    """
    pairs = [pair for prompt in prompts for pair in _pairs(prompt, markers, budget)]
    shared, plain = (_found(policy, prompts, pairs, markers, world, how) for how in _LAYOUTS)
    if plain.logp_R.isnan().any():
        raise UserError(
            "policy: its log-probabilities are NaN: the weights are damaged, or their training diverged; name another "
            "checkpoint or folder"
        )
    error = float((shared.logp_R - plain.logp_R).abs().max())
    turned = _distance(shared.gradients, plain.gradients, world)
    if not (error <= LARGEST_ERROR and turned <= GRADIENT_ERROR):
        raise UserError(
            f"policy.layout = 'shared': {type(policy.lm).__name__} differs from one sequence at a time by {error:.3g} "
            f"nats (bar {LARGEST_ERROR:g}) and {turned:.3g} of a gradient (bar {GRADIENT_ERROR:g}); set "
            "policy.layout = 'naive', and report this model"
        )
    return error


_LAYOUTS: tuple[Layout, Layout] = ("shared", "naive")


def _pairs(prompt: Prompt, markers: Markers, budget: int) -> list[Pair]:
    """No thought, one token, and a span of the context as long as thoughts can be."""
    span = prompt.context_ids[-budget:]
    thoughts = (span[:0], span[:1], span)
    return [(prompt.trunk, thought_branch(prompt, markers, ids)) for ids in thoughts]


def _found(
    policy: Policy,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    markers: Markers,
    world: dist.World,
    layout: Layout,
) -> Found:
    """One forward of all trunks and branches, and its backward."""
    packed, kind = _laid_out(prompts, pairs, markers, world, layout)
    trained = any(parameter.requires_grad for parameter in policy.parameters())
    with _attention(policy, layout), torch.set_grad_enabled(trained):
        (scored,) = policy(packed, scores_of([kind]))
        if not trained:
            policy.reshard()
            return Found(scored.logp_R, [])
        scored.logp_R.mean().backward()
    gradients = [
        torch.zeros_like(local(p)) if p.grad is None else local(p.grad).clone()
        for p in policy.parameters()
    ]
    policy.zero_grad()
    return Found(scored.logp_R.detach(), gradients)


def _laid_out(
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    markers: Markers,
    world: dist.World,
    layout: Layout,
) -> tuple[Packed, Rows]:
    trunks = list({id(prompt.trunk): prompt.trunk for prompt in prompts}.values())
    packed = pack(trunks, pairs, world.device, layout)
    hidden = [packed.trunk_rows(k, 1, len(each.ids)) for k, each in enumerate(trunks)]
    target = [each.ids[1:] for each in trunks]
    # What stands before the thought is no target: the opener has no probability.
    first = len(markers.frame.opened(markers.opener))
    hidden += [packed.branch_rows(b, first, len(branch.ids)) for b, (_, branch) in enumerate(pairs)]
    target += [branch.ids[first:] for _, branch in pairs]
    return packed, rows(hidden, target, (markers.opener,), world.device)


@contextmanager
def _attention(policy: Policy, layout: Layout) -> Iterator[None]:
    """The naive side with transformers' own masks: what a model says in a mask is lost on the other."""
    policy.lm.set_attn_implementation(implementation(layout))
    try:
        yield
    finally:
        policy.lm.set_attn_implementation(implementation(policy.layout))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor], world: dist.World) -> float:
    """The largest relative distance of a tensor, over all ranks' shards; 0 where there are none."""
    pairs = list(zip(one, other, strict=True))
    squares = [float((a - b).double().square().sum()) for a, b in pairs]
    squares += [float(b.double().square().sum()) for _, b in pairs]
    norms = torch.tensor(dist.total(squares, world), dtype=torch.float64).sqrt()
    apart, norm = norms.chunk(2) if pairs else (norms, norms)
    # A bias of keys has no gradient but rounding.
    floor = 1e-3 * norm.square().sum().sqrt()
    return float((apart / norm.clamp(min=floor)).nan_to_num().max()) if pairs else 0.0
