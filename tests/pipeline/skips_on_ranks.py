"""What test_skipped_steps.py runs on two ranks: runs whose step 4 is not finite on rank 1, and one without that update.

skips_on_ranks.py TOML SETTING...; every run has a folder of its own beside the configuration's.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as torch_dist

from rlpt import dist, rl_update, train
from rlpt.config import RunConfig
from rlpt.policy.policy import Policy
from rlpt.reward.likelihood import Likelihood
from rlpt.update import Applied, _drop_gradients
from rlpt_data.strict import load

STEP = 4
REWARD, FORWARD, APPLY = Likelihood.__call__, Policy.forward, rl_update.apply_gradients
RUN_STEP = train.run_step
now = False
"""Whether the step in hand is the one."""


def hit() -> bool:
    return now and torch_dist.get_rank() == 1


def rewarded(self: Likelihood, groups: Any, policy: Any = None) -> Any:
    found = REWARD(self, groups, policy)
    reward_PG = found.reward_PG.copy()
    reward_PG[0, 1] = np.nan if hit() else reward_PG[0, 1]
    return replace(found, reward_PG=reward_PG)


def forward(self: Policy, packed: Any, read: Any) -> Any:
    found = FORWARD(self, packed, read)
    loss = hit() and isinstance(found, tuple) and len(found) == 1 and found[0].requires_grad
    return (found[0] * np.inf,) if loss else found


def broken(learner: Any, *rest: Any) -> Applied:
    if hit():
        gradient = next(each for each in learner.policy.parameters() if each.grad is not None).grad
        gradient.to_local()[...] = np.nan
    return APPLY(learner, *rest)


def idle(learner: Any, *rest: Any) -> Applied:
    if not now:
        return APPLY(learner, *rest)
    _drop_gradients(learner)
    return Applied(0.0, ())


def run_step(session: Any, work: Any, stage: Any, progress: Any) -> Any:
    global now
    now = progress.step + 1 == STEP
    return RUN_STEP(session, work, stage, progress)


PATCHES: dict[str, tuple[Any, str, Callable]] = {
    "reward": (Likelihood, "__call__", rewarded),
    "loss": (Policy, "forward", forward),
    "gradient": (rl_update, "apply_gradients", broken),
    "idle": (rl_update, "apply_gradients", idle),
}


def main(toml: Path, settings: list[str]) -> None:
    train.run_step = run_step
    with dist.world():
        for name, (where, what, patch) in PATCHES.items():
            original = getattr(where, what)
            setattr(where, what, patch)
            train.run(load(RunConfig, toml, (*settings, f"run_dir={toml.parent / name}")))
            setattr(where, what, original)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
