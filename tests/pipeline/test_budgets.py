"""The step's budget goes out with every request, is kept with what was sampled, and comes back from a checkpoint."""

import pytest

from rlpt.config import RunConfig
from rlpt.curriculum import DecayingBudget
from rlpt.prompts import Stream
from rlpt.stages import RLStage
from rlpt_data.strict import UserError, parse


class _Asked:
    """The budget of every request, beside the engine that gets it."""

    def __init__(self, engine) -> None:
        self.found: list[tuple[int, int | None]] = []
        submit = engine.submit

        def noted(prompts, group_size, purpose, budget=None):
            self.found += [(engine.version, budget)] * len(prompts)
            return submit(prompts, group_size, purpose, budget)

        engine.submit = noted


def _stage(paced) -> RLStage:
    budget = DecayingBudget(kind="decay", start=64, gamma=1 / 32)
    return paced.stage_of(2, 6).model_copy(update={"budget": budget})


def test_thoughts_are_asked_for_within_the_budget_of_the_step(paced, stream: Stream) -> None:
    run = paced.Run(stream, paced.config(), _stage(paced))
    asked = _Asked(run.engine)
    run.go(0, 6)
    # 64 x 2^(-5 t / 6)
    expected = {0: 64, 1: 35, 2: 20, 3: 11, 4: 6, 5: 3}
    assert asked.found
    assert all(budget == expected[version] for version, budget in asked.found)
    assert {version for version, _ in asked.found} == set(expected)
    none = paced.Run(stream, paced.config(), paced.stage_of(2, 6))
    asked = _Asked(none.engine)
    none.go(0, 2)
    assert {budget for _, budget in asked.found} == {None}


def test_what_waits_is_asked_for_again_within_the_budget_it_had(paced, stream: Stream) -> None:
    """Sampled two steps ahead, cut off after the third step, and taken up again."""
    cfg = paced.config(max_staleness=9, ahead=2)
    whole = paced.Run(stream, cfg, _stage(paced)).go(0, 3)
    waiting = [(lot.position, lot.budget) for lot in whole.supply.waiting]
    assert len({budget for _, budget in waiting}) == 2
    resumed = paced.Run(stream, cfg, _stage(paced))
    asked = _Asked(resumed.engine)
    resumed.supply.restore(whole.rows(), whole.supply.next, "test")
    assert [(lot.position, lot.budget) for lot in resumed.supply.waiting] == waiting
    sizes = {lot.position: len(lot.prompts) for lot in resumed.supply.waiting}
    assert [b for _, b in asked.found] == [b for p, b in waiting for _ in range(sizes[p])]


def test_a_budget_above_the_longest_thought_is_refused() -> None:
    stage = {
        "kind": "rl", "name": "rl", "steps": 2, "documents_per_step": 2,
        "budget": {"kind": "decay", "start": 17},
    }  # fmt: skip
    table = {"run_dir": "r", "data": {"shards": "s"}, "policy": {"fresh": {}}, "stage": [stage]}
    with pytest.raises(UserError, match=r"budget.start = 17 exceeds thought.budget_tokens = 16"):
        parse(RunConfig, table, "run.toml")
