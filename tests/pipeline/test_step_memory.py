"""Bytes of a step, held against what autograd, decoders and a whole step really keep."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlpt import dist, memory
from rlpt.config import (
    DataConfig,
    EngineConfig,
    FreshPolicy,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
)
from rlpt.flops import Layout, documents
from rlpt.memory import activation_bytes, head_bytes, step_memory
from rlpt.optim import adamw
from rlpt.policy import load
from rlpt.policy.attention import implementation
from rlpt.policy.packing import pack
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import prompts_of
from rlpt.reward.base import Kit
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.rl_update import rl_step
from rlpt.rollout.padded_decoder import PaddedDecoder
from rlpt.rollout.trunk_decoder import ROOM, TrunkDecoder
from rlpt.stages import RLStage, Stage
from rlpt.types import Branch, Group, Markers, Prompt, Rollout, Trunk
from rlpt.update import Learner
from rlpt_data.shards import ShardFolder
from rlpt_kernels import chunked, linear_policy_loss

CPU = torch.device("cpu")
MARKERS = Markers(320, 321)
FRESH = FreshPolicy(layers=3, width=64, heads=4, kv_heads=2, mlp_width=160)
LAYOUTS: tuple[Layout, ...] = ("naive", "shared")


def run(stage: Stage, **changes: Any) -> RunConfig:
    table = {
        "run_dir": Path("run"),
        "data": DataConfig(shards=Path("shards")),
        "policy": PolicyConfig(fresh=FRESH),
        "prompts": PromptConfig(
            context_tokens=100, min_context_tokens=4, horizon_tokens=8, cuts_per_document=2
        ),
        "thought": ThoughtConfig(budget_tokens=20),
        "stage": (stage,),
    }
    return RunConfig(**(table | changes))


def rl(**changes: Any) -> RLStage:
    sizes = {"steps": 1, "documents_per_step": 3, "group_size": 4}
    return RLStage.model_validate({"name": "rl", "kind": "rl"} | sizes | changes)


def transformer(kind: str) -> Any:
    sizes = {
        "vocab_size": 330, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "pad_token_id": None,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**sizes)


def prompts(
    cfg: RunConfig, count: int, draw: np.random.Generator, shorter: int = 0
) -> list[Prompt]:
    """Documents at their largest, or up to ``shorter`` tokens less."""
    size, horizon = cfg.prompts.context_tokens, cfg.prompts.horizon_tokens
    size, horizon = cfg.prompts.context_tokens, cfg.prompts.horizon_tokens
    found = []
    for n in range(count):
        ids, offsets = draw.integers(300, size=size + horizon), np.arange(size + horizon + 1)
        trunk = Trunk(str(n), "", 0, 0, ids, offsets, cuts=(size, size))
        found += prompts_of(trunk, cfg.prompts, MARKERS)
    return found


def rollout(budget: int, draw: np.random.Generator) -> Rollout:
    ids = np.append(draw.integers(300, size=budget), MARKERS.closer)
    logp, version = np.full(budget + 1, -6.0, np.float32), np.zeros(budget + 1, dtype=np.int64)
    return Rollout(ids, ids != MARKERS.closer, logp, version, budget, "budget")


# ---- activations ---------------------------------------------------------------------------------


@contextmanager
def kept(lm: Any = None) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps for a backward, parameters left out."""
    known = {x.untyped_storage().data_ptr() for x in lm.parameters()} if lm else set()
    held: list[torch.Tensor] = []
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield found


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_the_storages_that_autograd_keeps(
    kind: str, layout: Layout, dtype: torch.dtype, checkpointed: bool
) -> None:
    config = transformer(kind)
    lm: Any = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation(layout), dtype=dtype
    )
    if checkpointed:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    cfg = run(rl())
    (prompt, *_) = prompts(cfg, 1, np.random.default_rng(0))
    pairs = [(prompt.trunk, Branch(prompt.cut, np.arange(20), 1)) for _ in range(4)]
    packed = pack([prompt.trunk], pairs, CPU, layout)
    with kept(lm) as found:
        hidden = Policy(lm, layout)(packed, lambda readout: (readout._hidden_MD,))[0]
    tokens = packed.ids_NT.numel()
    policy = PolicyConfig(
        fresh=FRESH,
        gradient_checkpointing=checkpointed,
        compute_dtype="float32" if dtype == torch.float32 else "bfloat16",
    )
    expected = activation_bytes(config, tokens, run(rl(), policy=policy))
    if checkpointed:
        # One block's tensors come back in the backward.
        expected -= tokens * memory.block_bytes(config, dtype.itemsize)
    # Left out: ids, and rotary tables that all layers share.
    assert sum(found.values()) + hidden.nbytes == pytest.approx(expected, rel=0.02)


# ---- head and caches -----------------------------------------------------------------


