"""STaR's hint pass: who is asked again, what is shown, and what is trained as if nothing had been shown."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlpt import dist
from rlpt.batch import Wanted, rollout_batch
from rlpt.config import RunConfig
from rlpt.hints import Hint, HintedSupply, failing, right
from rlpt.prompts import Stream
from rlpt.reward.base import Rewarded
from rlpt.rollout.records import unpacked
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt.types import Frame, Group, Prompt, Trunk
from rlpt_data.strict import UserError, load

HINT = Hint((301, 302), (303,))


def kind(group: Group) -> int:
    """Of a document: 0 fails, also with a hint; 1 is right with a hint; 2 is right."""
    return int(group.prompt.key[1][-1], 16) % 3


def reward(groups: Sequence[Group], policy: object = None) -> Rewarded:
    """The second rollout is right where one is."""
    rows = [[0.0, float(kind(g) == 2 or (kind(g) == 1 and g.hinted))] for g in groups]
    return Rewarded(np.array(rows).reshape(-1, 2), {})


def test_a_hint_stands_between_the_context_and_what_opens_the_thought():
    trunk = Trunk("d", "", 0, 0, np.array([1, 2, 3, 4, 5]), np.arange(6), (2,))
    policy_ids = np.array([1, 2, 70, 80])
    prompt = Prompt(trunk, 2, 3, policy_ids, policy_ids, Frame(tail=(70,)))
    shown = HINT(prompt)
    assert shown.policy_ids.tolist() == [1, 2, 301, 302, 3, 4, 5, 303, 70, 80]
    assert shown.score_ids.tolist() == prompt.policy_ids.tolist() == [1, 2, 70, 80]
    assert shown.key == prompt.key


def test_groups_fail_where_nothing_that_counts_is_right():
    reward_PG = np.array([[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    kept_PG = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]], dtype=bool)
    assert failing(Rewarded(reward_PG, {})).tolist() == [True, False, True, False, True]
    masked = Rewarded(reward_PG, {}, kept_PG=kept_PG)
    assert failing(masked).tolist() == [True, False, True, True, False]
    assert right(masked).sum() == 1


def test_what_failed_is_asked_again_and_what_is_right_then_is_trained_after_the_plain_prompt(
    paced, stream: Stream
) -> None:
    asked: list[Prompt] = []

    class Engine(paced.PacedEngine):
        def submit(self, prompts, group_size, purpose, budget=None):
            if purpose == "rollout/rl/hint":
                asked.extend(prompts)
                assert group_size == 2
            return super().submit(prompts, group_size, "rollout/rl", budget)

    made = paced.Run(stream, paced.config(), paced.stage_of(4, 6))
    made.engine = Engine(0, 0)
    stage, world = made.stage, made.world
    made.supply = HintedSupply(
        HINT, reward,
        *(made.engine, stream, paced.CFG, made.cfg, stage, paced.MARKERS, paced.SEED, 20, world),
    )  # fmt: skip
    made.go(0, 6)
    groups = [group for batch in made.trained for group in batch.groups]
    assert {kind(group) for group in groups} == {0, 1, 2}
    for group in groups:
        assert group.hinted == (kind(group) == 1)
        prompt = group.prompt
        assert prompt.policy_ids.tolist() == [*prompt.trunk.ids[: prompt.cut], paced.MARKERS.opener]
    failed = [group.prompt for group in groups if kind(group) < 2]
    assert [each.key for each in asked] == [prompt.key for prompt in failed]
    for shown, prompt in zip(asked, failed, strict=True):
        assert shown.policy_ids.tolist() == HINT(prompt).policy_ids.tolist()
    totals = {
        name: sum(batch.sums[name][0] / batch.sums[name][1] for batch in made.trained)
        for name in ("hint/asked", "hint/right")
    }
    hinted = sum(group.hinted for group in groups)
    assert totals == {"hint/asked": 2 * len(failed), "hint/right": hinted}


def test_hinted_actions_are_trained_and_not_watched(
    paced, stream: Stream, world: dist.World
) -> None:
    """What the engine said of them is of another prompt: no measure of the engine."""
    made = paced.Run(stream, paced.config(), paced.stage_of(3, 1)).go(0, 1)
    first, *others = made.trained[0].groups
    groups = [first, *(Group(g.prompt, g.rollouts, g.budget, hinted=True) for g in others)]
    wanted = Wanted(continuations=False, text=False)
    batch = rollout_batch(groups, paced.MARKERS, world.device, "naive", wanted, version=0)
    mine = sum(rollout.num_actions for rollout in first.rollouts)
    assert batch.watched_R.tolist() == [True] * mine + [False] * (sum(batch.counts) - mine)
    assert batch.current_R.all()


STAR = (
    "stage.0.steps=2",
    "stage.1.steps=2",
    "thought.prediction_tokens=2",
    "stage.1.reward={kind='match'}",
    "stage.1.advantage={baseline='none'}",
    "stage.1.objective={ratio='none', mask='none', aggregate='sequence'}",
    "stage.1.hint={}",
)


@pytest.mark.slow
def test_a_run_with_hints_does_not_mistake_them_for_a_fault_of_its_engine(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the groups are taken to fail, and what comes then to be right; unwatched, they are no difference."""

    def every_other(rewarded: Rewarded) -> np.ndarray:
        return np.arange(len(rewarded.reward_PG)) % 2 == 0

    monkeypatch.setattr("rlpt.hints.failing", every_other)
    monkeypatch.setattr("rlpt.hints.right", lambda rewarded: rewarded.reward_PG >= 0)
    run(load(RunConfig, toml, STAR))
    rows = [r for r in read_journal(toml.parent / "run/metrics.jsonl") if r["stage"] == "rl"]
    assert all(row["hint/asked"] == row["hint/right"] > 0 for row in rows)
    assert all(row["mismatch/rows"] > 0 for row in rows)
    assert max(row["mismatch/max_abs_log_ratio"] for row in rows) < 1e-3
    dump = unpacked((toml.parent / "run/rollouts/step_000003.jsonl.zst").read_bytes(), "dump")
    # Whoever reads such a thought is told what it was made from.
    assert {group["hinted"] for group in dump} == {True, False}


def test_a_hint_does_not_spell_a_marker(toml: Path) -> None:
    with pytest.raises(UserError, match=r"hint\.before: contains '<think>'"):
        run(load(RunConfig, toml, [*STAR, "stage.1.hint={before='<think>'}"]))
