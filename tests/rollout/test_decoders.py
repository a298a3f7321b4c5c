"""Thoughts decoded together are the thoughts of one sequence at a time, whatever is shared, copied or left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpt.config import ThoughtConfig
from rlpt.policy import attention
from rlpt.policy.families import TRIED
from rlpt.rollout import trunk_decoder
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import batches
from rlpt.rollout.trunk_decoder import TrunkDecoder
from rlpt.types import Group, Prompt, Trunk, concat

LAYOUTS = ("shared", "naive")
OPENER = 59
THOUGHT = ThoughtConfig(budget_tokens=6)


def assert_alone(bench, groups: list[Group], prompts: list[Prompt], thought: ThoughtConfig) -> None:
    """Every rollout is the one that plain transformers gives, to 5e-6 nats."""
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        for g, got in enumerate(group.rollouts):
            expected = bench.alone(group.prompt, g, "train", thought)
            assert got.ids.tolist() == expected.ids.tolist()
            assert got.action.tolist() == expected.action.tolist()
            assert got.version.tolist() == expected.version.tolist()
            assert (got.thought_len, got.finish) == (expected.thought_len, expected.finish)
            assert np.abs(got.logp - expected.logp).max() < 5e-6


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every decoding step under the layout "shared"."""
    rows: list[int] = []
    extend = TrunkDecoder.extend

    def counted(self: TrunkDecoder, ids_N: torch.Tensor) -> None:
        rows.append(len(ids_N))
        extend(self, ids_N)

    monkeypatch.setattr(TrunkDecoder, "extend", counted)
    return rows


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "shared") for family in TRIED),
        *((f, "naive") for f in ("llama", "mistral", "qwen3")),
    ],
)
def test_a_rollout_is_that_of_its_sequence_alone(family: str, layout: str, bench, forest) -> None:
    groups = generate(bench(family).engine(layout, THOUGHT), forest, 3, "train")
    assert_alone(bench(family), groups, forest, THOUGHT)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.finish for rollout in rollouts} == {"closer", "budget"}
    assert len({rollout.thought_len for rollout in rollouts}) > 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("group_size", "prediction"), [(1, 0), (4, 3), (1, 2)])
def test_predictions_and_single_thoughts(
    layout: str, group_size: int, prediction: int, bench, forest
) -> None:
    thought = ThoughtConfig(budget_tokens=4, prediction_tokens=prediction)
    groups = generate(bench().engine(layout, thought), forest, group_size, "train")
    assert_alone(bench(), groups, forest, thought)
    lengths = {len(rollout.prediction_ids) for group in groups for rollout in group.rollouts}
    assert max(lengths) == prediction


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_with_prefixes_of_all_lengths_share_a_batch(
    layout: str, bench, prompt, trunk
) -> None:
    """A longer prefix, none before the first token, and contexts that a method hides from the policy."""
    first, second = trunk("first", 19), trunk("second", 12)
    hidden, longer = (
        replace(prompt(second, cut), policy_ids=np.array([4, 9, 2, 33, OPENER])) for cut in (8, 3)
    )
    bare = replace(prompt(second, 6), policy_ids=second.ids[:6])
    prompts = [
        prompt(first, 9, [OPENER, 5, 17, 8]), prompt(first, 4), prompt(first, 19, [1, OPENER]), hidden, longer,
        bare, prompt(second, 12), prompt(second, 0), prompt(second, 0, [OPENER, 7]), prompt(first, 9, [OPENER, 6]),
    ]  # fmt: skip
    groups = generate(bench().engine(layout, THOUGHT), prompts, 2, "train")
    assert_alone(bench(), groups, prompts, THOUGHT)


def test_a_prefix_that_all_prompts_have(bench, prompt, trunk) -> None:
    first = trunk("first", 19)
    prompts = [prompt(first, cut, [3, OPENER, 8]) for cut in (2, 9, 14)]
    groups = generate(bench().engine("shared", THOUGHT), prompts, 2, "train")
    assert_alone(bench(), groups, prompts, THOUGHT)


