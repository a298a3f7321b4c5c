"""How rewards become an update, as configurations: advantages, the distance to a reference, the objective."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlpt_data.strict import Strict

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]


class AdvantageConfig(Strict):
    """Rewards of a group -> advantages: (r - baseline) / scale, then the clip."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "leave_one_out"
    scale: Literal["none", "group_std", "batch_std", "group_mean"] = "none"
    """What a centred reward is divided by. group_mean: the mean reward of the group, which must not be negative (MaxRL,
    arXiv 2602.02710)."""
    clip: Rate | None = None
    """Limit of the absolute advantage, after scaling (JEPO: 1)."""
    positive_only: bool = False
    """Rollouts below their baseline are not learned from: negative advantages become 0 (Quiet-STaR's code)."""
    min_std: Annotated[float, Field(ge=0.0)] | Literal["noise"] = 0.0
    """Groups whose rewards spread no more than this are left out of the step, denominators included. noise: what the
    rounding of the policy's dtype makes of a mean over the continuation."""


class KLConfig(Strict):
    """Distance to a reference policy, per action. At weight 0 it is logged alone, on a sixteenth of the groups."""

    reference: Literal["none", "frozen", "ema"] = "none"
    weight: Annotated[float, Field(ge=0.0)] = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """With d = log pi - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As losses k2 has the gradient of the
    reverse KL, k3 (GRPO's) of the forward one, and k1 none in expectation."""
    placement: Literal["loss", "reward"] = "loss"
    """reward: weight x the sum of k1 over a rollout's actions is subtracted from its reward."""

    @model_validator(mode="after")
    def _has_a_reference(self) -> "KLConfig":
        if self.weight and self.reference == "none":
            raise ValueError(f"kl.weight = {self.weight} needs kl.reference = 'frozen' or 'ema'")
        if self.placement == "loss" and self.estimator == "k1" and self.weight:
            raise ValueError(
                "kl.estimator = 'k1' as a loss has no gradient in expectation; use 'k2', or placement = 'reward'"
            )
        if self.placement == "reward" and self.estimator != "k1":
            raise ValueError(
                f"kl.estimator = {self.estimator!r}: in the reward it is k1; set estimator = 'k1'"
            )
        return self


class CriticConfig(Strict):
    """A value head, and with it an advantage per token by generalised advantage estimation (Schulman et al. 2016)."""

    weight: Rate = 0.5
    """Of the mean of (V - return)^2 / 2 over actions."""
    gae_lambda: Fraction = 0.95
    gamma: Fraction = 1.0
    heads: Literal[1, 2] = 1
    """2: twin critics. Each starts from a draw of its own and learns from its own returns; the advantage is the mean of
    theirs, because the lower value of both would add to all advantages what `centre` takes out."""
    centre: bool = False
    """Subtract the mean advantage of all actions of the step, which a critic has and siblings do not; where updates are
    clipped such an offset drifts. It takes a pass over the step for the values alone."""


class ObjectiveConfig(Strict):
    """sum_t M_t min(rho_t, max_ratio) A_t log pi(y_t), M the trust-region mask (DPPO, arXiv 2602.04879, Eq. 23)."""

    ratio: Literal["token", "sequence", "none"] = "token"
    """rho = pi / behaviour: of the token; of the whole rollout, its geometric mean over actions (GSPO); or 1
    (REINFORCE)."""
    mask: Literal["none", "clip", "tv", "band", "m2"] = "tv"
    """none: CISPO; clip: PPO/GRPO; tv: DPPO's binary total variation; band: rho outside [band_low, band_high] (IcePop,
    MIS); m2: the largest violators, until the mean of (log rho)^2 over the step is at most m2_limit (M2PO)."""
    clip_low: Fraction = 0.2
    clip_high: Rate = 0.28
    tv_delta: Rate = 0.2
    band_low: Fraction = 0.5
    band_high: Rate = 5.0
    m2_limit: Rate = 0.04
    max_ratio: Rate | None = 5.0
    """Cap of the detached importance ratio; absent means none. Without a mask this is truncated importance sampling."""
    aggregate: Literal["token", "prompt", "sequence", "constant"] = "prompt"
    """constant: every action weighs 1 / (prompts x G x constant_tokens) (Dr. GRPO)."""
    constant_tokens: Rate = 1.0
    next_token_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the next-token loss on the trunks, with a denominator of its own."""
    next_token_targets: bool = True
    """Whether held-out tokens are among the next-token term's; RMT leaves them out."""
    gold_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of -log p(y | x, opener, z, closer)."""
    gold: Literal["constant", "probability", "softmax"] = "constant"
    """What the gold term of every rollout is multiplied by. constant: the mean over the continuation tokens of all
    rollouts. probability: p(y | x, z) (VeriFree). softmax: its share of the group's probabilities (JEPO). The last two
    are sums over the continuation and share the denominator of the policy's term: they need aggregate = 'constant'."""

    critic: CriticConfig | None = None
    """PPO's value head. A rollout's reward comes with its last action, so advantages need no siblings: set
    advantage.baseline = "none"; group_size = 1 will do."""

    @property
    def fused(self) -> bool:
        """Whether the kernel that holds the head holds the objective, too."""
        return self.critic is None and self.ratio == "token" and self.mask in ("none", "clip", "tv")

    @model_validator(mode="after")
    def _combinations(self) -> "ObjectiveConfig":
        if self.ratio == "none" and self.mask != "none":
            raise ValueError(
                f"objective.ratio = 'none' has nothing for mask = {self.mask!r} to look at; set mask = 'none'"
            )
        if self.ratio == "sequence" and self.mask in ("tv", "m2"):
            raise ValueError(
                f"objective.mask = {self.mask!r} looks at tokens one by one; with ratio = 'sequence' use 'clip'"
            )
        if self.critic is not None and self.mask == "m2":
            raise ValueError(
                "objective.mask = 'm2' is set before the step by the sign of advantages, which a critic gives in it; "
                "use 'clip'"
            )
        if self.gold != "constant" and self.aggregate != "constant":
            raise ValueError(
                f"objective.gold = {self.gold!r} shares the policy's denominator: set aggregate = 'constant'"
            )
        if self.band_low > self.band_high:
            raise ValueError(
                f"objective.band_low = {self.band_low} exceeds band_high = {self.band_high}"
            )
        return self
