"""Messages between trainers and engines: what a rollout is made of, and that nothing unknown gets through."""

import numpy as np
import pytest
from pydantic import ValidationError

from rlpt.rollout import wire
from rlpt.rollout.wire import Collect, EngineSpec, Finished, Job, Publish, Sampled, Span

CLOSER = 60


def sampled(thought, prediction=(), spans=((7, None),)) -> Sampled:
    """``spans``: (version, its last token + 1); None is the end."""
    count = len(thought) + len(prediction)
    ends = [count if stop is None else stop for _, stop in spans]
    return Sampled(
        thought=tuple(thought),
        thought_logp=tuple(-0.5 - i for i in range(len(thought))),
        prediction=tuple(prediction),
        prediction_logp=tuple(-10.5 - i for i in range(len(prediction))),
        spans=tuple(
            Span(version=version, start=start, stop=stop)
            for (version, _), start, stop in zip(spans, [0, *ends], ends, strict=False)
        ),
    )


def columns(rollout) -> tuple:
    return (
        rollout.ids.tolist(), rollout.action.tolist(), rollout.logp.tolist(),
        rollout.version.tolist(), rollout.thought_len, rollout.finish,
    )  # fmt: skip


def test_a_sampled_closer_is_an_action_with_its_own_log_probability() -> None:
    found = wire.rollout(sampled([5, 6, CLOSER]), CLOSER)
    expected = ([5, 6, CLOSER], [True] * 3, [-0.5, -1.5, -2.5], [7] * 3, 2, "closer")
    assert columns(found) == expected
    assert found.thought_ids.tolist() == [5, 6]


def test_a_forced_closer_is_no_action_and_has_the_version_of_the_token_before_it() -> None:
    found = wire.rollout(sampled([5, 6], spans=((7, 1), (9, None))), CLOSER)
    assert columns(found) == (
        [5, 6, CLOSER], [True, True, False], [-0.5, -1.5, 0.0], [7, 9, 9], 2, "budget",
    )  # fmt: skip


def test_a_thought_that_is_nothing_but_a_closer_is_empty() -> None:
    found = wire.rollout(sampled([CLOSER]), CLOSER)
    assert columns(found) == ([CLOSER], [True], [-0.5], [7], 0, "closer")


@pytest.mark.parametrize(
    ("thought", "action", "version", "finish"),
    [
        # Spans count sampled tokens: the forced closer is not among them.
        ([5, 6], [True, True, False, True, True], [3, 4, 4, 4, 5], "budget"),
        ([5, CLOSER], [True, True, True, True], [3, 4, 4, 5], "closer"),
    ],
)
def test_a_prediction_follows_the_closer_and_versions_follow_the_spans(
    thought, action, version, finish
) -> None:
    given = sampled(thought, [8, 9], spans=((3, 1), (4, 3), (5, None)))
    found = wire.rollout(given, CLOSER)
    assert found.ids.tolist() == [
        *thought, *([] if finish == "closer" else [CLOSER]), 8, 9,
    ]  # fmt: skip
    assert (found.action.tolist(), found.version.tolist()) == (action, version)
    assert found.prediction_ids.tolist() == [8, 9]
    assert found.logp[found.action].tolist() == [-0.5, -1.5, -10.5, -11.5]
    assert found.logp[~found.action].tolist() == [0.0] * (finish == "budget")


def test_arrays_have_the_types_of_the_pipeline() -> None:
    found = wire.rollout(sampled([5]), CLOSER)
    kinds = [x.dtype for x in (found.ids, found.action, found.logp, found.version)]
    assert kinds == [np.int64, np.bool_, np.float32, np.int64]