def test_the_policy_loss_leaves_its_gradients_and_holds_two_chunks_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory.CHUNK_BYTES == chunked.CHUNK_BYTES
    assert memory.LEAST_ROWS == chunked.LEAST_ROWS
    monkeypatch.setattr(memory, "VOCABULARY_COPIES", 0)
    config, tokens = transformer("Llama"), 700
    hidden_MD = torch.randn(tokens, 64, requires_grad=True)
    weight_VD = torch.randn(330, 64, requires_grad=True)
    ones = torch.ones(tokens)
    with kept() as found:
        target = torch.zeros(tokens, dtype=torch.long)
        linear_policy_loss(hidden_MD, weight_VD, target, -6 * ones, ones, ones)
    chunk = 4 * 330 * min(tokens, (1 << 23) // (4 * 330))
    assert head_bytes(config, tokens) == sum(found.values()) + 2 * chunk
    # A vocabulary so large that a chunk is the least number of rows.
    config.vocab_size = 100_000
    left = 4 * 64 * (tokens + 100_000)
    assert head_bytes(config, tokens) == left + 2 * 4 * 100_000 * 256


def test_a_large_vocabulary_peaks_at_the_end_of_the_backward() -> None:
    config = transformer("Llama")
    config.vocab_size = 100_000
    assert head_bytes(config, 8) == 4 * (4 * 64 * 100_000)


@pytest.mark.parametrize("budget", [20, 63, 64, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_are_those_of_the_decoders(budget: int, layout: Layout) -> None:
    assert memory.CACHE_ROOM == ROOM
    cfg = run(rl(), thought=ThoughtConfig(budget_tokens=budget))
    config, asked = transformer("Llama"), prompts(cfg, 3, np.random.default_rng(0))
    lm: Any = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation(layout)
    )
    made = TrunkDecoder if layout == "shared" else PaddedDecoder
    decoder: Any = made(lm.eval().requires_grad_(False), asked, 4, CPU)
    for _ in range(budget):
        decoder.extend(torch.zeros(len(asked) * 4, dtype=torch.long))
    if layout == "shared":
        views = (
            [layer.shared_P for layer in decoder.layers],
            [layer.own for layer in decoder.layers],
        )
    else:
        views = [(layer.keys, layer.values) for layer in decoder.cache.layers]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(views)}
    found = sum(storage.nbytes() for storage in storages.values())
    assert memory.cache_bytes(documents(cfg, rl()), config, layout) == found


def test_a_batch_of_the_engine_holds_the_caches_of_its_own_prompts() -> None:
    stage, config = rl(), transformer("Llama")
    one = run(stage, engine=EngineConfig(prompts_per_batch=2))
    for layout in LAYOUTS:
        document, all_three = (
            memory.cache_bytes(documents(cfg, stage), config, layout) for cfg in (one, run(stage))
        )
        assert all_three == 3 * document


def test_a_rank_holds_its_shard_of_the_state_and_of_copies_and_an_engine() -> None:
    reward = {"kind": "likelihood", "scorer": "ema", "baseline": "frozen"}
    plain = run(rl())
    copied = run(rl(reward=reward, advantage={"baseline": "none"}))
    assert memory.state_bytes(plain, 1000) == 16_000 + 4_000
    assert memory.state_bytes(copied, 1000, ranks=4) == (16 + 2 * 4) * 250 + 4_000
    # A baseline that cancels is not kept.
    cancelled = run(rl(reward=reward))
    assert memory.state_bytes(cancelled, 1000, ranks=4) == (16 + 4) * 250 + 4_000
    halves = run(rl(), policy=PolicyConfig(fresh=FRESH, replicas=2))
    assert memory.state_bytes(halves, 1000, ranks=4) == 16 * 500 + 4_000


def test_caches_and_activations_are_not_there_together() -> None:
    assert memory.Memory(1, activation_bytes=10, head_bytes=5, cache_bytes=20).peak_bytes == 20
    assert memory.Memory(1, activation_bytes=10, head_bytes=5, cache_bytes=12).peak_bytes == 15


# ---- a whole step --------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that were alive at once, of what is allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor:
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known and size:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_of_a_step_is_near_what_is_planned(
    layout: Layout, checkpointed: bool, shards: ShardFolder, world: dist.World
) -> None:
    policy_config = PolicyConfig(fresh=FRESH, gradient_checkpointing=checkpointed, layout=layout)
    stage = rl(micro_batch_tokens=1)
    cfg = run(stage, policy=policy_config)
    plan = load.blueprint(policy_config, shards, 200)
    policy = load.load(policy_config, plan, world, seed=0)
    scorer = Scorer(policy, MARKERS.ids, world, 1)
    reward = LikelihoodReward().build(Kit({"policy": scorer}, MARKERS, centred=True))
    learner = Learner(policy, adamw(policy, stage.optimizer), None, MARKERS, world, seed=0)
    draw = np.random.default_rng(0)
    found = [
        Group(prompt, tuple(rollout(cfg.thought.budget_tokens, draw) for _ in range(4)))
        for prompt in prompts(cfg, stage.documents_per_step, draw)
    ]
    # The optimiser's moments are part of the training state.
    rl_step(learner, found, reward, stage, 0, 0)
    with Live() as live:
        rl_step(learner, found, reward, stage, 1, 0)
    expected = step_memory(cfg, stage, plan.config, layout)
    gradients = 4 * sum(parameter.numel() for parameter in policy.parameters())
    planned = expected.activation_bytes + expected.head_bytes
    assert live.peak - gradients == pytest.approx(planned, rel=0.2)
