"""The agreement of engine and trainer at the start of a run, on one rank and on several."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlpt import dist
from rlpt.agreement import Agreement, Token, check_engine
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.policy.load import Blueprint, local
from rlpt.policy.policy import Policy
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.types import Prompt
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5)
SCRIPT = Path(__file__).with_name("agreement_on_ranks.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def prompts(plan: Blueprint, shards: ShardFolder) -> list[Prompt]:
    return held_out(shards.split("train"), CFG, plan.vocabulary.markers, 10, 0, ())


@pytest.fixture
def engine(plan: Blueprint, policy: Policy, world: dist.World) -> TransformersEngine:
    started = TransformersEngine(
        plan.config, plan.layout, plan.vocabulary.markers, ThoughtConfig(budget_tokens=6), 0, 8,
        world.device,
    )  # fmt: skip
    sync.publish(policy, started, 0)
    return started


def test_the_reference_engine_agrees_to_rounding(engine, policy, prompts, plan, world) -> None:
    """8 of the prompts, 4 thoughts each of up to 6 tokens, a budget's closer not among them."""
    found = check_engine(engine, policy, prompts, plan.vocabulary.markers, world, "float32", 600)
    assert 100 < found.tokens <= 8 * 4 * 7
    assert found.largest < 5e-6
    assert found.rms <= found.largest
    assert abs(found.mean) <= found.rms
    assert found.rms > 0


def test_one_wrong_weight_is_refused_and_the_worst_token_named(
    engine, policy, prompts, plan, world
) -> None:
    engine.lm.model.layers[1].mlp.down_proj.weight.data[3, 5] += 0.5
    with pytest.raises(UserError, match=r"largest \|d\| = 0.*bound 0.001") as refused:
        check_engine(engine, policy, prompts, plan.vocabulary.markers, world, "float32", 600)
    line = str(refused.value)
    found = re.search(
        r"worst token: TransformersEngine of rank 0, document (\w+), epoch 0, cut (\d+), thought (\d), "
        r"position (\d+), id (\d+): engine (\S+), trainer (\S+)\. Compare",
        line,
    )
    assert found, line
    document, cut, thought, position, token, ours, theirs = found.groups()
    assert (document, int(cut)) in {(p.trunk.document, p.trunk.start + p.cut) for p in prompts[:8]}
    assert int(thought) < 4
    assert int(position) < 7
    assert int(token) < 322
    largest = float(re.findall(r"\|d\| = (\S+)", line)[0])
    assert abs(float(theirs) - float(ours)) == pytest.approx(largest, rel=2e-3)


def test_an_engine_that_lets_the_opener_through_is_refused(
    engine, policy, prompts, plan, world
) -> None:
    """Its softmax has one more id: every log-probability is too low by log(1 - p(opener))."""
    markers = plan.vocabulary.markers
    with torch.no_grad():
        local(policy.lm.model.embed_tokens.weight)[markers.opener] *= 4.0
    sync.publish(policy, engine, 1)
    check_engine(engine, policy, prompts, markers, world, "float32", 600)
    engine.markers = replace(markers, opener=markers.closer)
    with pytest.raises(UserError, match=r"largest \|d\|.*it must ban the opener"):
        check_engine(engine, policy, prompts, markers, world, "float32", 600)


def test_a_publish_that_was_skipped_is_refused(engine, policy, prompts, plan, world) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            local(parameter).mul_(1.01)
    with pytest.raises(UserError, match="not the trainer's in float32"):
        check_engine(engine, policy, prompts, plan.vocabulary.markers, world, "float32", 600)


def agreement(tokens: int = 400, mean: float = 0.0, rms: float = 0.0, largest: float = 0.0):
    worst = Token(-largest, "engine", (0, "d", 3), 0, 0, 7, -1.0, -1.0 - largest)
    return Agreement(tokens, mean, rms, worst)


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("float32", {"largest": 0.99e-3}, {"largest": 1.01e-3}),
        ("float32", {"largest": 0.0}, {"largest": math.nan}),
        ("float16", {"rms": 0.0099}, {"rms": 0.0101}),
        ("bfloat16", {"rms": 0.059, "largest": 0.5}, {"rms": 0.061}),
        # 0.003 + 4 x 0.05 / 20 = 0.013 of 400 tokens, 0.005 of 10,000.
        ("bfloat16", {"rms": 0.05, "mean": -0.0129}, {"rms": 0.05, "mean": -0.0131}),
        ("bfloat16", {"rms": 0.05, "mean": 0.0049, "tokens": 10_000},
         {"rms": 0.05, "mean": 0.0051, "tokens": 10_000}),
        ("bfloat16", {}, {"rms": math.nan, "mean": math.nan}),
    ],
)  # fmt: skip
def test_bounds_belong_to_the_dtype(dtype, good, bad) -> None:
    assert agreement(**good).excess(dtype) is None
    assert agreement(**bad).excess(dtype) is not None


def on_two_ranks(shards_dir: Path, out: Path) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(SCRIPT), str(shards_dir), str(out)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    # All of it: an abort says why long before torchrun's summary.
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_agree_on_extremes_and_on_a_bad_engine(
    beside, shards, world, shards_dir: Path, tmp_path: Path
) -> None:
    """The second of two ranks has no row and the bad engine: what is said is the same on both."""
    one = beside(SCRIPT.stem).everything(shards, world)
    two = on_two_ranks(shards_dir, tmp_path / "found.json")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-12)
    assert one["metrics"]["mismatch/ratio_min"] < 0.6
    assert one["metrics"]["mismatch/ratio_max"] > 1.6
    assert two["good"]["tokens"] == 2 * one["good"]["tokens"]
    assert two["good"]["largest"] < 5e-6
    assert "TransformersEngine of rank 0" in one["damaged"]["refused"]
    assert "TransformersEngine of rank 1" in two["damaged"]["refused"]
