"""float16: losses are scaled, gradients are those of float32, and a step that overflows changes nothing."""

import numpy as np
import pytest
import torch

from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig, ThoughtConfig
from rlpt.credit import Credit, Credited
from rlpt.faults import Faults
from rlpt.optim import adamw
from rlpt.policy import load
from rlpt.policy.load import local
from rlpt.prompts import prompt_stream, prompts_of, trunk
from rlpt.rl_update import _Update
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import OptimizerConfig, RLStage
from rlpt.update import Learner, LossScale, apply_gradients

CFG = PromptConfig(context_tokens=20, min_context_tokens=6, horizon_tokens=4)
STAGE = RLStage(name="rl", kind="rl", steps=4, documents_per_step=6, group_size=3)
HALF = PolicyConfig(
    fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1),
    compute_dtype="float16",
)


@pytest.fixture
def groups(policy, plan, shards, world):
    stream = prompt_stream(shards.split("train"), CFG, 0, "train")
    markers = plan.vocabulary.markers
    trunks = [trunk(d, e, CFG, 0) for e, d in stream.take(0, 6, 0, 1)]
    prompts = [p for each in trunks for p in prompts_of(each, CFG, markers)]
    thought = ThoughtConfig(budget_tokens=4)
    engine = TransformersEngine(plan.config, plan.layout, markers, thought, 0, 32, world.device)
    sync.publish(policy, engine, 0)
    return generate(engine, prompts, 3, "train")


def learner_of(policy, plan, world, scale: LossScale) -> Learner:
    optimizer = adamw(policy, OptimizerConfig())
    return Learner(policy, optimizer, None, plan.vocabulary.markers, world, 0, 1.0, scale)


def accumulated(learner: Learner, groups, size: float) -> dict[str, torch.Tensor]:
    """Gradients of one step, advantages of the given size, divided by the scale of the loss."""
    advantage_PG = size * np.random.default_rng(0).normal(size=(len(groups), 3))
    update = _Update(learner, groups, STAGE, Credit(STAGE, learner.world, 0, step=0), 0)
    credited = Credited(advantage_PG, update.credit.weights(groups))
    for part in update.parts(continuations=False):
        update._backward(part, False, lambda _readout, _batch, part=part: credited.part(part))
    named = learner.policy.named_parameters()
    return {n: local(p.grad).clone() / learner.scale.value for n, p in named if p.grad is not None}


def test_gradients_survive_float16_only_where_the_loss_is_scaled(
    policy, plan, world, groups
) -> None:
    """With advantages of 1e-4 most of the gradient lies below float16's smallest number."""
    exact = accumulated(learner_of(policy, plan, world, LossScale("float32")), groups, 1e-4)
    errors = {}
    for dtype in ("float16", "float32"):
        half = load.load(HALF, plan, world, seed=0)
        found = accumulated(learner_of(half, plan, world, LossScale(dtype)), groups, 1e-4)
        errors[dtype] = max(
            float(torch.linalg.vector_norm(found[n] - g) / torch.linalg.vector_norm(g))
            for n, g in exact.items()
        )
    assert errors["float16"] < 0.02
    assert errors["float32"] > 0.1


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(policy, plan, world) -> None:
    learner = learner_of(policy, plan, world, LossScale("float16"))
    before = [local(p).clone() for p in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert apply_gradients(learner, STAGE.optimizer, 0, 4, 0.9, Faults()) == (0.0, ())
    assert learner.scale.value == LossScale.FIRST / 2
    assert all(torch.equal(local(p), b) for p, b in zip(policy.parameters(), before, strict=True))


def test_a_scale_of_one_is_no_remedy(policy, plan, world) -> None:
    scale = LossScale("float16")
    scale.state[0] = 1.0
    learner = learner_of(policy, plan, world, scale)
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    norm, skipped = apply_gradients(learner, STAGE.optimizer, 0, 4, 0.9, Faults())
    assert np.isnan(norm)
    assert "the gradient of lm.model.embed_tokens.weight is not finite" in skipped[0]
    assert scale.value == 1.0


def test_a_fault_elsewhere_does_not_move_the_scale(policy, plan, world) -> None:
    learner = learner_of(policy, plan, world, LossScale("float16"))
    before = [local(p).clone() for p in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    applied = apply_gradients(learner, STAGE.optimizer, 0, 4, 0.9, Faults(["the loss is nan"]))
    assert applied.skipped == ("rank 0: the loss is nan",)
    assert learner.scale.value == LossScale.FIRST
    assert all(torch.equal(local(p), b) for p, b in zip(policy.parameters(), before, strict=True))


def test_the_norm_is_that_of_the_unscaled_gradient(policy, plan, world, groups) -> None:
    plain = learner_of(policy, plan, world, LossScale("float32"))
    size = sum(float(g.square().sum()) for g in accumulated(plain, groups, 1.0).values()) ** 0.5
    policy.zero_grad()
    scaled = learner_of(policy, plan, world, LossScale("float16"))
    accumulated(scaled, groups, 1.0)
    norm, _ = apply_gradients(scaled, STAGE.optimizer, 0, 4, 0.9, Faults())
    assert norm == pytest.approx(size, rel=1e-4)


def test_a_scale_doubles_after_enough_good_steps() -> None:
    scale = LossScale("float16")
    for _ in range(LossScale.PATIENCE - 1):
        scale.good()
    assert scale.value == LossScale.FIRST
    scale.good()
    assert scale.value == 2 * LossScale.FIRST
    fixed = LossScale("bfloat16")
    fixed.good()
    assert fixed.value == 1.0
    assert not fixed.overflowed()
