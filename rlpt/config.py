"""Run configurations: strict, frozen, TOML on disk, JSON once resolved. Imports no torch.

Defaults live here, once; a file lists only what differs. An impossible combination is refused before any model is
loaded. Units are tokens, steps and nats unless a name says otherwise.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt_data.strict import Strict

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
CutKind = Literal["supplied", "sentence", "paragraph", "random"]
Control = Literal[
    "empty", "filler", "context_copy", "other_document", "shuffled", "wrong_target", "null"
]


class DataConfig(Strict):
    shards: Path
    """Folder written by `rlpt data prepare`."""
    domains: tuple[str, ...] = ()
    """Train only on these domains; empty means all."""


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
        return self


class PolicyConfig(Strict):
    path: Path | None = None
    """A transformers causal-LM folder (config.json, safetensors, tokenizer.json). Exclusive with `fresh`."""
    fresh: FreshPolicy | None = None
    opener: str = "<think>"
    closer: str = "</think>"
    add_markers: bool = True
    """Add the markers as new ids (and resize the embedding) where the tokenizer does not have them as single ids."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Matmul precision. Masters, gradients and everything after the LM head stay float32."""
    gradient_checkpointing: bool = False
    compile: bool = False
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
    cut_kinds: tuple[CutKind, ...] = ("supplied", "sentence", "paragraph", "random")

    @model_validator(mode="after")
    def _context_fits(self) -> "PromptConfig":
        if self.min_context_tokens > self.context_tokens:
            raise ValueError(
                f"min_context_tokens = {self.min_context_tokens} exceeds context_tokens = {self.context_tokens}"
            )
        return self


class ThoughtConfig(Strict):
    budget_tokens: Positive = 16
    """Longest thought; a thought still open then gets a forced closer, which is not an action."""
    prediction_tokens: Count = 0
    """Tokens the policy predicts after the closer; 0 for likelihood rewards."""


class EngineConfig(Strict):
    kind: Literal["transformers"] = "transformers"
    prompts_per_batch: Positive = 32
    """Prompts decoded together; changes speed and memory, never a sample."""


class OptimizerConfig(Strict):
    lr: Rate = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    final_fraction: Fraction = 0.1
    """Learning rate at the end of the stage as a fraction of `lr` (linear and cosine)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Applied to matrices; norms, biases and other vectors are exempt."""
    clip_norm: Rate = 1.0


class MixConfig(Strict):
    """Shares of the frames a document is shown in by the next-token stage. They add up to 1."""

    plain: Fraction = 1.0
    """No markers."""
    worked: Fraction = 0.0
    """The shard's own `thoughts` column; documents without one are shown plain."""
    copied: Fraction = 0.0
    """A span of the context, copied, as the thought."""
    empty: Fraction = 0.0
    """Opener and closer with nothing between."""
    thoughts_per_window: Positive = 1
    """Most thoughts in one copied or empty frame; each sits at a cut of its own."""

    @model_validator(mode="after")
    def _adds_up(self) -> "MixConfig":
        total = self.plain + self.worked + self.copied + self.empty
        if abs(total - 1.0) > 1e-6:
            raise ValueError(
                f"plain + worked + copied + empty = {total:g}; the shares must add up to 1"
            )
        return self


class GainReward(Strict):
    """(log p_scorer(y | x, opener, z, closer) - log p_baseline(y | x)) / |y|, nats per continuation token."""

    kind: Literal["gain"] = "gain"
    scorer: Literal["policy", "ema", "frozen"] = "policy"
    baseline: Literal["none", "policy", "ema", "frozen"] = "policy"
    clip: Rate | None = None
    """Limit of the absolute reward, in nats per token, before any centring."""

    @property
    def replicas(self) -> frozenset[str]:
        """The copies of the policy that this reward needs beside the policy itself."""
        return frozenset({self.scorer, self.baseline}) & {"ema", "frozen"}


class PrefixMatchReward(Strict):
    """1 where the prediction's bytes are a prefix of the continuation's that ends on a gold token boundary, else 0."""

    kind: Literal["prefix_match"]

    @property
    def replicas(self) -> frozenset[str]:
        return frozenset()


class AdvantageConfig(Strict):
    baseline: Literal["group_mean", "leave_one_out", "none"] = "leave_one_out"
    scale: Literal["none", "group_std", "batch_std"] = "none"
    """What a centred reward is divided by."""


