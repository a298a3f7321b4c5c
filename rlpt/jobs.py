"""Evaluation jobs: what `rlpt eval` reads, and what one evaluation rests on. Imports no torch.

A job has rungs (policies, each at one thinking budget) and evaluation seeds; every rung at every seed is a task.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt.config import PolicyConfig, PromptConfig, ThoughtConfig
from rlpt.engines import EngineConfig
from rlpt.observe import EvaluationConfig
from rlpt.stages import Count, Positive
from rlpt_data.strict import Location, Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$")]
"""Of a rung: it names a folder, too."""
_SUBJECTS = "run (RUN_DIR@STEP), policy (a model folder) and hub (a model's name)"


class RungConfig(Strict):
    """One policy of a ladder, or with `RUN_DIR@all` one for every complete checkpoint of a run."""

    name: Name | None = None
    """In tables and file names; absent: made from the subject."""
    run: str | None = None
    """`RUN_DIR@STEP`, `RUN_DIR@last` or `RUN_DIR@all`."""
    policy: PolicyConfig | None = None
    """A model folder or fresh weights. Whatever its compute_dtype, a job computes in float32."""
    hub: str | None = None
    """A model of the Hugging Face hub by name, `ORGANISATION/NAME` or with `@REVISION`: downloaded, or taken from its
    cache where there is no network."""

    @model_validator(mode="after")
    def _one_subject(self) -> "RungConfig":
        if sum(given is not None for given in (self.run, self.policy, self.hub)) != 1:
            raise ValueError(f"give exactly one of {_SUBJECTS}")
        return self


class SweepConfig(Strict):
    budget_tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Every policy is evaluated with each as its longest thought; 0: the thought is empty."""

    @model_validator(mode="after")
    def _different(self) -> "SweepConfig":
        if len({*self.budget_tokens}) < len(self.budget_tokens):
            raise ValueError(f"budget_tokens = {list(self.budget_tokens)}: name every budget once")
        return self


class JobEvaluationConfig(EvaluationConfig):
    split: Literal["train", "dev", "test"] = "test"
    """A job states results; a run that is still being tuned looks at dev."""
    greedy: bool = True
    leak_prompts: Count = 8


class EvalJobConfig(Strict):
    """`rlpt eval`: one policy or a ladder of them over held-out shards."""

    run: str | None = None
    """`RUN_DIR@STEP`, `RUN_DIR@last`, or `RUN_DIR@all` for a ladder of every complete checkpoint."""
    policy: PolicyConfig | None = None
    """Whatever its compute_dtype, a job computes in float32."""
    hub: str | None = None
    """As for a rung."""
    ladder: tuple[RungConfig, ...] = ()
    """Several policies, each a `[[ladder]]` table."""
    skip_missing: bool = False
    """Leave out rungs whose checkpoint is missing, and say so in the table, instead of refusing them."""
    against: Name | None = None
    """The rung that the others are compared with, prompt by prompt; absent: the first."""
    sweep: SweepConfig | None = None
    shards: Location
    out_dir: Path
    seed: int = 0
    """Of fresh weights and of the engine; and of prompts, thoughts and controls unless `seeds` says otherwise."""
    seeds: tuple[int, ...] = ()
    """Evaluate with each: other cuts, thoughts and controls. From three on intervals are given over seeds, too."""
    prompts: PromptConfig | None = None
    """Absent: the run's own; without a run the defaults. A table here replaces the run's whole one."""
    thought: ThoughtConfig | None = None
    """As for `prompts`."""
    engine: EngineConfig = EngineConfig()
    evaluation: JobEvaluationConfig = JobEvaluationConfig()
    chunk_prompts: Positive = 64
    """Prompts whose results are written together: what a killed job repeats at most."""
    figure: Literal["svg", "png", "none"] = "svg"
    """Of several rungs: gain against log compute."""

    @model_validator(mode="after")
    def _one_subject(self) -> "EvalJobConfig":
        given = (self.run, self.policy, self.hub, self.ladder or None)
        if sum(each is not None for each in given) != 1:
            raise ValueError(f"give exactly one of {_SUBJECTS}, or a [[ladder]] of them")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "EvalJobConfig":
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: name every seed once")
        if self.thought is not None:
            self.sweep_of(self.thought)
        return self

    def sweep_of(self, thought: ThoughtConfig) -> ThoughtConfig:
        """The thought that every budget of the sweep fits into. Raises ValueError."""
        if self.sweep is None:
            return thought
        if thought.prediction_tokens and 0 in self.sweep.budget_tokens:
            raise ValueError(
                "sweep.budget_tokens has 0, and thought.prediction_tokens asks for a prediction after the thought; "
                "drop the 0"
            )
        longest = max(1, *self.sweep.budget_tokens)
        return thought.model_copy(update={"budget_tokens": longest})

    @property
    def rungs(self) -> tuple[RungConfig, ...]:
        """As they are written, before `@all` is looked up."""
        return self.ladder or (RungConfig(run=self.run, policy=self.policy, hub=self.hub),)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return self.seeds or (self.seed,)


class Task(Strict):
    """One evaluation: all that its numbers depend on. Written beside them; a task that changed is another one."""

    policy: PolicyConfig
    checkpoint: Path | None
    """Whose weights the policy has; None: its own."""
    weights: str
    """Their identity: a hash of the files, or the seed of fresh ones."""
    shards: str
    """Their content hash."""
    prompts: PromptConfig
    thought: ThoughtConfig
    budget_tokens: Count | None
    """Most tokens of a thought, of a sweep; None: `thought.budget_tokens`."""
    engine: EngineConfig
    evaluation: EvaluationConfig
    chunk_prompts: Positive
    policy_seed: int
    """Of fresh weights and of the engine."""
    seed: int
    """Of prompts, thoughts and controls."""

    @property
    def purpose(self) -> str:
        """Of the thoughts: with the job's own seed they are those that a training run's evaluation samples."""
        return "evaluate" if self.seed == self.policy_seed else f"evaluate {self.seed}"
