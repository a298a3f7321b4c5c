"""What a step computes: by hand, and no less than any real step does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist, flops
from rlpt.batch import (
    Wanted,
    framed_batch,
    padded_costs,
    rollout_batch,
    split_evenly,
)
from rlpt.config import (
    DataConfig,
    FreshPolicy,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
)
from rlpt.flops import Layout, step_cost
from rlpt.frames import Framer
from rlpt.memory import micro_batch_tokens
from rlpt.prompts import prompts_of
from rlpt.stages import MixConfig, NextTokenStage, RLStage, Stage
from rlpt.types import Group, Markers, Rollout, Trunk
from rlpt_data.shards import ShardFolder

CPU = torch.device("cpu")
MARKERS = Markers(320, 321)
CONTEXT, BUDGET = 50, 7
LAYOUTS: tuple[Layout, ...] = ("naive", "shared")
CONFIG = transformers.LlamaConfig(
    vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def run(stage: Stage, cuts: int = 1, horizon: int = 5, context: int = CONTEXT) -> RunConfig:
    return RunConfig(
        run_dir=Path("run"),
        data=DataConfig(shards=Path("shards")),
        policy=PolicyConfig(fresh=FreshPolicy()),
        prompts=PromptConfig(
            context_tokens=context,
            min_context_tokens=4,
            horizon_tokens=horizon,
            cuts_per_document=cuts,
        ),
        thought=ThoughtConfig(budget_tokens=BUDGET),
        stage=(stage,),
    )


def rl(**changes: Any) -> RLStage:
    sizes = {"steps": 1, "documents_per_step": 4, "group_size": 2}
    return RLStage.model_validate({"name": "rl", "kind": "rl"} | sizes | changes)


def document(cfg: RunConfig, draw: np.random.Generator, shorter: int = 0) -> list[Group]:
    """The groups of a document at its largest, or with contexts up to ``shorter`` tokens shorter."""
    (stage,) = cfg.stage
    assert isinstance(stage, RLStage)
    last = cfg.prompts.context_tokens - int(draw.integers(shorter + 1))
    count = cfg.prompts.cuts_per_document
    cuts = (*sorted(last - draw.integers(shorter // 2 + 1, size=count - 1)), last)
    size = last + cfg.prompts.horizon_tokens
    ids, offsets = draw.integers(300, size=size), np.arange(size + 1)
    trunk = Trunk("a", "", 0, 0, ids, offsets, tuple(int(cut) for cut in cuts))
    return [
        Group(prompt, tuple(thought(draw, shorter) for _ in range(stage.group_size)))
        for prompt in prompts_of(trunk, cfg.prompts, MARKERS)
    ]


def thought(draw: np.random.Generator, shorter: int) -> Rollout:
    length = BUDGET - int(draw.integers(min(shorter, BUDGET) + 1))
    ids = np.append(draw.integers(300, size=length), MARKERS.closer)
    logp, version = np.zeros(length + 1, np.float32), np.zeros(length + 1, dtype=np.int64)
    return Rollout(ids, ids != MARKERS.closer, logp, version, length, "budget")


# ---- by hand -------------------------------------------------------------------------------------


def test_a_step_by_hand() -> None:
    stage = rl(objective={"next_token_weight": 0.5})
    cfg = run(stage, context=11)
    naive, shared = (step_cost(cfg, stage, CONFIG, layout) for layout in LAYOUTS)
    # 4 documents of 11 + 5 tokens, 2 thoughts of 7 each, with opener, closer and 5 tokens of text behind: 14.
    assert naive.trained_tokens == 4 * 3 * (11 + 14)
    assert shared.trained_tokens == 4 * (16 + 2 * 14)
    matrices, pair, row = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 3 * 32, 32 * 70
    rows = 4 * (3 * 2 * 7 + 4 * 15 + 2 * 5 + 5)
    for cost, pairs in ((naive, 4 * 3 * 25**2), (shared, 4 * (16**2 + 2 * 14 * (11 + 14)))):
        products = 3 * 2 * matrices * cost.trained_tokens + 2 * row * rows
        assert cost.training_flops == products + 3.5 * 4 * pair * pairs
        assert (cost.scored_tokens, cost.scoring_flops) == (0, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_take_their_shares_of_a_step(layout: Layout) -> None:
    stage = rl(update={"score_with": "separate_pass"})
    cfg = run(stage)
    assert step_cost(cfg, stage, CONFIG, layout, ranks=2) == step_cost(cfg, stage, CONFIG, layout)
    whole, half = (micro_batch_tokens(cfg, stage, layout, ranks) for ranks in (1, 2))
    assert whole == 2 * half


def test_a_step_that_is_split_needs_a_pass_for_its_rewards_where_they_scale_other_terms() -> None:
    advantage, objective = {"scale": "batch_std"}, {"next_token_weight": 0.5}
    stage = rl(advantage=advantage, objective=objective, micro_batch_tokens=55 + 2 * 14)
    read = {
        ranks: flops.reads_training_forward(
            flops.documents(run(stage), stage, ranks), stage, "shared"
        )
        for ranks in (1, 2, 4)
    }
    # A document of 55 tokens, two branches of 14 each: only a rank with one document has it whole.
    assert read == {1: False, 2: False, 4: True}


# ---- against what is packed ----------------------------------------------------------------------


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
    cfg = run(stage, context=11)
    assert step_cost(cfg, stage, CONFIG, "naive").trained_tokens == 4 * (40 + inserted)
    assert micro_batch_tokens(cfg, stage, "naive", ranks=2) == 2 * (40 + inserted)
    framer = Framer(mix, cfg.prompts, 40, BUDGET, MARKERS, 0)
    split = shards.split("train")
    frames = [framer.frame(epoch, split[n]) for n in range(20) for epoch in range(4)]
    packed, kinds = framed_batch(frames, MARKERS, CPU)
    assert 40 + inserted // 2 <= packed.ids_NT.shape[1] <= 40 + inserted or mix.worked
    assert sum(len(kind.target_R) for kind in kinds) <= len(frames) * (40 + inserted - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("continuations", [True, False])
@pytest.mark.parametrize(("text", "gold"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("horizon", [5, 30])
def test_micro_batches_are_packed_by_the_tokens_of_a_document(
    layout: Layout, continuations: bool, text: float, gold: float, horizon: int, world: dist.World
) -> None:
    stage = rl(objective={"next_token_weight": text, "gold_weight": gold})
    cfg = run(stage, cuts=2, horizon=horizon)
    asked = Wanted(continuations or gold > 0, text > 0)
    draw = np.random.default_rng(0)
    tokens = flops.document_tokens(cfg, stage, layout, continuations)
    assert [tokens] == padded_costs([document(cfg, draw)], asked, layout)
    shorter = [document(cfg, draw, 30) for _ in range(8)]
    assert max(padded_costs(shorter, asked, layout)) <= tokens
    for budget in (1, tokens, 2 * tokens, 3 * tokens - 1, 4 * tokens):
        smaller = stage.model_copy(update={"micro_batch_tokens": budget})
        bins = split_evenly([tokens] * 4, budget, world)
        shape = flops.documents(cfg, smaller)
        assert flops.micro_batches(shape, smaller, layout, continuations) == [len(b) for b in bins]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score_with", ["auto", "separate_pass"])
@pytest.mark.parametrize("budget", [1, 150, 400, 700, 99_999])
def test_no_micro_batch_is_larger_than_planned(
    layout: Layout, score_with: str, budget: int, world: dist.World
) -> None:
    update = {"score_with": score_with}
    stage = rl(documents_per_step=12, micro_batch_tokens=budget, update=update)
    cfg, asked = run(stage, cuts=2), Wanted(continuations=score_with == "auto", text=False)
    sizes = []
    for shorter in (0, 10, 20, 30, 40):
        draw = np.random.default_rng(shorter)
        whole = [document(cfg, draw, shorter) for _ in range(12)]
        costs = padded_costs(whole, asked, layout)
        for chosen in split_evenly(costs, budget, world):
            batch = [group for i in chosen for group in whole[i]]
            packed = rollout_batch(batch, MARKERS, CPU, layout, asked, 0).packed
            sizes.append(packed.ids_NT.numel())
    planned = micro_batch_tokens(cfg, stage, layout)
    # Two documents of one width that do not fit together leave up to half of a budget empty.
    filled = 0.75 if layout == "shared" else 0.5
    assert filled * planned <= max(sizes) <= planned
