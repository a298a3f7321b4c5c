"""Log-probabilities and gradients of one batch in the shared layout, on as many ranks as there are.

Run by tests in processes of its own: `shared_gradients.py OUT [compile]`.
"""

import sys

import numpy as np
import torch
import transformers

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig
from rlpt.policy import load
from rlpt.policy.markers import Vocabulary
from rlpt.policy.packing import pack, rows
from rlpt.policy.policy import Policy, scores_of
from rlpt.types import Branch, Markers, Trunk

VOCAB = 61
DOCUMENTS = {"one document": 1, "five documents": 5}
"""With two ranks: one without work; one with more work than the other."""


def made(world: dist.World, compiled: bool) -> Policy:
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    vocab = Vocabulary(Markers(VOCAB - 2, VOCAB - 1), VOCAB - 2, VOCAB)
    plan = load.Blueprint(config, vocab, {}, "shared", "")
    cfg = PolicyConfig(fresh=FreshPolicy(), gradient_checkpointing=True, compile=compiled)
    return load.load(cfg, plan, world, seed=0)


def document(number: int) -> tuple[Trunk, list[tuple[Trunk, Branch]]]:
    """Two cuts with three thoughts each, of 0 tokens and more."""
    draw = np.random.default_rng(number)
    size = 6 + 3 * number
    trunk = Trunk("d", "x", 0, 0, draw.integers(0, VOCAB, size), np.arange(size + 1), ())
    shapes = [(cut, g * (number + 1)) for cut in (3, size - 1) for g in range(3)]
    return trunk, [(trunk, Branch(cut, draw.integers(0, VOCAB, n), 0)) for cut, n in shapes]


def scored(policy: Policy, numbers: list[int], world: dist.World) -> list[torch.Tensor]:
    """Log-probabilities of every trunk and branch of documents, one forward."""
    grown = [document(number) for number in numbers]
    trunks, pairs = [trunk for trunk, _ in grown], [pair for _, each in grown for pair in each]
    packed = pack(trunks, pairs, world.device, "shared")
    hidden = [packed.trunk_rows(k, 1, len(trunk.ids)) for k, trunk in enumerate(trunks)]
    hidden += [packed.branch_rows(b, 0, len(branch.ids)) for b, (_, branch) in enumerate(pairs)]
    target = [trunk.ids[1:] for trunk in trunks] + [branch.ids for _, branch in pairs]
    (found,) = policy(packed, scores_of([rows(hidden, target, (), world.device)]))
    parts = list(found.logp_R.split([len(part) for part in target]))
    return [
        torch.cat([parts[k], *parts[len(trunks) + 6 * k : len(trunks) + 6 * (k + 1)]])
        for k in range(len(trunks))
    ] or [found.logp_R]


def gradients(world: dist.World, compiled: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Of a weighted sum over the documents of all ranks, and the log-probabilities document by document."""
    policy, found = made(world, compiled), {}
    for name, count in DOCUMENTS.items():
        mine = dist.share(range(count), world)
        own = scored(policy, mine, world)
        weights = [1.5 + (torch.arange(len(logp)) + 1.0).sin() for logp in own]
        loss = torch.stack([(w * logp).sum() for w, logp in zip(weights, own, strict=True)]).sum()
        (loss * world.size).backward()
        values = dist.unshare([logp.detach() for logp in own[: len(mine)]], world)
        found[name] = {f"logp {k}": logp for k, logp in enumerate(values)}
        for key, parameter in policy.lm.named_parameters():
            found[name][key] = parameter.grad.full_tensor().clone()
        policy.zero_grad()
    return found


if __name__ == "__main__":
    with dist.world() as joined:
        result = gradients(joined, compiled="compile" in sys.argv)
        if joined.is_main:
            torch.save(result, sys.argv[1])