@given(
    documents=st.lists(
        st.tuples(
            st.integers(1, 12),
            st.lists(
                st.tuples(st.integers(0, 12), st.lists(st.integers(0, 58), max_size=3)),
                min_size=1,
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    group_size=st.integers(1, 3),
    batch=st.integers(1, 5),
    prediction=st.integers(0, 2),
)
@settings(max_examples=15, deadline=None)
def test_random_forests(documents, group_size: int, batch: int, prediction: int, bench) -> None:
    thought = ThoughtConfig(budget_tokens=3, prediction_tokens=prediction)
    prompts = []
    for number, (length, cuts) in enumerate(documents):
        ids = np.random.default_rng(number).integers(0, 59, length)
        of = Trunk(f"d{number}", "x", 0, 0, ids, np.arange(length + 1), ())
        for cut, prefix in cuts:
            own = concat(ids[: min(cut, length)], [OPENER], prefix)
            prompts.append(Prompt(of, min(cut, length), 2, own, own))
    engine = bench("qwen3").engine("shared", thought, prompts_per_batch=batch)
    assert_alone(bench("qwen3"), generate(engine, prompts, group_size, "train"), prompts, thought)


def test_no_prompts_are_no_groups(bench, prompt, trunk) -> None:
    engine = bench().engine("shared", THOUGHT)
    assert engine.collect(engine.submit([], 3, "train")) == []
    tickets = engine.submit([prompt(trunk("first", 9), 4)], 2, "train")
    assert [len(group.rollouts) for group in engine.collect(tickets)] == [2]
    with pytest.raises(KeyError):
        engine.collect(tickets)


def test_a_cache_that_grows_keeps_what_it_has(
    bench, forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_decoder, "ROOM", 2)
    thought = ThoughtConfig(budget_tokens=12)
    groups = generate(bench().engine("shared", thought), forest, 3, "train")
    assert max(r.thought_len for group in groups for r in group.rollouts) > 8
    assert_alone(bench(), groups, forest, thought)


def test_attention_by_plain_scores_samples_the_same(
    bench, forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decodes on other devices than a CPU."""
    monkeypatch.setattr(trunk_decoder, "stretch", attention._by_scores)
    groups = generate(bench("qwen3").engine("shared", THOUGHT), forest, 2, "train")
    assert_alone(bench("qwen3"), groups, forest, THOUGHT)


def test_a_trunk_is_computed_once_for_all_its_cuts(bench, forest) -> None:
    engine = bench().engine("shared", THOUGHT)
    seen: list[int] = []
    engine.lm.model.embed_tokens.register_forward_hook(
        lambda _module, given, _out: seen.append(given[0].numel())
    )
    generate(engine, forest, 3, "train")
    # The last cuts of four documents, and an opener for each of seven prompts.
    assert seen[0] == (19 + 10 + 24 + 7) + 7
    assert all(count <= 3 * len(forest) for count in seen[1:])


def test_the_thoughts_of_a_document_read_one_cache(bench, forest) -> None:
    decoder = TrunkDecoder(bench().engine("shared", THOUGHT).lm, forest, 3, torch.device("cpu"))
    for layer in decoder.layers:
        for side in (0, 1):
            parts = [part[side] for parts in layer.shared_P for part in parts]
            assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
            assert [part.shape[2] for part in parts] == [p.cut for p in forest]
            assert layer.own[side].shape[:3] == (3 * len(forest), 2, 1)


def test_rows_that_ended_leave_once_they_are_half(bench, forest, extended: list[int]) -> None:
    thought = ThoughtConfig(budget_tokens=20)
    groups = generate(bench().engine("shared", thought), forest, 4, "train")
    assert_alone(bench(), groups, forest, thought)
    lengths = np.array([len(rollout.ids) for group in groups for rollout in group.rollouts])
    expected, decoded = [], len(lengths)
    for position in range(1, lengths.max()):
        left = int((lengths > position).sum())
        decoded = left if 2 * left <= decoded else decoded
        expected.append(decoded)
    assert extended == expected
    assert expected[-1] < len(lengths) / 4


def test_a_sliding_window_that_a_thought_would_outgrow_is_refused(bench, trunk, prompt) -> None:
    engine = bench("mistral", sliding_window=12).engine("shared", ThoughtConfig(budget_tokens=20))
    with pytest.raises(ValueError, match=r"sliding window of 12 tokens is shorter than .* 13"):
        generate(engine, [prompt(trunk("first", 10), 10)], 8, "train")


def test_batches_by_hand(prompt, trunk) -> None:
    a, b, c, d = (trunk(name, 9) for name in "abcd")
    prompts = [prompt(of, 4) for of in (a, b, a, c, b, d, d, d, d, d)]
    assert batches(prompts, 4) == [[0, 2, 1, 4], [3], [5, 6, 7, 8], [9]]
    assert batches(prompts, 3) == [[0, 2], [1, 4, 3], [5, 6, 7], [8, 9]]
    assert batches(prompts, 1) == [[i] for i in (0, 2, 1, 4, 3, 5, 6, 7, 8, 9)]
    assert batches(prompts, 99) == [[0, 2, 1, 4, 3, 5, 6, 7, 8, 9]]
    assert batches([], 4) == []


def test_an_engine_reads_no_more_than_its_batch(bench, forest) -> None:
    together, apart = (
        generate(bench().engine("shared", THOUGHT, size), forest, 2, "train") for size in (32, 2)
    )
    for one, other in zip(together, apart, strict=True):
        assert one.prompt is other.prompt
        for a, b in zip(one.rollouts, other.rollouts, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert np.abs(a.logp - b.logp).max() < 5e-6


def test_engines_leave_the_configuration_alone(bench) -> None:
    made = bench("llama", num_hidden_layers=1)
    before = made.config._attn_implementation
    shared, naive = (made.engine(layout, THOUGHT) for layout in LAYOUTS)
    assert (made.config._attn_implementation, naive.lm.config._attn_implementation) == (
        before,
        "sdpa",
    )
    assert shared.lm.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shorter_budget_is_the_beginning_of_the_same_thought(layout: str, bench, forest) -> None:
    engine = bench().engine(layout, THOUGHT)
    asked = [engine.submit(forest, 3, "train", budget) for budget in (2, None, 6)]
    # Collected together: groups of one call may have different budgets.
    groups, count = engine.collect([ticket for tickets in asked for ticket in tickets]), len(forest)
    short, whole, same = (groups[i * count : (i + 1) * count] for i in range(3))
    assert [{group.budget for group in groups} for groups in (short, whole, same)] == [
        {2},
        {6},
        {6},
    ]
    for one, other, third in zip(short, whole, same, strict=True):
        for cut_off, full, again in zip(one.rollouts, other.rollouts, third.rollouts, strict=True):
            assert again.ids.tolist() == full.ids.tolist()
            assert cut_off.thought_len == min(2, full.thought_len)
            assert cut_off.thought_ids.tolist() == full.thought_ids[:2].tolist()
            closed = full.finish == "closer" and full.thought_len < 2
            assert cut_off.finish == ("closer" if closed else "budget")
