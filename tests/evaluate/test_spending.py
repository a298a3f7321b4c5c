"""What thinking costs, by hand: FLOPs of a two-layer policy, decoding included."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlpt.evaluate.records import Prediction, Record
from rlpt.evaluate.spending import thinking

WIDTH, MLP, LAYERS, VOCABULARY = 8, 16, 2, 10
CONFIG = SimpleNamespace(
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
)
MATRICES = 2 * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
"""FLOPs of a token: queries, keys, values, output and a gated MLP in every layer."""
PAIR = 4 * LAYERS * WIDTH
"""FLOPs of a query and a key: 2 for the score, 2 for the weighted value."""
ROW = 2 * WIDTH * VOCABULARY


def record(prompt, sample: int, thought: list[int], finish: str, predicted=()) -> Record:
    epoch, document, cut = prompt.key
    return Record(
        **{"epoch": epoch, "document": document, "domain": "d", "cut": cut, "sample": sample},
        **{"num_bytes": 2, "continuation_ids": prompt.continuation_ids, "logp": {}, "firsts": {}},
        **{"thought_ids": np.array(thought, dtype=np.int64), "finish": finish, "named_prefix": 0},
        thought_nats=0.0,
        thought_actions=len(thought) + (finish == "closer"),
        prediction=Prediction(tuple(predicted), None, 0.0) if predicted else None,
    )


def reading(context: int) -> int:
    """A context with its opener: every token through the blocks, attention to all, one row of the head."""
    seen = context + 1
    return seen * MATRICES + seen**2 * PAIR + ROW


def decoding(context: int, forwards: int) -> int:
    """One token after the other, each looking at all before it and itself."""
    pairs = sum(context + 1 + k for k in range(1, forwards + 1))
    return forwards * (MATRICES + ROW) + pairs * PAIR


def test_thinking_is_a_context_read_and_every_token_decoded(tiny):
    prompt = tiny.prompt("a", [1, 2, 3], [4])
    closed = record(prompt, 0, [5, 5], "closer")
    cut_off = record(prompt, 1, [5, 5, 5], "budget")
    found = thinking([prompt], [closed, cut_off], CONFIG)
    # Three tokens are sampled in both: two and a closer, or three and a forced one. The first of them comes with the
    # context, so two forwards follow.
    assert found["tokens"] == 6
    assert found["tokens_per_thought"] == 3.0
    assert found["flops"] == reading(3) + 2 * decoding(3, 2)
    assert found["flops_per_thought"] == reading(3) + decoding(3, 2)


def test_an_empty_thought_costs_the_reading_alone(tiny):
    prompts = [tiny.prompt("a", [1, 2, 3], [4]), tiny.prompt("b", [1, 2], [4])]
    records = [record(prompt, 0, [], "budget") for prompt in prompts]
    found = thinking(prompts, records, CONFIG)
    assert found["tokens"] == 0
    assert found["flops"] == reading(3) + reading(2)
    assert found["flops_per_thought"] == pytest.approx((reading(3) + reading(2)) / 2)


def test_a_prediction_is_decoded_behind_its_closer(tiny):
    prompt = tiny.prompt("a", [1, 2, 3], [4])
    found = thinking([prompt], [record(prompt, 0, [5, 5], "closer", [4, 4])], CONFIG)
    # Five tokens, all but the last of which are read: two of the thought, its closer, one of the prediction.
    assert found["tokens"] == 5
    assert found["flops"] == reading(3) + decoding(3, 4)
