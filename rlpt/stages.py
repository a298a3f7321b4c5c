"""Stages of a run, as configurations: what is optimised, how, and how rewards become an update."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt_data.strict import Strict

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Strict):
    lr: Rate = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    final_fraction: Fraction = 0.1
    """Learning rate at the end of the stage as a fraction of `lr` (linear and cosine)."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
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
    gold_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of -log p(y | x, opener, z, closer), the mean over the continuation tokens of all rollouts."""


class UpdateConfig(Strict):
    """How the forwards of an optimiser step are arranged."""

    score_with: Literal["auto", "training_forward", "separate_pass"] = "auto"
    """Which forward the rewards are read from: the one that is trained, or one of their own before it. auto: the
    trained one wherever both give the same weights, which a line in the log says."""


class MismatchLimits(Strict):
    """Limits on what the engine's log-probabilities differ by from the trainer's. `inf` (0 for a least value): none.

    d = trainer - engine, in nats, of every sampled token; ratio = exp(d). `current_*`: tokens that the very weights of
    the step sampled, where nothing but the engine can be the cause.
    """

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)]
    """Most mean exp|d|."""
    current_rms_log_ratio: Rate | None
    """Most root mean square of d. Absent: what rounding explains (0.06 in bfloat16, 0.01 in float16, 0.005 in
    float32)."""
    current_k1: Rate
    """Most absolute mean of d, beside four standard errors."""
    k1: Rate
    """Most absolute mean of d over all tokens."""
    chi2: Rate
    """Most mean ratio^2 - 1."""
    ess: Fraction
    """Least effective share of the sample: (sum ratio)^2 / (n sum ratio^2)."""
    ratio_low: Fraction
    """Least mean ratio."""
    ratio_high: Annotated[float, Field(ge=1.0)]
    """Most mean ratio."""


class WarnLimits(MismatchLimits):
    """Said once a run, counted in every step."""

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)] = 1.05
    current_rms_log_ratio: Rate | None = None
    current_k1: Rate = 0.003
    k1: Rate = 0.1
    chi2: Rate = 1.0
    ess: Fraction = 0.3
    ratio_low: Fraction = 0.5
    ratio_high: Annotated[float, Field(ge=1.0)] = 2.0


class HaltLimits(MismatchLimits):
    """Ends the run: a fault."""

    current_exp_abs_log_ratio: Annotated[float, Field(ge=1.0)] = 1.5
    current_rms_log_ratio: Rate | None = 1.0
    current_k1: Rate = 0.1
    k1: Rate = 0.5
    chi2: Rate = 10.0
    ess: Fraction = 0.1
    ratio_low: Fraction = 0.25
    ratio_high: Annotated[float, Field(ge=1.0)] = 4.0


class MismatchConfig(Strict):
    """The engine against the trainer: what is worth a warning, and what ends a run."""

    warn: WarnLimits = WarnLimits()
    halt: HaltLimits = HaltLimits()


class StageBase(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    steps: Positive
    documents_per_step: Positive
    """Documents of one optimiser step over all ranks; divisible by the number of ranks."""
    micro_batch_tokens: Positive = 16_384
    """Tokens of one forward and backward on one rank, at least one document; changes memory and speed, never the
    gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999

    @model_validator(mode="after")
    def _warms_up_inside_the_stage(self) -> "StageBase":
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} exceeds steps = {self.steps}"
            )
        return self


class NextTokenStage(StageBase):
    kind: Literal["next_token"]
    window_tokens: Annotated[int, Field(ge=2)] = 256
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
    update: UpdateConfig = UpdateConfig()
    require_gain: float | None = None
    """Refuse to start the stage while the held-out mean gain is below this many nats per token."""

    @property
    def cancels_baselines(self) -> bool:
        """Whether a number per prompt drops out of the advantages. Not under a control that copies the rewards' std."""
        return self.advantage.baseline != "none" and self.reward_control != "random"

    def why_separate(self, whole: bool) -> str | None:
        """Why rewards cannot be read off the forward that is trained; None where they can (MEASURING, section 7).

        ``whole``: every rank's share of a step is one micro-batch; then all rewards are known before any loss.
        """
        if self.reward.kind != "gain":
            return f"reward {self.reward.kind} scores no held-out text"
        if whole:
            return None
        if self.reward_control == "random":
            return "reward_control = 'random' needs the std of the whole batch's rewards"
        if self.advantage.scale == "batch_std" and (
            self.objective.next_token_weight or self.objective.gold_weight
        ):
            return "the factor of advantage.scale = 'batch_std' would scale the next-token and gold terms too"
        return None

    @property
    def arrangement(self) -> str:
        """The line in the log that says which forward rewards are read from."""
        if self.update.score_with == "separate_pass":
            return "rewards have a scoring pass of their own (update.score_with)"
        always, split = self.why_separate(whole=True), self.why_separate(whole=False)
        if always is not None:
            return f"{always}, so there is no forward to share"
        other = {"ema", "frozen"} & self.reward.replicas
        if split is None and not other:
            return "rewards are read off the forward that is trained"
        if split is None:
            names = " and ".join(sorted(other))
            return f"the policy's scores are read off the forward that is trained; {names} run on their own"
        return (
            f"rewards are read off the forward that is trained where a step fits micro_batch_tokens = "
            f"{self.micro_batch_tokens} on every rank; else they have a pass of their own: {split}"
        )

    @model_validator(mode="after")
    def _one_forward_is_possible(self) -> "RLStage":
        reason = self.why_separate(whole=True)
        if self.update.score_with == "training_forward" and reason is not None:
            raise ValueError(f"update.score_with = 'training_forward': {reason}; use 'auto'")
        if self.objective.gold_weight and self.reward.kind != "gain":
            raise ValueError(
                f"objective.gold_weight = {self.objective.gold_weight}: reward {self.reward.kind} has a prediction "
                "where the gold text would be; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _groups_have_siblings(self) -> "RLStage":
        if self.group_size < 2 and self.advantage.baseline != "none":
            raise ValueError(
                f"group_size = {self.group_size}: advantages compare siblings, so it must be >= 2"
            )
        return self


Stage = Annotated[NextTokenStage | RLStage, Field(discriminator="kind")]