class ObjectiveConfig(Strict):
    """sum_t M_t min(rho_t, max_ratio) A_t log pi(y_t), M the trust-region mask (DPPO, arXiv 2602.04879, Eq. 23)."""

    mask: Literal["none", "clip", "tv"] = "tv"
    """none: CISPO; clip: PPO/GRPO; tv: DPPO's binary total variation."""
    clip_low: Fraction = 0.2
    clip_high: Rate = 0.28
    tv_delta: Rate = 0.2
    max_ratio: Rate | None = 5.0
    """Cap of the detached importance ratio; absent means none."""
    aggregate: Literal["token", "prompt", "sequence"] = "prompt"
    next_token_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the next-token loss on the trunks, with a denominator of its own."""


class StageBase(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    steps: Positive
    documents_per_step: Positive
    """Documents of one optimiser step over all ranks; divisible by the number of ranks."""
    micro_batch: Positive = 8
    """Documents of one forward and backward on one rank; changes memory and speed, never the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999


class NextTokenStage(StageBase):
    kind: Literal["next_token"]
    window_tokens: Positive = 256
    mix: MixConfig = MixConfig()
    until_gain: float | None = None
    """End the stage early at an evaluation whose mean gain reaches this many nats per token (`steps` is the limit)."""


class RLStage(StageBase):
    kind: Literal["rl"]
    group_size: Positive = 8
    reward: Annotated[GainReward | PrefixMatchReward, Field(discriminator="kind")] = GainReward()
    reward_control: Literal["none", "permuted", "random", "constant"] = "none"
    """Training controls: permute rewards within the group, replace them by noise of the same std, or by a constant."""
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    require_gain: float | None = None
    """Refuse to start the stage while the held-out mean gain is below this many nats per token."""

    @model_validator(mode="after")
    def _groups_have_siblings(self) -> "RLStage":
        if self.group_size < 2 and self.advantage.baseline != "none":
            raise ValueError(
                f"group_size = {self.group_size}: advantages compare siblings, so it must be >= 2"
            )
        return self


Stage = Annotated[NextTokenStage | RLStage, Field(discriminator="kind")]


class EvaluationConfig(Strict):
    split: Literal["train", "dev", "test"] = "dev"
    prompts: Positive = 128
    """Held-out prompts, one a document as far as documents reach."""
    thoughts: Positive = 2
    """Thoughts sampled per prompt."""
    every: Count = 0
    """Steps between evaluations during training; 0: only at stage ends."""
    controls: tuple[Control, ...] = (
        "empty",
        "filler",
        "context_copy",
        "other_document",
        "shuffled",
        "wrong_target",
        "null",
    )
    bits_per_byte_documents: Count = 128
    bits_per_byte_tokens: Positive = 512
    """Longest window of a document that counts for bits per byte."""
    bootstrap: Positive = 2000
    batch_documents: Positive = 32
    domains: tuple[str, ...] = ()
    """Evaluate only on these domains; empty means all."""


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
    stage: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """The stages in order, each a `[[stage]]` table with a `kind`; the weights chain."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        names = [stage.name for stage in self.stage]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ; got {', '.join(names)}")
        for stage in self.stage:
            if isinstance(stage, RLStage):
                self._check_reward(stage)
        return self

    def _check_reward(self, stage: RLStage) -> None:
        if stage.reward.kind == "prefix_match" and self.thought.prediction_tokens == 0:
            raise ValueError(
                f"stage {stage.name}: reward prefix_match needs thought.prediction_tokens >= 1"
            )
        if stage.reward.kind == "gain" and self.thought.prediction_tokens > 0:
            raise ValueError(
                f"stage {stage.name}: reward gain scores the held-out text; set thought.prediction_tokens = 0"
            )

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stage)


class EvalJobConfig(Strict):
    """`rlpt eval`: one checkpoint or model folder over held-out shards."""

    run: str | None = None
    """`RUN_DIR@STEP` or `RUN_DIR@last`. Exclusive with `policy`."""
    policy: PolicyConfig | None = None
    shards: Path
    out_dir: Path
    seed: int = 0
    prompts: PromptConfig = PromptConfig()
    thought: ThoughtConfig = ThoughtConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig(split="test")

    @model_validator(mode="after")
    def _one_subject(self) -> "EvalJobConfig":
        if (self.run is None) == (self.policy is None):
            raise ValueError("give exactly one of run (RUN_DIR@STEP) and policy (a model folder)")
        return self
