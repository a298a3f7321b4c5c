"""Run configurations: strict, frozen, TOML on disk, JSON once resolved. Imports no torch.

Defaults live here, once; a file lists only what differs. An impossible combination is refused before any model is
loaded. Units are tokens, steps and nats unless a name says otherwise.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from rlpt.engines import EngineConfig, RolloutConfig
from rlpt.limits import GuardsConfig, MismatchConfig
from rlpt.observe import CheckpointConfig, EvaluationConfig, LogConfig, SupervisionConfig
from rlpt.reward.masker import MaskerConfig
from rlpt.rlvr import RLVRStage, RunStage
from rlpt.stages import Count, NextTokenStage, Positive, Rate, RLStage
from rlpt.templates import INLINE, AskedFrame, FrameConfig
from rlpt.terms import Fraction
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.strict import Location, Strict

CutKind = Literal["supplied", "sentence", "paragraph", "random", "every", "annotated"]


class MixturePart(Strict):
    name: str
    """Of its share in metrics.jsonl: `mixture/NAME`."""
    shards: Location
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its part of the documents of a stage, relative to the other weights."""


class DataConfig(Strict):
    shards: Location | None = None
    """Folder written by `rlpt data prepare`, here or at a URL. Exclusive with `mixture`."""
    mixture: tuple[MixturePart, ...] = ()
    """Several such folders, each a `[[data.mixture]]` table; held-out text is that of all of them."""
    domains: tuple[str, ...] = ()
    """Train only on these domains; empty means all."""
    cuts: AnnotatedCuts | None = None
    """Choose the cuts of the RL stages by a proxy model's annotations; None: those of the shards."""

    @model_validator(mode="after")
    def _one_form(self) -> "DataConfig":
        if (self.shards is None) == (not self.mixture):
            raise ValueError("give exactly one of shards (a folder) and mixture (several of them)")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"names of the mixture must differ; got {', '.join(names)}")
        return self


class FreshPolicy(Strict):
    """A policy with random weights. The vocabulary is the shard tokenizer's plus the two markers."""

    architecture: Literal["llama", "qwen3"] = "llama"
    layers: Positive = 4
    width: Positive = 256
    heads: Positive = 4
    kv_heads: Positive | None = None
    """Key/value heads; absent means as many as heads."""
    mlp_width: Positive | None = None
    """Width of the gated MLP; absent means 4 x width x 2/3, rounded up to 32."""
    max_positions: Positive = 2048
    rope_theta: Rate = 10_000.0
    tie_embeddings: bool = True
    init_std: Rate = 0.02

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "FreshPolicy":
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"heads = {self.heads} must divide width = {self.width}, and kv_heads must divide heads"
            )
        if self.width // self.heads % 2:
            raise ValueError(
                f"width / heads = {self.width // self.heads} must be even: rotary positions turn pairs"
            )
        return self


class PolicyConfig(Strict):
    path: Path | None = None
    """A transformers causal-LM folder (config.json, safetensors, tokenizer.json). Exclusive with `fresh`."""
    fresh: FreshPolicy | None = None
    opener: str = "<think>"
    closer: str = "</think>"
    add_markers: bool = True
    """Add the markers as new ids (and resize the embedding) where the tokenizer does not have them as single ids."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Matmul precision. Masters, gradients and everything after the LM head stay float32. float16 rounds eight times
    finer than bfloat16, on both sides; its losses are scaled, and a step that overflows is skipped."""
    gradient_checkpointing: bool = False
    compile: bool = False
    layout: Literal["auto", "shared", "naive"] = "auto"
    """shared: a document is computed once for all its branches; naive: every branch carries its context along. auto:
    shared wherever the architecture is known to allow it. The same numbers, up to rounding."""
    replicas: Positive = 1
    """HSDP: parameters are sharded over world_size / replicas ranks and replicated over `replicas` such groups."""

    @model_validator(mode="after")
    def _one_origin(self) -> "PolicyConfig":
        if (self.path is None) == (self.fresh is None):
            raise ValueError("give exactly one of path (a model folder) and fresh (a new model)")
        if self.opener == self.closer:
            raise ValueError(f"opener and closer are both {self.opener!r}; they must differ")
        return self


