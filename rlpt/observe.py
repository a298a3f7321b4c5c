"""How a run is observed: evaluations, checkpoints and logs, as configurations."""

from typing import Literal, get_args

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

    @property
    def longest_window(self) -> int:
        return self.bits_per_byte_tokens if self.bits_per_byte_documents else 0


class CheckpointConfig(Strict):
    every: Count = 0
    """Steps between checkpoints; 0: only at stage ends."""
    keep_last: Positive = 3


class LogConfig(Strict):
    rollouts_every: Count = 10
    """Steps between dumps of rollouts; 0: never."""
    rollouts_kept: Positive = 8
    """Groups in one dump."""
    wandb_project: str | None = None