@pytest.mark.parametrize("key", [-1, -(2**63), 2**63 - 1, 12345])
def test_a_job_reads_the_policys_ids_and_leaves_room_above_its_seed(prompt, trunk, key) -> None:
    asked = prompt(trunk("text", 12), 7)
    job = wire.job("t", asked, 3, key, 5, 2)
    assert job.ids == tuple(asked.policy_ids.tolist())
    assert (job.ticket, job.count, job.budget, job.prediction) == ("t", 3, 5, 2)
    # Rollouts take seed + g, predictions 2**61 more: all are seeds of 64 signed bits.
    assert 0 <= job.seed < 2**62
    assert job.seed % 2**62 == key % 2**62


@pytest.mark.parametrize(
    "message",
    [
        Job(ticket="t", ids=(1,), count=1, seed=0, budget=1),
        Collect(client="c"),
        Publish(version=1, transport="directory"),
        sampled([1]),
        Finished(ticket="t", rollouts=(sampled([1, CLOSER]),)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_json_and_refuse_an_unknown_key(message) -> None:
    kind = type(message)
    assert kind.model_validate_json(message.model_dump_json()) == message
    with pytest.raises(ValidationError, match=r"surprise\s+Extra inputs are not permitted"):
        kind.model_validate(message.model_dump() | {"surprise": 1})


@pytest.mark.parametrize(
    ("key", "value"), [("count", 0), ("count", "2"), ("seed", -1), ("budget", 0), ("ids", ["5"])]
)
def test_a_job_of_wrong_numbers_is_refused(key, value) -> None:
    table = {"ticket": "t", "ids": [1], "count": 1, "seed": 0, "budget": 1}
    with pytest.raises(ValidationError, match=key):
        Job.model_validate(table | {key: value})


def test_checksums_of_64_bits_survive_json() -> None:
    tensor = wire.Tensor(name="w", shape=(2,), checksum=2**64 - 1)
    assert wire.Tensor.model_validate_json(tensor.model_dump_json()).checksum == 2**64 - 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "Qwen3ForCausalLM"), ("vocabulary", 98), ("tokenizer", "beef"),
        ("opener", 94), ("closer", 94), ("dtype", "bfloat16"), ("temperature", 0.5),
    ],
)  # fmt: skip
def test_engines_differ_in_what_samples_depend_on(fake, key, value) -> None:
    mine = fake.specification()
    other = fake.specification(**{key: value})
    assert mine.differs(other) == f"{key} {value!r} instead of {getattr(mine, key)!r}"


def test_engines_may_differ_in_the_rest_and_have_more_room(fake) -> None:
    mine: EngineSpec = fake.specification()
    other = fake.specification(
        model="elsewhere", longest=65, max_sequences=3, seed=9, kv_cache_gib=2.0
    )
    assert mine.differs(mine) is None
    assert mine.differs(other) is None
    assert other.differs(mine) == "room for paths of 64 tokens instead of 65"


@pytest.mark.parametrize(
    "change",
    [
        {"thought_logp": (-0.5,)},
        {"prediction": (4,)},
        {"thought": (-1, 6)},
        {"thought": (2**60, 6)},
        {"thought": (), "thought_logp": (), "spans": ()},
        {"spans": ()},
        {"spans": (Span(version=7, start=0, stop=1),)},
        {"spans": (Span(version=7, start=0, stop=2**40),)},
        {"spans": (Span(version=7, start=2, stop=0),)},
        {"spans": (Span(version=7, start=1, stop=2), Span(version=7, start=0, stop=1))},
        {"spans": (Span(version=2**70, start=0, stop=2),)},
        {"spans": (Span(version=-2, start=0, stop=2),)},
    ],
    ids=range(12),
)
def test_a_rollout_whose_parts_do_not_belong_together_is_no_message(change: dict) -> None:
    good = {
        "thought": (5, 6), "thought_logp": (-0.5, -1.5), "spans": (Span(version=7, start=0, stop=2),),
    }  # fmt: skip
    assert Sampled(**good).thought == (5, 6)
    with pytest.raises(ValueError, match="Sampled"):
        Sampled(**(good | change))
