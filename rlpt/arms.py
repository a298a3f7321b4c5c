"""Methods side by side: every arm is one base run with another method's rewards, advantages and objective in it.

What is compared stays the base run's: weights to start from, prompts, budgets, group size, steps and optimiser. What an
arm brings is its method's: how a thought is rewarded and what is made of that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlpt.config import RunConfig
from rlpt.rlvr import RLVRStage
from rlpt.stages import NextTokenStage, RLStage
from rlpt_data.strict import Strict, UserError, load, parse

METHOD_KEYS = (
    *("reward", "gates", "reward_control", "advantage", "objective", "kl", "reference_every"),
    *("ema_decay", "masker", "hint"),
)
"""Of a stage: what makes the method. Which prompts are asked for and how much is sampled stays the base run's:
`sampling` and `difficulty` ask for others, a `curriculum` chooses cuts, and a `budget` is of the paper's size."""


class Arm(Strict):
    """One method of a comparison."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    method: Path | None = None
    """A configuration whose RL stage is taken for its rewards, advantages and objective; absent: the base run's own."""
    next_token: Literal["tokens", "flops"] | None = None
    """Instead of a method: next-token learning, with as many trained tokens or as many FLOPs (decoding included) as the
    first arm."""
    set: tuple[str, ...] = ()
    """Changes to the arm's run, as for --set."""
    control: bool = False
    """Whether its rewards know nothing of the thought: it must gain nothing."""

    @model_validator(mode="after")
    def _one_thing(self) -> "Arm":
        if self.method is not None and self.next_token is not None:
            raise ValueError(f"arm {self.name}: give method or next_token, not both")
        return self


def rl_stage(cfg: RunConfig, where: str) -> RLStage:
    """The one RL stage of a configuration. Raises UserError where there are none or several."""
    found = [stage for stage in cfg.stage if isinstance(stage, RLStage)]
    if len(found) != 1:
        raise UserError(f"{where}: has {len(found)} RL stages; a comparison needs exactly one")
    return found[0]


def method_of(path: Path, base: RunConfig) -> dict[str, Any]:
    """Changes to the base run's table that make it the method at ``path``."""
    cfg = load(RunConfig, path)
    stage = rl_stage(cfg, str(path)).model_dump(mode="json")
    predicted = min(cfg.thought.prediction_tokens, base.prompts.horizon_tokens)
    thought = {"temperature": cfg.thought.temperature, "prediction_tokens": predicted}
    return {"stage": {key: stage[key] for key in METHOD_KEYS}, "thought": thought}


def arm_config(
    arm: Arm, base: RunConfig, run_dir: Path, seed: int, overrides: Sequence[str] = ()
) -> RunConfig:
    """The run of one arm and one seed; later overrides win, the arm's own over all."""
    table = base.model_dump(mode="json") | {"run_dir": str(run_dir), "seed": seed}
    (number,) = [n for n, stage in enumerate(base.stage) if isinstance(stage, RLStage)]
    if arm.method is not None:
        found = method_of(arm.method, base)
        table["stage"][number] |= found["stage"]
        table["thought"] |= found["thought"]
    return parse(RunConfig, table, f"arm {arm.name}", [*overrides, *arm.set])


def after_config(path: Path | None, arm: RunConfig) -> RunConfig | None:
    """The run at ``path`` from an arm's last weights, with the arm's policy, shards and seed. Raises UserError where it
    asks no questions."""
    if path is None:
        return None
    cfg = load(RunConfig, path)
    if not isinstance(cfg.stage[-1], RLVRStage):
        raise UserError(
            f"after = {path}: its last stage asks no questions; give it one of kind 'rlvr'"
        )
    own = arm.model_dump(mode="json")
    table = cfg.model_dump(mode="json") | {key: own[key] for key in ("policy", "data", "seed")}
    table |= {
        "run_dir": str(arm.run_dir.with_name(f"{arm.run_dir.name}_after")),
        "init_from": f"{arm.run_dir}@last",
    }
    return parse(RunConfig, table, str(path))


def next_token_config(cfg: RunConfig, steps: int) -> RunConfig:
    """The run with next-token learning in the place of its RL stage, on documents in an order of its own."""
    stage = rl_stage(cfg, "the base run")
    optimizer = stage.optimizer.model_copy(
        update={"warmup_steps": min(stage.optimizer.warmup_steps, steps)}
    )
    own = NextTokenStage(
        name="next_token",
        kind="next_token",
        steps=steps,
        documents_per_step=stage.documents_per_step,
        micro_batch_tokens=stage.micro_batch_tokens,
        window_tokens=max(2, cfg.prompts.context_tokens + cfg.prompts.horizon_tokens),
        optimizer=optimizer,
    )
    stages = tuple(own if isinstance(each, RLStage) else each for each in cfg.stage)
    return cfg.model_copy(update={"stage": stages})
