"""FLOPs and tokens of a step: counted on real models, and against the sequences that a step really makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from rlpt.batch import Weighted, action_batch, framed_batch
from rlpt.config import (
    DataConfig,
    FreshPolicy,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
)
from rlpt.flops import per_token, step_cost
from rlpt.frames import Framer
from rlpt.prompts import prompts_of
from rlpt.reward import rewards
from rlpt.stages import (
    AdvantageConfig,
    GainReward,
    MixConfig,
    NextTokenStage,
    ObjectiveConfig,
    PrefixMatchReward,
    RLStage,
    Stage,
)
from rlpt.types import Branch, Group, Markers, Rollout, Scores, Trunk
from rlpt_data.shards import ShardFolder

MARKERS = Markers(320, 321)
DOCUMENTS, GROUP, CONTEXT = 3, 2, 11


def model(name: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


MODELS = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "biases": ("Qwen2", {"tie_word_embeddings": True}),
    "wide_heads": ("Qwen3", {"head_dim": 12}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_token_costs_twice_its_matrices_and_four_times_the_queries_in_view(kind: str) -> None:
    name, changes = MODELS[kind]
    lm = model(name, **changes)
    # `parameters` names a tied head once; biases and norms have one dimension.
    matrices = sum(weight.numel() for weight in lm.parameters() if weight.ndim == 2)
    if not lm.config.tie_word_embeddings:
        matrices -= lm.model.embed_tokens.weight.numel()
    head_dim = changes.get("head_dim", 8)
    attention = 3 * (2 + 2) * 17 * 4 * head_dim
    assert per_token(lm.config, 17) == 2 * matrices + attention


def test_a_forward_pass_does_the_flops_that_are_counted() -> None:
    lm = model("Llama")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(input_ids=torch.zeros(2, 17, dtype=torch.long))
    assert counter.get_total_flops() == 2 * 17 * per_token(lm.config, 17)


def run(stage: Stage, **changes: Any) -> RunConfig:
    table = {
        "run_dir": Path("run"),
        "data": DataConfig(shards=Path("shards")),
        "policy": PolicyConfig(fresh=FreshPolicy()),
        "prompts": PromptConfig(context_tokens=CONTEXT, min_context_tokens=4, horizon_tokens=5),
        "thought": ThoughtConfig(budget_tokens=7),
        "stage": (stage,),
    }
    return RunConfig(**(table | changes))


def rl(**changes: Any) -> RLStage:
    return RLStage(
        name="rl", kind="rl", steps=1, documents_per_step=DOCUMENTS, group_size=GROUP, **changes
    )


def groups(cfg: RunConfig) -> list[Group]:
    """A step with the longest context and the longest thoughts that the configuration allows."""
    size = cfg.prompts.context_tokens + cfg.prompts.horizon_tokens
    length = cfg.thought.budget_tokens + 1 + cfg.thought.prediction_tokens
    numbers = np.zeros(length, dtype=np.float32)
    rollout = Rollout(
        np.ones(length, dtype=np.int64), numbers == 0, numbers, numbers.astype(np.int64),
        thought_len=cfg.thought.budget_tokens, finish="budget",
    )  # fmt: skip
    trunks = [
        Trunk(str(n), "", 0, 0, np.arange(size), np.arange(size + 1), (CONTEXT,))
        for n in range(DOCUMENTS)
    ]
    prompts = [prompt for trunk in trunks for prompt in prompts_of(trunk, cfg.prompts, MARKERS)]
    return [Group(prompt, (rollout,) * GROUP) for prompt in prompts]


class Counting:
    """A scorer that counts the tokens it is asked to read."""

    def __init__(self) -> None:
        self.tokens = 0

    def branches(self, pairs: list[tuple[Trunk, Branch]]) -> list[Scores]:
        self.tokens += sum(branch.cut + len(branch.ids) for _, branch in pairs)
        return [_zeros(len(branch.ids) - branch.score_start) for _, branch in pairs]

    def trunks(self, spans: list[tuple[Trunk, int, int]]) -> list[Scores]:
        self.tokens += sum(len(trunk.ids) for trunk, _, _ in spans)
        return [_zeros(stop - start) for _, start, stop in spans]


def _zeros(size: int) -> Scores:
    return Scores(np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int64))


@pytest.mark.parametrize("scorer", ["policy", "ema", "frozen"])
@pytest.mark.parametrize("baseline", ["none", "policy", "ema", "frozen"])
@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("centring", ["leave_one_out", "none"])
def test_scored_tokens_are_those_that_the_scorers_read(
    scorer: Any, baseline: Any, clip: float | None, centring: Any
) -> None:
    stage = rl(
        reward=GainReward(scorer=scorer, baseline=baseline, clip=clip),
        advantage=AdvantageConfig(baseline=centring),
    )
    cfg = run(stage)
    scorers = {name: Counting() for name in ("policy", "ema", "frozen")}
    reward = rewards.GainReward(scorers, MARKERS, scorer, baseline, clip, centring != "none")
    reward(groups(cfg))
    read = sum(counting.tokens for counting in scorers.values())
    assert step_cost(cfg, stage, model("Llama").config).scored_tokens == read


@pytest.mark.parametrize("next_token_weight", [0.0, 0.1])
@pytest.mark.parametrize("horizon", [5, 20])
def test_trained_tokens_are_those_of_the_packed_batch(
    next_token_weight: float, horizon: int
) -> None:
    stage = rl(objective=ObjectiveConfig(next_token_weight=next_token_weight))
    prompts = PromptConfig(context_tokens=CONTEXT, min_context_tokens=4, horizon_tokens=horizon)
    cfg = run(stage, prompts=prompts)
    weighted = [Weighted(group, np.ones(GROUP), np.ones(GROUP)) for group in groups(cfg)]
    batch = action_batch(weighted, MARKERS, torch.device("cpu"), with_text=next_token_weight > 0)
    cost = step_cost(cfg, stage, model("Llama").config)
    assert cost.trained_tokens == batch.packed.ids_NT.numel()
    assert cost.sampled_tokens == sum(len(r.ids) for g in groups(cfg) for r in g.rollouts)


@pytest.mark.parametrize(
    ("mix", "inserted"),
    [
        (MixConfig(), 0),
        (MixConfig(plain=0.5, copied=0.5), 9),
        (MixConfig(plain=0.0, copied=1.0, thoughts_per_window=3), 27),
        (MixConfig(plain=0.0, empty=1.0, thoughts_per_window=3), 6),
        (MixConfig(plain=0.5, worked=0.5), 9),
        (MixConfig(plain=0.0, worked=0.5, empty=0.5, thoughts_per_window=2), 9),
    ],
)
def test_frames_are_no_longer_than_counted(
    mix: MixConfig, inserted: int, shards: ShardFolder
) -> None:
    stage = NextTokenStage(
        name="a", kind="next_token", steps=1, documents_per_step=4, window_tokens=40, mix=mix
    )
    cfg = run(stage)
    config = model("Llama").config
    cost = step_cost(cfg, stage, config)
    assert cost.trained_tokens == 4 * (40 + inserted)
    assert cost.flops == 3 * cost.trained_tokens * per_token(config, 40 + inserted)
    framer = Framer(mix, cfg.prompts, 40, cfg.thought.budget_tokens, MARKERS, 0)
    split = shards.split("train")
    frames = [framer.frame(epoch, split[n]) for n in range(20) for epoch in range(4)]
    packed, _ = framed_batch(frames, MARKERS, torch.device("cpu"))
    assert 40 + inserted // 2 <= packed.ids_NT.shape[1] <= 40 + inserted or mix.worked


def test_a_step_of_reinforcement_learning_by_hand() -> None:
    stage = rl(
        reward=PrefixMatchReward(kind="prefix_match"),
        objective=ObjectiveConfig(next_token_weight=0.5),
    )
    thought = ThoughtConfig(budget_tokens=7, prediction_tokens=3)
    config = model("Llama").config
    cost = step_cost(run(stage, thought=thought), stage, config)
    # Context 11, opener, thought 7, closer, prediction 3: 23 tokens, more than the trunk's 16.
    assert (cost.sampled_tokens, cost.scored_tokens, cost.trained_tokens) == (66, 0, (6 + 3) * 23)
    # The contexts are read once a prompt; training counts three times.
    forward = 66 + 3 * 12 + 3 * (6 + 3) * 23
    assert cost.flops == forward * per_token(config, 23 + 5)


def test_checkpointed_activations_cost_one_more_forward_pass() -> None:
    stage = NextTokenStage(name="a", kind="next_token", steps=1, documents_per_step=4)
    config = model("Llama").config
    policy = PolicyConfig(fresh=FreshPolicy(), gradient_checkpointing=True)
    plain, checkpointed = (
        step_cost(cfg, stage, config).flops for cfg in (run(stage), run(stage, policy=policy))
    )
    assert checkpointed == plain / 3 * 4