class PromptConfig(Strict):
    context_tokens: Positive = 128
    """Longest context before a cut."""
    min_context_tokens: Positive = 16
    horizon_tokens: Positive = 8
    """Length of the held-out continuation."""
    cuts_per_document: Positive = 1
    cut_kinds: tuple[CutKind, ...] = get_args(CutKind)
    segment: Literal["next", "middle"] = "next"
    """What is held out: the text that comes next, or a segment in the middle, whose context is what follows it, then
    what precedes it (RLPT's middle segments)."""
    middle_share: Fraction = 1.0
    """With segment = "middle": the share of the samples that are such; the others hold out what comes next."""
    after_tokens: Positive = 32
    """Of a middle segment's context, most tokens that come after it; they count towards context_tokens."""
    frame: FrameConfig = INLINE
    """What stands around the text: nothing, or the turns of a chat (a table of its own, with its `kind`)."""

    @model_validator(mode="after")
    def _context_fits(self) -> "PromptConfig":
        if self.min_context_tokens > self.context_tokens:
            raise ValueError(
                f"min_context_tokens = {self.min_context_tokens} exceeds context_tokens = {self.context_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _middle_fits(self) -> "PromptConfig":
        if self.segment == "next":
            if self.middle_share != 1.0:
                raise ValueError(
                    f"middle_share = {self.middle_share} is of segment = 'middle'; set that, or drop the share"
                )
            return self
        if self.cuts_per_document != 1:
            raise ValueError(
                f"cuts_per_document = {self.cuts_per_document}: a middle segment has a trunk of its own; set it to 1"
            )
        if self.min_context_tokens + self.after_tokens > self.context_tokens:
            raise ValueError(
                f"min_context_tokens + after_tokens = {self.min_context_tokens + self.after_tokens} exceed "
                f"context_tokens = {self.context_tokens}, which they share; raise it, or lower after_tokens"
            )
        return self


class ThoughtConfig(Strict):
    budget_tokens: Positive = 16
    """Longest thought; a thought still open then gets a forced closer, which is not an action."""
    temperature: Rate = 1.0
    """What logits are divided by where a token is sampled, and in the trainer's probabilities of sampled tokens.
    Held-out text is scored at 1."""
    prediction_tokens: Count = 0
    """Tokens the policy predicts after the closer; 0 for likelihood rewards."""


def longest_branch(prompts: PromptConfig, thought: ThoughtConfig) -> int:
    """Tokens of the longest context with opener, thought, closer and what follows it, in its frame."""
    after = max(prompts.horizon_tokens, thought.prediction_tokens)
    framed = prompts.frame.most_before + prompts.frame.most_after
    return prompts.context_tokens + framed + thought.budget_tokens + 2 + after


class RunConfig(Strict):
    run_dir: Path
    seed: int = 0
    init_from: str | None = None
    """Start from `RUN_DIR@STEP` (or `RUN_DIR@last`): weights only; optimiser, order and step start fresh."""
    data: DataConfig
    policy: PolicyConfig
    prompts: PromptConfig = PromptConfig()
    thought: ThoughtConfig = ThoughtConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    stage: Annotated[tuple[RunStage, ...], Field(min_length=1)]
    """The stages in order, each a `[[stage]]` table with a `kind`; the weights chain."""
    mismatch: MismatchConfig = MismatchConfig()
    guards: GuardsConfig = GuardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        names = [stage.name for stage in self.stage]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ; got {', '.join(names)}")
        for stage in self.stage:
            if isinstance(stage, RLStage):
                self._check_reward(stage)
            elif stage.until_gain is not None and not self.evaluation.every:
                raise ValueError(f"stage {stage.name}: until_gain needs evaluation.every >= 1")
        self._check_positions()
        self._check_rollouts()
        return self

    def frames(self, stage: RunStage) -> list[FrameConfig | AskedFrame]:
        """What stands around the texts of a stage."""
        own = self.prompts.frame
        masker = stage.masker if isinstance(stage, RLStage) else None
        return [own] if masker is None else [own, own.asking(masker.instruction)]

    @property
    def longest_branch(self) -> int:
        """`longest_branch` of all that an engine reads and samples."""
        framed = [
            self.prompts.model_copy(update={"frame": frame})
            for stage in self.stage
            for frame in self.frames(stage)
        ]
        longest = max(longest_branch(prompts, self.thought) for prompts in framed)
        hints = [each.hint for each in self.stage if isinstance(each, RLStage) and each.hint]
        hinted = [hint.most_tokens + self.prompts.horizon_tokens for hint in hints]
        return longest + max(hinted, default=0)

    @property
    def longest_path(self) -> int:
        """Tokens of the longest sequence that the policy sees: context or window with its thoughts and horizon."""
        longest, thought = self.longest_branch, self.thought.budget_tokens + 2
        for stage in self.stage:
            if isinstance(stage, NextTokenStage):
                longest = max(
                    longest, stage.window_tokens + stage.mix.thoughts_per_window * thought
                )
        return max(longest, self.evaluation.longest_window)

    def _check_positions(self) -> None:
        """A fresh policy must have a position for every token of the longest sequence."""
        longest = self.longest_path
        if self.policy.fresh is not None and longest > self.policy.fresh.max_positions:
            raise ValueError(
                f"policy.fresh.max_positions = {self.policy.fresh.max_positions}: the longest sequence "
                f"(context or window with its thoughts and horizon) has {longest} tokens"
            )

    def _check_rollouts(self) -> None:
        """Sampling ahead needs engines that run beside the trainer."""
        vllm = self.engine.kind == "vllm"
        if self.rollout.steps_ahead and not (vllm and self.engine.vllm.placement == "separate"):
            raise ValueError(
                f"rollout.max_staleness = {self.rollout.max_staleness} needs engines that sample while the trainer "
                "trains: engine.kind = 'vllm' with engine.vllm.placement = 'separate'"
            )

    def _check_reward(self, stage: RLStage) -> None:
        reward, predicted = stage.reward, self.thought.prediction_tokens
        if self.rollout.saved is not None and (stage.sampling or stage.difficulty):
            raise ValueError(f"stage {stage.name}: rollout.saved: leave out sampling, difficulty")
        for gate in stage.gates:
            if gate.kind == "format":
                gate.refuse_unfit(self.thought.budget_tokens, predicted)
        if stage.budget is not None and stage.budget.start > self.thought.budget_tokens:
            raise ValueError(
                f"stage {stage.name}: budget.start = {stage.budget.start} exceeds thought.budget_tokens = "
                f"{self.thought.budget_tokens}; raise that"
            )
        if reward.predicts and not predicted:
            raise ValueError(
                f"stage {stage.name}: reward {reward.kind} looks at a prediction; set thought.prediction_tokens >= 1"
            )
        if isinstance(stage, RLVRStage):
            stage.refuse_unfit(self.thought.budget_tokens, predicted)
        if reward.within_text and predicted > self.prompts.horizon_tokens:
            raise ValueError(
                f"thought.prediction_tokens = {predicted} exceeds prompts.horizon_tokens = "
                f"{self.prompts.horizon_tokens}: there would be no text to match"
            )
        if stage.masker is not None:
            self._check_masker(stage.name, stage.masker)
        again = self.rollout.max_reuse > 1 or self.rollout.save_groups or self.rollout.saved
        if stage.hint is not None and again:
            raise ValueError(
                f"stage {stage.name}: [stage.hint] trains what it samples once, at once: leave out rollout.max_reuse, "
                "save_groups and saved"
            )
        if getattr(reward, "foreign", None) is not None and self.prompts.frame.kind != "inline":
            raise ValueError(
                f"stage {stage.name}: reward.foreign reads no chat; set prompts.frame = {{ kind = 'inline' }}"
            )
        if not reward.predicts and predicted:
            raise ValueError(
                f"stage {stage.name}: reward {reward.kind} scores the held-out text; set thought.prediction_tokens = 0"
            )

    def _check_masker(self, name: str, masker: MaskerConfig) -> None:
        least = masker.min_tokens + 2 * masker.edge_tokens
        now = RolloutConfig(train=self.rollout.train)
        for wrong, remedy in (
            (self.prompts.segment != "middle", "predicts middle segments: set prompts.segment = 'middle'"),
            (self.prompts.middle_share < 1.0, "predicts middle segments alone: leave out prompts.middle_share"),
            (self.data.cuts, "lets the policy choose what is held out: leave out [data.cuts]"),
            (self.rollout != now, "samples masks after their proposals, and trains them once: leave out [rollout]"),
            (masker.max_tokens > self.thought.prediction_tokens,
             f"max_tokens = {masker.max_tokens} exceeds thought.prediction_tokens; raise that"),
            (least > self.prompts.min_context_tokens,
             f"min_tokens + 2 edge_tokens = {least} exceed prompts.min_context_tokens; raise that"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"stage {name}: [stage.masker] {remedy}")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stage)
