"""What test_agreement.py runs here and under torchrun: good engines, one off by a weight, the monitor's rows dealt out.

Writes what rank 0 found as JSON: agreement_on_ranks.py SHARDS OUT
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from rlpt import dist
from rlpt.agreement import check_engine
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig, ThoughtConfig
from rlpt.mismatch import measured
from rlpt.policy import load
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.update import reduced
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

TINY = PolicyConfig(fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1))
ROWS = 101


def monitored(world: dist.World) -> dict[str, float]:
    """Every rank measures its own share of the same rows; the last rank of many has none."""
    draw = np.random.default_rng(0)
    behaviour = -draw.exponential(2.0, ROWS)
    logp = behaviour + 0.4 * draw.normal(size=ROWS)
    mine = np.array_split(np.arange(ROWS), max(1, world.size - 1))
    at = mine[world.rank] if world.rank < len(mine) else np.arange(0)
    logp_R, behaviour_R = (torch.from_numpy(x[at]).float() for x in (logp, behaviour))
    used_R, current_R = torch.from_numpy(at % 5 != 0), torch.from_numpy(at % 2 == 0)
    return reduced(*measured(logp_R, behaviour_R, used_R, current_R), world)


def agreed(shards: ShardFolder, world: dist.World, damage: float) -> dict[str, float | str]:
    """``damage`` is added to one weight of the last rank's engine."""
    plan = load.blueprint(TINY, shards, 100)
    policy = load.load(TINY, plan, world, seed=0)
    markers = plan.vocabulary.markers
    engine = TransformersEngine(
        plan.config, plan.layout, markers, ThoughtConfig(budget_tokens=6), 0, 8, world.device
    )
    sync.publish(policy, engine, 0)
    if world.rank == world.size - 1:
        engine.lm.model.layers[1].mlp.down_proj.weight.data[3, 5] += damage
    cfg = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5)
    prompts = held_out(shards.split("train"), cfg, markers, 8, 0, ())
    try:
        found = check_engine(engine, policy, prompts, markers, world, "float32", 600)
    except UserError as error:
        return {"refused": str(error)}
    return {"tokens": found.tokens, "largest": found.largest}


def everything(shards: ShardFolder, world: dist.World) -> dict:
    return {
        "metrics": monitored(world),
        "good": agreed(shards, world, 0.0),
        "damaged": agreed(shards, world, 0.5),
    }


def main(shards_dir: Path, out: Path) -> None:
    with dist.world() as world:
        found = everything(ShardFolder.open(shards_dir), world)
        everyones = dist.gathered(found, world)
        assert all(each == found for each in everyones)
        if world.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # What was refused above keeps its frames, and with them meshes and groups of torch, until the interpreter ends:
    # their threads then abort the process now and then ("terminate called without an active exception").
    os._exit(0)
