"""A step that is not finite anywhere is skipped everywhere, said, counted and bounded; later steps are as if it had had
no update.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt import rl_update, train
from rlpt.config import RunConfig
from rlpt.policy.policy import Policy
from rlpt.reward.likelihood import Likelihood
from rlpt.train import run
from rlpt.update import Applied, _drop_gradients
from rlpt_data.strict import load

SHORT = (
    "stage.0.steps=2",
    "stage.1.steps=4",
    "evaluation.prompts=4",
    "evaluation.bits_per_byte_documents=0",
    "evaluation.controls=['empty', 'filler']",
)


@pytest.fixture
def config(toml: Path):
    """A short run in a folder of the given name."""

    def make(name: str, *changes: str) -> RunConfig:
        words = (*SHORT, f"run_dir={toml.parent / name}", *changes)
        return load(RunConfig, toml, words)

    return make


def at_step(monkeypatch, number: int, patch, *rest: int) -> None:
    """``patch`` inside the numbered steps of the run alone."""
    step = train.run_step

    def run_step(session, work, stage, progress):
        with monkeypatch.context() as patched:
            if progress.step + 1 in (number, *rest):
                patch(patched)
            return step(session, work, stage, progress)

    monkeypatch.setattr(train, "run_step", run_step)


def bad_reward(patched, value: float = np.nan) -> None:
    """Of the second rollout of the first group."""
    call = Likelihood.__call__

    def rewarded(self, groups, policy=None):
        found = call(self, groups, policy)
        reward_PG = found.reward_PG.copy()
        reward_PG[0, 1] = value
        return replace(found, reward_PG=reward_PG)

    patched.setattr(Likelihood, "__call__", rewarded)


def bad_loss(patched, value: float = np.inf) -> None:
    backward = Policy.forward

    def forward(self, packed, read):
        found = backward(self, packed, read)
        one = isinstance(found, tuple) and len(found) == 1 and found[0].requires_grad
        return (found[0] * value,) if one else found

    patched.setattr(Policy, "forward", forward)


def bad_gradient(patched) -> None:
    apply = rl_update.apply_gradients

    def applied(learner, *rest):
        next(learner.policy.parameters()).grad[0, 0] = np.nan
        return apply(learner, *rest)

    patched.setattr(rl_update, "apply_gradients", applied)


def no_update(patched) -> None:
    """What a skipped step is to equal."""

    def applied(learner, *rest) -> Applied:
        _drop_gradients(learner)
        return Applied(0.0, ())

    patched.setattr(rl_update, "apply_gradients", applied)


@pytest.fixture(scope="module")
def idle(beside, shards_dir, tmp_path_factory):
    """Weights of a run whose fourth step, the second of reinforcement learning, had no update."""
    folder = tmp_path_factory.mktemp("idle")
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 4, no_update)
        run(load(RunConfig, beside("conftest").write_run(folder, shards_dir), SHORT))
    return folder / "run"


@pytest.mark.parametrize(("patch", "said"), [
    (bad_reward, "the reward of document "),
    (bad_loss, "the loss of document "),
    (bad_gradient, "the gradient of lm.model.embed_tokens.weight is not finite"),
], ids=["reward", "loss", "gradient"])  # fmt: skip
def test_a_run_with_a_skipped_step_is_one_whose_step_had_no_update(
    patch, said: str, runs, config, idle: Path, monkeypatch, capsys
) -> None:
    cfg = config("skips")
    at_step(monkeypatch, 4, patch)
    run(cfg)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1
    assert f"stage rl, step 4: skipped, nothing was trained on: rank 0: {said}" in lines[0]
    expected = runs.weights_of(idle, 6)
    for name, tensor in runs.weights_of(cfg.run_dir, 6).items():
        assert torch.equal(tensor, expected[name]), name
    found, other = runs.steps_of(cfg.run_dir), runs.steps_of(idle)
    assert [row["update/skipped"] for row in found] == [0, 0, 0, 1, 0, 0]
    assert all(np.isfinite(v) for v in found[3].values() if isinstance(v, float))
    for mine, theirs in zip(found[4:], other[4:], strict=True):
        alike = {k: v for k, v in mine.items() if not k.startswith("watch/")}
        assert alike == {k: v for k, v in theirs.items() if not k.startswith("watch/")}
