"""Stages of a run, as configurations: what is optimised, how, and how rewards become an update."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt.curriculum import (
    DecayingBudget,
    DifficultyWindow,
    DynamicSampling,
    EntropyCurriculum,
    HintPass,
)
from rlpt.reward.base import Kit, Reward
from rlpt.reward.gates import Gate, Gated
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.masker import Coupled, MaskerConfig, Placing
from rlpt.reward.match import MatchReward
from rlpt.reward.registry import RewardConfig
from rlpt.terms import AdvantageConfig, Fraction, KLConfig, ObjectiveConfig, Rate
from rlpt_data.strict import Strict

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
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


class UpdateConfig(Strict):
    """How the forwards of an optimiser step are arranged."""

    score_with: Literal["auto", "training_forward", "separate_pass"] = "auto"
    """Which forward the rewards are read from: the one that is trained, or one of their own before it. auto: the
    trained one wherever both give the same weights, which a line in the log says."""


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
    reward: RewardConfig = LikelihoodReward()
    gates: tuple[Gate, ...] = ()
    """What a rollout's form does to its reward, in order."""
    reward_control: Literal["none", "permuted", "random", "constant"] = "none"
    """Training controls: permute rewards within the group, replace them by noise of the same std, or by a constant."""
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    kl: KLConfig = KLConfig()
    reference_every: Count = 0
    """Steps after which the frozen copy is renewed from the policy; 0: never. 1: the policy before its last update."""
    update: UpdateConfig = UpdateConfig()
    budget: DecayingBudget | None = None
    """Longest thought step by step; None: `thought.budget_tokens` in all."""
    curriculum: EntropyCurriculum | None = None
    """Tiers of the cuts, step by step, from annotations (`rlpt data annotate`); None: all cuts alike."""
    sampling: DynamicSampling | None = None
    """Which groups are sampled again; None: none."""
    difficulty: DifficultyWindow | None = None
    """Which documents are passed over; None: none."""
    masker: MaskerConfig | None = None
    """The policy proposes what it predicts, G spans a document (PretrainZero); None: cuts are the source's."""
    hint: HintPass | None = None
    """What is asked again with the answer in sight (STaR); None: nothing."""
    require_gain: float | None = None
    """Refuse to start the stage while the held-out mean gain is below this many nats per token."""

    @property
    def replicas(self) -> frozenset[str]:
        """The copies of the policy that the stage needs beside the policy itself."""
        return self.reward.replicas(self.cancels_baselines) | (
            {self.kl.reference} & {"frozen", "ema"}
        )

    @property
    def cancels_baselines(self) -> bool:
        """Whether a number per prompt drops out of the advantages. Not under a control that copies the rewards' std."""
        return (
            self.advantage.baseline != "none"
            # A rating compares prompts: there the number counts.
            and self.difficulty is None
            and self.advantage.scale != "group_mean"
            and self.reward_control != "random"
            and all(gate.kind == "mask_truncated" for gate in self.gates)
        )

    def built(self, kit: Kit) -> Reward:
        """The reward behind its gates."""
        reward = self.reward.build(kit)
        if self.masker is not None:
            reward = Coupled(reward, Placing(self.masker, kit.markers.closer, kit.token_bytes))
        return Gated(reward, self.gates) if self.gates else reward

    def why_separate(self, whole: bool) -> str | None:
        """Why rewards cannot be read off the forward that is trained; None where they can (MEASURING, section 7).

        ``whole``: every rank's share of a step is one micro-batch; then all rewards are known before any loss.
        """
        if (reason := self.reward.why_separate(self.cancels_baselines)) is not None:
            return reason
        if self.objective.mask == "m2":
            return "objective.mask = 'm2' needs the ratios of the whole step"
        if self.objective.critic is not None and self.objective.critic.centre:
            return "objective.critic.centre needs the values of the whole step"
        if whole:
            return None
        if self.reward_control == "random":
            return "reward_control = 'random' needs the std of the whole batch's rewards"
        if self.advantage.min_std:
            return "advantage.min_std leaves out groups, and denominators count the others"
        if self.advantage.scale == "batch_std":
            return self._unscaled_terms()
        return None

    def _unscaled_terms(self) -> str | None:
        """What a factor on the accumulated gradient would scale, too."""
        if self.objective.next_token_weight or self.objective.gold_weight or self.kl.weight:
            return "the factor of advantage.scale = 'batch_std' would scale the next-token, gold and KL terms too"
        if self.advantage.clip is not None or self.advantage.positive_only:
            return "advantage.clip and positive_only come after the factor of advantage.scale = 'batch_std'"
        return None

    @property
    def arrangement(self) -> str:
        """The line in the log: which forward rewards are read from, and what is skipped."""
        skipped = self.reward.skips(self.cancels_baselines)
        return f"{self._forwards}; {skipped}" if skipped else self._forwards

    @property
    def _forwards(self) -> str:
        if self.update.score_with == "separate_pass":
            return "rewards have a scoring pass of their own (update.score_with)"
        always, split = self.why_separate(whole=True), self.why_separate(whole=False)
        if always is not None:
            return f"{always}, so there is no forward to share"
        other = self.reward.replicas(self.cancels_baselines)
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
        if self.objective.gold_weight and self.reward.kind != "likelihood":
            raise ValueError(
                f"objective.gold_weight = {self.objective.gold_weight}: reward {self.reward.kind} does not score the "
                "held-out text after the thought; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _advantages_are_defined(self) -> "RLStage":
        needs_siblings = self.advantage.baseline != "none" or self.advantage.scale != "none"
        share = getattr(self.reward, "aggregate", "") == "log_mean_exp"
        if self.group_size < 2 and (needs_siblings or self.reward.compares):
            raise ValueError(
                f"group_size = {self.group_size}: advantages compare siblings, so it must be >= 2"
            )
        if self.group_size < 2 and self.reward_control == "permuted":
            raise ValueError("reward_control = 'permuted' permutes siblings: set group_size >= 2")
        if self.reward.compares and any(gate.kind == "mask_truncated" for gate in self.gates):
            raise ValueError(
                "gates: mask_truncated leaves out thoughts that log_mean_exp and rank compare with their siblings; use "
                "{ kind = 'format' } instead"
            )
        if share and self.advantage.baseline != "none":
            raise ValueError(
                "reward.aggregate = 'log_mean_exp' is centred by itself: set advantage.baseline = 'none'"
            )
        if self.advantage.scale == "group_mean" and (self.reward.signed or self._lowered):
            raise ValueError(
                "advantage.scale = 'group_mean' divides by the mean reward, which must not be negative: choose a "
                "reward without a sign (match, or a probability without a baseline), gates that keep it so, no KL in "
                "the reward and no reward_control = 'random'"
            )
        return self

    @model_validator(mode="after")
    def _what_is_set_is_used(self) -> "RLStage":
        if self.reference_every and "frozen" not in self.replicas:
            raise ValueError(
                f"reference_every = {self.reference_every}: nothing uses the frozen copy (what cancels is skipped); "
                "set it to 0, or kl.reference = 'frozen'"
            )
        if self.advantage.min_std == "noise" and not self.reward.averages:
            raise ValueError(
                "advantage.min_std = 'noise' is the rounding of a mean over the continuation, and this reward is none; "
                "give a number, such as 1e-6"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sampled_again(self) -> "RLStage":
        if self.sampling is not None and self.reward.passes(False, False) != (0, 0):
            raise ValueError(
                f"[stage.sampling] looks at rewards before the step, and reward {self.reward.kind} needs forwards of "
                "its own; use a match, an overlap or a judge, or leave groups out by advantage.min_std"
            )
        rates = self.sampling is not None and self.sampling.no_positive_resampling is not None
        if self.difficulty is not None:
            rates |= self.difficulty.signal == "pass_rate"
        if rates and self.reward.signed:
            raise ValueError(
                f"reward {self.reward.kind} has a sign and so no pass rate; use difficulty.signal = 'gain_quantile', "
                "without sampling.no_positive_resampling"
            )
        return self

    @model_validator(mode="after")
    def _masks_can_be_rewarded(self) -> "RLStage":
        if self.masker is None:
            return self
        chosen = (self.sampling, self.difficulty, self.curriculum)
        for wrong, remedy in (
            (self.reward != MatchReward(kind="match", how="span"), "set reward = { kind = 'match', how = 'span' }"),
            (self.group_size < 2, "set group_size >= 2: of one prediction no mask is hard and possible"),
            (any(chosen), "leave out sampling, difficulty and curriculum (advantage.min_std leaves out groups)"),
            (self.objective.next_token_weight > 0, "set objective.next_token_weight = 0: masks repeat their paragraph"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"[stage.masker]: {remedy}")
        return self

    @model_validator(mode="after")
    def _hinted_thoughts_can_be_learned(self) -> "RLStage":
        if self.hint is None:
            return self
        baseline = self.advantage.baseline != "none" or self.advantage.scale != "none"
        chosen = (self.sampling, self.difficulty, self.masker)
        shifts = any(
            gate.kind in ("length_budget", "soft_overlong")
            or (gate.kind == "format" and gate.value)
            for gate in self.gates
        )
        for wrong, remedy in (
            (shifts, "takes what has a reward above 0 for right: leave out gates that add or take away"),
            (self.reward.passes(False, False) != (0, 0), "looks at rewards early: use a match or a judge"),
            (self.reward.kind == "overlap", "takes what has a reward above 0 for right: use a match or a judge"),
            (self.objective.ratio != "none", "samples after another prompt: set objective.ratio = 'none'"),
            (baseline, "teaches what is right alone: set advantage = { baseline = 'none' }"),
            (self.objective.critic is not None, "teaches what is right alone: leave out objective.critic"),
            (self.kl.reference != "none", "has log-probabilities of another prompt: set kl.reference = 'none'"),
            (any(chosen), "leave out sampling, difficulty and masker: what they would see is hinted"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"[stage.hint] {remedy}")
        return self

    @model_validator(mode="after")
    def _a_critic_is_alone(self) -> "RLStage":
        plain = self.advantage == AdvantageConfig(baseline="none")
        if self.objective.critic is not None and not plain:
            raise ValueError(
                "objective.critic makes advantages itself: set advantage = { baseline = 'none' }, nothing else"
            )
        return self

    @property
    def _lowered(self) -> bool:
        """Whether a gate, the KL or a control may make a reward negative."""
        penalty = self.kl.weight > 0 and self.kl.placement == "reward"
        return (penalty or self.reward_control == "random") or any(
            gate.kind == "soft_overlong" or (gate.kind == "format" and gate.value < 0)
            for gate in self.gates
        )


Stage = Annotated[NextTokenStage | RLStage, Field(discriminator="kind")]
