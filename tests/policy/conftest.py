"""Tiny models of every family that may share trunks, and one sequence at a time: what sharing is held against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig
from rlpt.policy import load
from rlpt.policy.markers import Vocabulary
from rlpt.policy.packing import Layout, Packed, pack, rows
from rlpt.policy.policy import Policy, scores_of
from rlpt.types import Branch, Markers, Trunk, concat

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Matrices large enough that attention is far from flat, which a test asserts.
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Both kinds of layers, and a window no longer than the longest path of a test.
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 18}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
}

# model_type -> (transformers class, what its configuration has beside the sizes).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {"logit_scale": 1.0, **BOTH_KINDS}),
    "ernie4_5": ("Ernie4_5", {}),
    "exaone4": ("Exaone4", BOTH_KINDS),
    "gemma": ("Gemma", {}),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "granite": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "helium": ("Helium", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {}),
    "hyperclovax": ("HyperCLOVAX", {}),
    "jais2": ("Jais2", {}),
    "llama": ("Llama", {}),
    "ministral": ("Ministral", BOTH_KINDS),
    # Queries grow with their position here.
    "ministral3": ("Ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}),
    "mistral": ("Mistral", {"sliding_window": 18}),
    "nanochat": ("NanoChat", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", BOTH_KINDS),
    "persimmon": ("Persimmon", {"qk_layernorm": True}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "seed_oss": ("SeedOss", {}),
    # One layer of two without positions.
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("Starcoder2", {}),
}


@pytest.fixture(scope="session")
def world():
    with dist.world() as joined:
        yield joined


@pytest.fixture(name="families", scope="session")
def _families():
    return FAMILIES


@pytest.fixture(name="tiny", scope="session")
def _tiny():
    return tiny


def tiny(family: str, **changes: Any) -> Any:
    """A random model of plain transformers."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | own | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture(name="as_policy", scope="session")
def _as_policy(world: dist.World):
    def made(lm: Any, layout: Layout = "shared", **settings: Any) -> Policy:
        """The same weights as the trainer's policy, through its own door."""
        vocab = Vocabulary(Markers(VOCAB - 2, VOCAB - 1), VOCAB - 2, VOCAB)
        plan = load.Blueprint(lm.config, vocab, {}, layout, "")
        policy = load.sharded(PolicyConfig(fresh=FreshPolicy(), **settings), plan, world)
        known = dict(lm.named_parameters())
        load.fill(policy, lambda name, _shape: known[name].detach())
        return policy

    return made


def trunk(ids: Sequence[int] | np.ndarray) -> Trunk:
    ids = concat(ids)
    return Trunk("d", "x", 0, 0, ids, np.arange(len(ids) + 1), ())


@pytest.fixture(name="trunk", scope="session")
def _trunk():
    return trunk


@pytest.fixture(name="one_at_a_time", scope="session")
def _one_at_a_time():
    return one_at_a_time


def one_at_a_time(
    lm: Any, trunks: Sequence[Trunk], pairs: Sequence[tuple[Trunk, Branch]]
) -> list[Tensor]:
    """Log-probabilities of every trunk and every branch, a forward of plain transformers each, a float64 softmax."""
    paths = [(each.ids, 1) for each in trunks]
    paths += [(concat(t.ids[: b.cut], b.ids), max(b.cut, 1)) for t, b in pairs]
    found = []
    for ids, start in paths:
        if start >= len(ids):
            found.append(torch.zeros(0, dtype=torch.float64))
            continue
        at = torch.arange(start, len(ids))
        logits = lm(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        logp = logits.double().log_softmax(-1)[at - 1]
        found.append(logp.gather(-1, torch.from_numpy(ids)[at, None])[:, 0])
    return found


@pytest.fixture(name="in_one_forward", scope="session")
def _in_one_forward():
    return in_one_forward


def in_one_forward(
    policy: Policy,
    trunks: Sequence[Trunk],
    pairs: Sequence[tuple[Trunk, Branch]],
    packed: Packed | None = None,
) -> list[Tensor]:
    """The same from one forward of a policy; ``packed`` in place of its own layout."""
    device = torch.device("cpu")
    # Gradients are zeroed on shards; a forward without a backward leaves the root's parameters whole.
    policy.reshard()
    policy.zero_grad()
    packed = pack(trunks, pairs, device, policy.layout) if packed is None else packed
    hidden = [packed.trunk_rows(k, 1, len(each.ids)) for k, each in enumerate(trunks)]
    target = [each.ids[1:] for each in trunks]
    for b, (_, branch) in enumerate(pairs):
        start = 0 if branch.cut else 1
        hidden.append(packed.branch_rows(b, start, max(start, len(branch.ids))))
        target.append(branch.ids[start:])
    (scored,) = policy(packed, scores_of([rows(hidden, target, (), device)]))
    return list(scored.logp_R.split([len(part) for part in target]))


@pytest.fixture(name="assert_exact", scope="session")
def _assert_exact():
    return assert_exact


def assert_exact(lm: Any, policy: Policy, expected: list[Tensor], found: list[Tensor]) -> None:
    """Log-probabilities within 1e-5, gradients within 1e-5 of every tensor's norm."""
    known, own = torch.cat(expected), torch.cat(found)
    assert known.shape == own.shape
    assert (own.double() - known).abs().max() < 1e-5
    lm.zero_grad()
    for scored in (known, own):
        weight = 1.5 + torch.arange(len(scored)).double().sin()
        (scored * weight).sum().backward()
    mine = dict(policy.lm.named_parameters())
    grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    assert len(grads) >= 10
    # Where nothing depends on a tensor (one key, one probability) its gradient is the rounding of the others'.
    floor = 1e-6 * max(grad.norm() for grad in grads.values())
    for name, grad in grads.items():
        error = torch.linalg.vector_norm(load.local(mine[name].grad) - grad)
        assert error <= 1e-5 * grad.norm() + floor, (name, float(error / grad.norm()))
