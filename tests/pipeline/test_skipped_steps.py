"""A step that is not finite anywhere is skipped everywhere, said, counted and bounded; later steps are as if it had had
no update.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt import alarms, rl_update, train, update
from rlpt.config import RunConfig
from rlpt.exits import FaultError
from rlpt.policy.policy import Policy
from rlpt.reward.likelihood import Likelihood
from rlpt.supply import Supply
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


def bad_text(patched) -> None:
    """The loss of a next-token step."""
    loss = update.next_token_loss
    patched.setattr(update, "next_token_loss", lambda *rows: loss(*rows) * np.nan)


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


@pytest.mark.slow
def test_a_next_token_step_is_skipped_alike(runs, config, monkeypatch, capsys) -> None:
    """Its second step; the weights after it are those of its first."""
    cfg = config("text", "stage.0.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9")
    at_step(monkeypatch, 2, bad_text)
    run(cfg)
    assert "stage warmup, step 2: skipped, nothing was trained on" in capsys.readouterr().err
    first, second, third = (runs.weights_of(cfg.run_dir, step) for step in (1, 2, 3))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, third[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_rewards_alone_are_counted_alike(config, monkeypatch, capsys) -> None:
    """With rollout.train = false nothing is trained on any step."""
    cfg = config("scored", "rollout.train=false", "rollout.save_groups=true")
    at_step(monkeypatch, 4, bad_reward)
    run(cfg)
    assert capsys.readouterr().err.count("rollout 1 is nan") == 1


@pytest.mark.slow
def test_the_fourth_step_in_a_row_ends_the_run_and_a_higher_limit_lets_it_go_on(
    runs, config, monkeypatch
) -> None:
    changes = ("stage.1.steps=6", "checkpoint.every=1", "checkpoint.keep_last=9")
    cfg = config("ends", *changes)
    at_step(monkeypatch, 3, bad_reward, 4, 5, 6)
    rated = []
    monkeypatch.setattr(Supply, "rated", lambda *known: rated.append(known))
    with pytest.raises(FaultError, match=r"step 6: watch/skipped_in_a_row = 4 exceeds .* = 3; "):
        run(cfg)
    assert [row["update/skipped"] for row in runs.steps_of(cfg.run_dir)] == [0, 0, 1, 1, 1, 1]
    assert rated == []
    # It goes on behind the checkpoint of its last step but one, and remembers three.
    with pytest.raises(FaultError, match="step 6: watch/skipped_in_a_row = 4 exceeds"):
        run(cfg)
    run(config("ends", *changes, "guards.nonfinite_in_a_row=4"))
    found = [row["watch/skipped_in_a_row"] for row in runs.steps_of(cfg.run_dir)]
    assert found == [0, 0, 1, 2, 3, 4, 0, 0]
    assert len(rated) == 2


@pytest.mark.slow
def test_a_run_that_was_cut_off_writes_the_alarms_of_one_that_was_not(
    runs, config, monkeypatch
) -> None:
    """Norms, lengths, skipped steps and the evaluation before the cut count after it."""
    changes = ("stage.0.steps=22", "checkpoint.every=11", "stage.0.documents_per_step=2")
    for name in ("LEAST_NORMS", "WINDOW"):
        monkeypatch.setattr(alarms, name, 5)
    at_step(monkeypatch, 9, bad_text)
    at_step(monkeypatch, 23, bad_reward)
    whole, cut = config("whole", *changes), config("cut", *changes)
    run(whole)
    runs.cut_off_and_resumed(cut, 11, monkeypatch)
    expected = runs.steps_of(whole.run_dir)
    assert runs.steps_of(cut.run_dir) == expected
    assert expected[11]["watch/skipped_share"] == 0.01
    assert "watch/grad_norm" in expected[11]
    assert "watch/control_gain" in expected[-1]


@pytest.mark.slow
@pytest.mark.parametrize("patch", [bad_gradient, bad_loss], ids=["gradient", "value_loss"])
def test_a_skipped_step_leaves_the_critic_alone(patch, runs, config, monkeypatch, capsys) -> None:
    changes = ("stage.1.objective={mask='clip', critic={}}", "stage.1.advantage={baseline='none'}")
    states = []

    def kept(patched) -> None:
        apply = rl_update.apply_gradients

        def applied(learner, *rest):
            before = critic_state(learner)
            found = apply(learner, *rest)
            states.append((before, critic_state(learner), found.skipped))
            return found

        patched.setattr(rl_update, "apply_gradients", applied)

    def both(patched) -> None:
        kept(patched)
        patch(patched)

    at_step(monkeypatch, 5, both)
    run(config("critic", *changes))
    ((before, after, skipped),) = states
    assert skipped
    assert before == after


def critic_state(learner) -> bytes:
    """Head, moments and step count."""
    critic = learner.critic
    moments = [value for each in critic.optimizer.state.values() for value in each.values()]
    tensors = [each.detach().double().flatten() for each in (*critic.parameters(), *moments)]
    return torch.cat(tensors).numpy().tobytes()


@pytest.mark.slow
def test_a_critics_own_gradient_counts(config, monkeypatch, capsys) -> None:
    def bad(patched) -> None:
        apply = rl_update.apply_gradients

        def applied(learner, *rest):
            next(learner.critic.parameters()).grad[0, 0] = np.inf
            return apply(learner, *rest)

        patched.setattr(rl_update, "apply_gradients", applied)

    at_step(monkeypatch, 4, bad)
    changes = ("stage.1.objective={mask='clip', critic={}}", "stage.1.advantage={baseline='none'}")
    run(config("own", *changes))
    said = capsys.readouterr().err
    assert "rank 0: the gradient of the critic is not finite" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_one_rank_finds_two_skip(runs, toml: Path) -> None:
    """Reward, loss and gradient of rank 1; weights, moments and EMA go on as if the step had had no update."""
    script = Path(__file__).with_name("skips_on_ranks.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(toml), *SHORT],
        **{"env": os.environ | runs.ENVIRONMENT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "step 4: skipped" in line]
    # Gradients are summed before anyone sees them: the rank of these is that of the shard.
    for line, what in zip(said, ("the reward of", "the loss of", "the gradient of"), strict=True):
        assert f"nothing was trained on: rank 1: {what}" in line
    expected = runs.weights_of(toml.parent / "idle", 6)
    for name in ("reward", "loss", "gradient"):
        assert runs.steps_of(toml.parent / name)[3]["update/skipped"] == 1.0
        for key, tensor in runs.weights_of(toml.parent / name, 6).items():
            assert torch.equal(tensor, expected[key]), (name, key)
