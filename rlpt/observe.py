"""How a run is observed: evaluations, checkpoints and logs, as configurations."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from rlpt.stages import Count, Positive
from rlpt_data.strict import Strict

Control = Literal[
    "empty", "filler", "context_copy", "other_document", "shuffled", "wrong_target", "null"
]


class EvaluationConfig(Strict):
    split: Literal["train", "dev", "test"] = "dev"
    prompts: Positive = 128
    """Held-out prompts, one a document as far as documents reach."""
    thoughts: Positive = 2
    """Thoughts sampled per prompt."""
    greedy: bool = False
    """Also one thought a prompt at temperature 0, with figures of its own. `rlpt eval` does, unless told otherwise; a
    run does not, which spares it a thought a prompt."""
    leak_prompts: Count = 0
    """Prompts that are asked again with other text after the cut, which must change nothing; 0: none. `rlpt eval` asks
    8, a run none."""
    proxy: str = ""
    """Start of the hash of the annotations whose entropy makes the tiers; "": the only ones, and without any the
    policy's own entropy."""
    every: Count = 0
    """Steps between evaluations during training; 0: only at stage ends."""
    controls: tuple[Control, ...] = get_args(Control)
    bits_per_byte_documents: Count = 128
    bits_per_byte_tokens: Positive = 512
    """Longest window of a document that counts for bits per byte."""
    bootstrap: Positive = 2000
    batch_documents: Positive = 32
    """Prompts sampled and scored together."""
    batch_tokens: Positive = 16_384
    """Tokens of one scoring forward; changes memory and speed, never a number."""
    domains: tuple[str, ...] = ()
    """Evaluate only on these domains; empty means all."""

    @model_validator(mode="after")
    def _empty_is_not_alone(self) -> "EvaluationConfig":
        if self.controls == ("empty",):
            raise ValueError(
                "controls = ['empty']: after RL an empty thought can be strange to the policy and flatter any other; "
                "add filler"
            )
        return self

    @property
    def longest_window(self) -> int:
        return self.bits_per_byte_tokens if self.bits_per_byte_documents else 0


class CheckpointConfig(Strict):
    every: Count = 100
    """Steps between checkpoints; 0: only at stage ends."""
    keep_last: Positive = 3
    """The newest so many are kept."""
    keep_every: Count = 0
    """Kept besides: those whose step is a multiple of it; 0: none."""
    async_save: bool = True
    """Write while training goes on, from a copy in CPU memory; false: training waits for the file system."""


class LogConfig(Strict):
    rollouts_every: Count = 10
    """Steps between dumps of rollouts; 0: never."""
    rollouts_kept: Positive = 8
    """Groups in one dump."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases (the extra `wandb`), with credentials as wandb finds them."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline: into the run folder, for `wandb sync`. disabled: as without a project."""


class SupervisionConfig(Strict):
    """How a run ends that somebody or something ends; changes no number, and may differ when it goes on."""

    hang_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1800.0
    """A process that does not go on for so long is hanging: it names the rank and the phase, writes the stacks of all
    threads and ends; 0: never. Above the longest compilation, start of an engine or batch."""
    stop_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Most seconds between a signal and the end: for the step in hand and a checkpoint. Below what the scheduler waits
    before it kills."""
