"""One optimiser step: the gradient is the formula's, and does not depend on how the step was split."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.credit import Credit, Credited
from rlpt.faults import Faults
from rlpt.optim import adamw, learning_rate
from rlpt.policy.load import Blueprint, local, named_full_tensors
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import prompt_stream, prompts_of, trunk
from rlpt.reward.base import Kit, Rewarded
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.shapes import Clip
from rlpt.rl_update import _Update, rl_step
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import ObjectiveConfig, OptimizerConfig, RLStage
from rlpt.types import Group, Scores, concat
from rlpt.update import Learner, apply_gradients, move_ema
from rlpt_data.shards import ShardFolder

CFG = PromptConfig(context_tokens=20, min_context_tokens=6, horizon_tokens=4, cuts_per_document=2)
STAGE = RLStage(name="rl", kind="rl", steps=4, documents_per_step=6, group_size=3)


@pytest.fixture
def groups(policy: Policy, plan: Blueprint, shards: ShardFolder, world: dist.World) -> list[Group]:
    stream = prompt_stream(shards.split("train"), CFG, 0, "train")
    prompts = [
        p
        for e, d in stream.take(0, 6, 0, 1)
        for p in prompts_of(trunk(d, e, CFG, 0), CFG, plan.vocabulary.markers)
    ]
    thought = ThoughtConfig(budget_tokens=4)
    engine = TransformersEngine(
        plan.config, plan.layout, plan.vocabulary.markers, thought, 0, 32, world.device
    )
    sync.publish(policy, engine, 0)
    return generate(engine, prompts, 3, "train")


@pytest.fixture
def learner(policy: Policy, plan: Blueprint, world: dist.World) -> Learner:
    return Learner(
        policy, adamw(policy, OptimizerConfig()), None, plan.vocabulary.markers, world, seed=0
    )


def gradients(learner: Learner, groups: list[Group], stage: RLStage) -> dict[str, torch.Tensor]:
    advantage_PG = np.random.default_rng(0).normal(size=(len(groups), 3))
    learner.policy.zero_grad()
    update = _Update(learner, groups, stage, Credit(stage, learner.world, learner.seed, step=0), 0)
    credited = Credited(advantage_PG, update.credit.weights(groups))
    for part in update.parts(continuations=False):
        update._backward(part, False, lambda _readout, _batch, part=part: credited.part(part))
    return {
        name: local(p.grad).clone()
        for name, p in learner.policy.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("aggregate", ["token", "prompt", "sequence"])
@pytest.mark.parametrize("next_token_weight", [0.0, 0.3])
def test_splitting_the_step_does_not_change_the_gradient(
    learner: Learner, groups: list[Group], aggregate: str, next_token_weight: float
) -> None:
    objective = ObjectiveConfig(aggregate=aggregate, next_token_weight=next_token_weight)
    whole = gradients(learner, groups, STAGE.model_copy(update={"objective": objective}))
    for size in (1, 150, 400):
        split = gradients(
            learner,
            groups,
            STAGE.model_copy(update={"objective": objective, "micro_batch_tokens": size}),
        )
        for name, value in whole.items():
            assert torch.linalg.vector_norm(split[name] - value) <= 1e-5 * torch.linalg.vector_norm(
                value
            ), name


@pytest.mark.parametrize("next_token_weight", [0.0, 0.4])
def test_the_gradient_is_reinforce_one_sequence_at_a_time(
    learner: Learner, groups: list[Group], plan: Blueprint, next_token_weight: float
) -> None:
    """-1/P sum_x 1/|y_x| sum_i A_i sum_t grad log pi(y_t), on policy, and w times the mean next-token loss.

    By an independent loop over plain sequences in plain transformers.
    """
    objective = ObjectiveConfig(
        mask="none", max_ratio=None, aggregate="prompt", next_token_weight=next_token_weight
    )
    found = gradients(learner, groups, STAGE.model_copy(update={"objective": objective}))
    advantage_PG = np.random.default_rng(0).normal(size=(len(groups), 3))
    lm = transformers.AutoModelForCausalLM.from_config(plan.config, dtype=torch.float32)
    lm.load_state_dict(dict(named_full_tensors(learner.policy)), strict=False)
    markers = plan.vocabulary.markers
    loss = torch.zeros(())
    for p, group in enumerate(groups):
        actions = sum(r.num_actions for r in group.rollouts)
        for g, rollout in enumerate(group.rollouts):
            logp = plain_logp(lm, group.prompt.policy_ids, rollout.ids, (markers.opener,))
            kept = logp[torch.from_numpy(rollout.action)].sum()
            loss = loss - float(advantage_PG[p, g]) * kept / (actions * len(groups))
    trunks = {id(group.prompt.trunk): group.prompt.trunk for group in groups}.values()
    count = sum(len(trunk.ids) - 1 for trunk in trunks)
    for each in trunks:
        loss = (
            loss
            - next_token_weight
            * plain_logp(lm, each.ids[:1], each.ids[1:], markers.ids).sum()
            / count
        )
    loss.backward()
    for name, parameter in lm.named_parameters():
        expected = parameter.grad
        error = torch.linalg.vector_norm(found[f"lm.{name}"] - expected)
        assert error <= 2e-5 * torch.linalg.vector_norm(expected), name


def plain_logp(
    lm: Any, prefix: np.ndarray, ids: np.ndarray, banned: tuple[int, ...]
) -> torch.Tensor:
    """Log-probabilities of ``ids`` after ``prefix``, one sequence, full logits."""
    logits = lm(torch.from_numpy(concat(prefix, ids))[None]).logits[0, len(prefix) - 1 : -1]
    logits = logits.index_fill(1, torch.tensor(list(banned)), -torch.inf)
    return torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]


def test_a_constant_reward_leaves_the_gradient_exactly_zero(
    learner: Learner, groups: list[Group]
) -> None:
    before = [local(p).clone() for p in learner.policy.parameters()]
    stage = STAGE.model_copy(update={"reward_control": "constant"})
    learner.optimizer = adamw(learner.policy, OptimizerConfig(weight_decay=0.0))

    def reward(groups: list[Group], policy: object = None) -> Rewarded:
        return Rewarded(np.random.default_rng(1).normal(size=(len(groups), 3)), {})

    stepped = rl_step(learner, groups, reward, stage, 0, 0)
    assert stepped.grad_norm == 0.0
    assert all(
        torch.equal(a, local(b)) for a, b in zip(before, learner.policy.parameters(), strict=True)
    )


@pytest.mark.parametrize("baseline", ["none", "policy", "ema"])
def test_a_baseline_of_the_prompt_cancels_in_centred_advantages(
    learner: Learner, groups: list[Group], baseline: str
) -> None:
    """MEASURING, section 1: with and without it the advantages agree to 1e-6."""
    from rlpt.advantage import advantage

    markers = learner.markers
    own = Scorer(learner.policy, markers.ids, learner.world, 600)

    class Shifted:
        """A baseline that differs from the policy by a constant per prompt."""

        def branches(self, pairs):
            return own.branches(pairs)

        def trunks(self, spans):
            return [replace(s, logp=s.logp - 0.1 * i) for i, s in enumerate(own.trunks(spans))]

    def advantages(name: str, clip: float | None) -> np.ndarray:
        shapes = () if clip is None else (Clip(kind="clip", limit=clip),)
        kit = Kit({"policy": own, "ema": Shifted()}, markers, centred=clip is None)
        reward = LikelihoodReward(baseline=name, shapes=shapes).build(kit)
        return advantage(
            reward(groups).reward_PG, baseline="leave_one_out", scale="none", moments=None
        )

    # A clip so wide that it never acts keeps the baseline from being skipped.
    assert np.allclose(advantages(baseline, None), advantages("ema", 1e9), atol=1e-6)


def test_a_gain_is_the_difference_of_two_scores_per_token(
    learner: Learner, groups: list[Group]
) -> None:
    scorer = Scorer(learner.policy, learner.markers.ids, learner.world, 600)
    rewarded = LikelihoodReward().build(Kit({"policy": scorer}, learner.markers, centred=True))(
        groups
    )
    from rlpt.types import thought_branch

    for p, group in enumerate(groups):
        prompt = group.prompt
        bare = scorer.trunks([(prompt.trunk, prompt.cut, prompt.cut + 4)])[0].total
        for g, rollout in enumerate(group.rollouts):
            own = scorer.branches(
                [(prompt.trunk, thought_branch(prompt, learner.markers, rollout.thought_ids))]
            )[0].total
            assert abs(rewarded.reward_PG[p, g] - (own - bare) / 4) < 1e-6
    value, count = rewarded.sums["gain/mean"]
    assert abs(value / count - rewarded.reward_PG.mean()) < 1e-9


def test_a_gradient_that_is_not_finite_changes_nothing(learner: Learner) -> None:
    before = [local(p).clone() for p in learner.policy.parameters()]
    for parameter in learner.policy.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    applied = apply_gradients(learner, OptimizerConfig(), 0, 10, 0.9, Faults())
    assert "rank 0: the gradient of lm.model.embed_tokens.weight is not finite" in applied.skipped
    assert all(
        torch.equal(a, local(b)) for a, b in zip(before, learner.policy.parameters(), strict=True)
    )
    assert all(each.grad is None for each in learner.policy.parameters())


def test_the_first_adam_step_moves_by_the_learning_rate(learner: Learner) -> None:
    """With bias correction the first AdamW step is lr * sign(g) on everything that is not decayed."""
    before = {name: local(p).clone() for name, p in learner.policy.named_parameters()}
    for parameter in learner.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    cfg = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_norm=1e9)
    learner.optimizer = adamw(learner.policy, cfg)
    norm, skipped = apply_gradients(learner, cfg, 0, 10, 0.9, Faults())
    assert skipped == ()
    assert abs(norm - sum(p.numel() for p in before.values()) ** 0.5) < 1e-2
    for name, parameter in learner.policy.named_parameters():
        decayed = before[name] * (1 - 1e-2 * 0.1) if before[name].ndim >= 2 else before[name]
        assert torch.allclose(local(parameter), decayed - 1e-2, atol=1e-6), name


def test_the_ema_moves_by_its_decay(learner: Learner, other_policy: Policy) -> None:
    ema = other_policy
    before = [local(p).double().clone() for p in ema.parameters()]
    move_ema(ema, learner.policy, 0.9)
    for average, old, new in zip(
        ema.parameters(), before, learner.policy.parameters(), strict=True
    ):
        assert torch.allclose(
            local(average).double(), 0.9 * old + 0.1 * local(new).double(), atol=1e-6
        )


@pytest.mark.parametrize(("step", "constant", "linear", "cosine"), [
    (0, 0.25, 0.25, 0.25),
    (3, 1.0, 1.0, 1.0),
    (4, 1.0, 1.0, 1.0),
    (8, 1.0, 0.55, 0.55),
    (11, 1.0, 0.2125, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 7 / 8))),
])  # fmt: skip
def test_learning_rates_by_hand(step: int, constant: float, linear: float, cosine: float) -> None:
    for schedule, expected in (("constant", constant), ("linear", linear), ("cosine", cosine)):
        cfg = OptimizerConfig(lr=1.0, warmup_steps=4, schedule=schedule, final_fraction=0.1)
        assert learning_rate(cfg, step, 12) == pytest.approx(expected, abs=1e-12)


class Constant:
    """A scorer that says the same of every token: ``thought`` after a thought, ``bare`` without one."""

    def __init__(self, thought: float, bare: float) -> None:
        self.thought, self.bare = thought, bare

    def branches(self, pairs):
        return [scores(self.thought, len(branch.ids) - branch.score_start) for _, branch in pairs]

    def trunks(self, spans):
        return [scores(self.bare, stop - start) for _, start, stop in spans]


def scores(logp: float, count: int) -> Scores:
    return Scores(np.full(count, logp, dtype=np.float32), np.zeros(count, dtype=np.int64))


@pytest.mark.parametrize(("scorer", "baseline", "reward"), [
    ("policy", "policy", -1.0 + 3.0),
    ("frozen", "frozen", -0.5 + 4.0),
    ("frozen", "policy", -0.5 + 3.0),
    ("policy", "frozen", -1.0 + 4.0),
    ("frozen", "none", -0.5),
])  # fmt: skip
def test_a_reward_asks_the_scorer_and_the_baseline_it_names(
    learner: Learner, groups: list[Group], scorer: str, baseline: str, reward: float
) -> None:
    """By hand, per token; the gain is the policy's own whatever the reward is."""
    scorers = {"policy": Constant(-1.0, -3.0), "frozen": Constant(-0.5, -4.0)}
    cfg = LikelihoodReward.model_validate({"scorer": scorer, "baseline": baseline})
    found = cfg.build(Kit(scorers, learner.markers, centred=False))(groups)
    assert np.allclose(found.reward_PG, reward, atol=1e-6)
    value, count = found.sums["gain/mean"]
    assert value / count == pytest.approx(2.0, abs=1e-6)
