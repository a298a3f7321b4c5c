"""Predictions in an evaluation: matched as RPT has it, voted on by their first token, counted k of n."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.evaluate.continuation import measure
from rlpt.evaluate.plain import plain, restored
from rlpt.evaluate.predictions import first_of_answer, prediction
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.summary import summarise
from rlpt.types import Frame, Group, Rollout, concat

RESAMPLING = Resampling("document", draws=20, seed=1)
BYTES = [b"a", b"b", b"ab", b"[", b"]", b"a]", b"", b""]


def rollout(tiny, thought, said):
    """A thought, its closer, a prediction and the closer that ends it."""
    ids = concat(thought, [tiny.markers.closer], said, [tiny.markers.closer])
    size = len(ids)
    return Rollout(
        ids,
        np.ones(size, bool),
        np.zeros(size, np.float32),
        np.zeros(size, int),
        len(thought),
        "closer",
    )


@pytest.mark.parametrize(
    ("said", "first", "match"),
    [
        ([0, 1], 0, 1.0),
        ([0], 0, 1.0),
        ([2], 2, 1.0),
        ([1], 1, 0.0),
        ([], None, 0.0),
        ([0, 1, 2, 0], 0, 0.0),
    ],
)
def test_a_prediction_is_compared_by_its_bytes_at_token_boundaries(tiny, said, first, match):
    """The text goes on a, b, ab."""
    prompt = tiny.prompt("d", [1, 1], [0, 1, 2])
    group = Group(prompt, (rollout(tiny, [3], said),))
    found = prediction(group, 0, tiny.markers.closer, BYTES)
    assert (found.ids, found.first, found.match) == (tuple(said), first, match)


def test_where_no_prediction_is_asked_for_there_is_none(tiny):
    group = Group(tiny.prompt("d", [1], [0]), (rollout(tiny, [3], [0]),))
    assert prediction(group, 0, tiny.markers.closer, ()) is None


@pytest.mark.parametrize(
    ("ids", "first"),
    [([1, 3, 0, 1, 4], 0), ([3, 4], None), ([3, 0, 1], None), ([3, 1, 4, 3, 0, 4], 0), ([3, 5], 5)],
)
def test_in_a_chat_the_vote_is_the_first_token_inside_the_last_whole_marks(ids, first):
    assert first_of_answer(ids, (b"[", b"]"), BYTES) == first


def test_a_marked_answer_is_what_is_compared(tiny):
    prompt = tiny.prompt("d", [1, 1], [0, 1])
    chat = replace(prompt, frame=Frame(answer=(b"[", b"]")))
    group = Group(chat, (rollout(tiny, [3], [1, 3, 0, 4]),))
    found = prediction(group, 0, tiny.markers.closer, BYTES)
    assert (found.first, found.match) == (0, 1.0)


@pytest.fixture
def records(tiny, procedure, world):
    """Four thoughts that predict 0, 1, 0 and nothing, where the text goes on 0; greedily 0."""
    engine, said = tiny.engine(), [[0], [1], [0], []]
    engine._rollout = lambda prompt, purpose, sample: rollout(
        tiny, [3], [0] if purpose == "greedy" else said[sample]
    )
    asked = replace(procedure, thoughts=4, controls=(), token_bytes=BYTES, greedy=True)
    prompts = [tiny.prompt(f"d{i}", [1, 1], [0, 5]) for i in range(3)]
    return measure(tiny.scorer(), engine, prompts, asked, world)


def test_predictions_are_counted_beside_the_likeliest_token(records):
    table = summarise(records, [], RESAMPLING)
    assert table["prediction_match"]["mean"] == 0.5
    assert table["prediction_match_greedy"]["mean"] == 1.0
    # After every thought 3 is likeliest, and it is wrong; what they predict is voted on, and right.
    assert table["next_token_accuracy_thought"] == 0.0
    assert table["next_token_accuracy_majority"]["mean"] == 1.0
    at_k = table["at_k"]
    assert [at_k[k]["mean_prediction"]["mean"] for k in ("1", "2", "4")] == [0.5] * 3
    assert [at_k[k]["pass_prediction"]["mean"] for k in ("1", "2", "4")] == pytest.approx(
        [0.5, 1 - 1 / 6, 1.0]
    )


def test_what_was_predicted_is_kept_on_disk(records):
    again = restored(plain(records))
    assert [r.prediction for r in again] == [r.prediction for r in records]
    assert [r.greedy for r in again] == [r.greedy for r in records]
    assert [r.firsts for r in again] == [r.firsts for r in records]
    assert again[3].prediction.first is None
    assert summarise(again, [], RESAMPLING) == summarise(records, [], RESAMPLING)
