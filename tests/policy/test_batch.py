"""Micro-batches: whole documents in a budget, costs as packed, rows that are the tokens they are named for."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpt import batch, dist
from rlpt.batch import (
    Wanted,
    document_cost,
    documents,
    padded_costs,
    per_action,
    rollout_batch,
    split_evenly,
    split_padded,
)
from rlpt.policy.scoring import batches
from rlpt.types import Group, Markers, Prompt, Rollout, Trunk, concat

CPU = torch.device("cpu")
ALONE = dist.World(0, 1, CPU)
MARKERS = Markers(opener=1, closer=2)
LAYOUTS = ("shared", "naive")


def split(costs: list[int], budget: int, others: int = 0) -> list[list[int]]:
    """`split_evenly` beside a rank that needs ``others`` micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.dist, "largest", lambda value, _world: max(value, others))
        return split_evenly(costs, budget, ALONE)


COSTS = st.lists(st.integers(1, 50), max_size=12)


@given(one=COSTS, other=COSTS, budget=st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_a_step_is_split_within_its_budget_and_alike_on_all_ranks(
    one: list[int], other: list[int], budget: int
) -> None:
    needed = max(len(split(costs, budget)) for costs in (one, other))
    for costs in (one, other):
        bins = split(costs, budget, needed)
        assert len(bins) == needed
        assert sorted(i for each in bins for i in each) == list(range(len(costs)))
        assert all(sum(costs[i] for i in each) <= budget or len(each) == 1 for each in bins)
        assert sum(map(bool, bins)) == min(needed, len(costs))
        assert all(each == sorted(each) for each in bins)


@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=7), budget=st.integers(20, 70))
@settings(max_examples=60, deadline=None)
def test_no_bin_is_much_fuller_than_the_best_split_has_it(costs: list[int], budget: int) -> None:
    """Graham 1969: at most 4/3 - 1 / (3 bins) of the best, found here by trying all."""
    bins = split(costs, budget)
    count, fullest = len(bins), max(sum(costs[i] for i in each) for each in bins)
    assert count >= -(-sum(costs) // budget)
    if count <= 3:
        places = product(range(count), repeat=len(costs))
        best = min(max(np.bincount(each, weights=costs)) for each in places)
        assert fullest <= (4 / 3 - 1 / (3 * count)) * best + 1e-9


def test_a_split_by_hand() -> None:
    # 50 tokens in bins of 20 need three: 9 + 6, 9 + 6 and 7 + 7 + 6.
    assert split([6, 9, 7, 6, 9, 7, 6], 20) == [[0, 1], [3, 4], [2, 5, 6]]
    # 30 tokens would fit two bins of 15, but no two of these do.
    assert split([10, 10, 10], 15) == [[0], [1], [2]]
    # A document beyond the budget has a bin to itself, and the others fill bins as before.
    assert split([40, 3, 4], 10) == [[0], [2], [1]]
    # Another rank needs four: none of these is empty; a rank without documents has nothing but empty ones.
    assert split([3, 1, 2, 2], 10) == [[0, 1, 2, 3]]
    assert split([3, 1, 2, 2], 10, others=4) == [[0], [2], [3], [1]]
    assert split([], 10, others=2) == [[], []]


def rollout(ids: list[int], forced: bool) -> Rollout:
    action = np.array([True] * (len(ids) - 1) + [not forced])
    logp = np.where(action, -0.5 * np.arange(1, len(ids) + 1), 0.0).astype(np.float32)
    version = np.zeros(len(ids), dtype=np.int64)
    return Rollout(
        np.array(ids), action, logp, version, len(ids) - 1, "budget" if forced else "closer"
    )


def document(first: int, size: int) -> Trunk:
    """The ids are first, first + 1, ..."""
    return Trunk(f"d{first}", "x", 0, 0, first + np.arange(size), np.arange(size + 1), ())


def group(trunk: Trunk, cut: int, rollouts: list[Rollout]) -> Group:
    ids = concat(trunk.ids[:cut], [MARKERS.opener])
    return Group(Prompt(trunk, cut, 2, ids, ids), tuple(rollouts))


def two_documents() -> list[Group]:
    """Cuts 2 and 4 of one document, in this order with one of another between."""
    first, second = document(10, 8), document(30, 5)
    return [
        group(first, 4, [rollout([51, 2], False), rollout([52, 53, 2], True)]),
        group(second, 3, [rollout([2], False), rollout([61, 2], True)]),
        group(first, 2, [rollout([54, 2], True), rollout([2], False)]),
    ]


WANTED = [Wanted(*each) for each in product((False, True), repeat=2)]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cost_of_a_document_is_what_is_packed(layout: str, wanted: Wanted) -> None:
    groups = two_documents()
    assert documents(groups) == [[0, 2], [1]]
    for part in documents(groups):
        chosen = [groups[p] for p in part]
        packed = rollout_batch(chosen, MARKERS, CPU, layout, wanted, 0).packed
        assert document_cost(chosen, wanted, layout) == packed.num_tokens
    whole = rollout_batch(groups, MARKERS, CPU, layout, wanted, 0).packed.num_tokens
    parts = [[groups[p] for p in part] for part in documents(groups)]
    assert whole == sum(document_cost(part, wanted, layout) for part in parts)


def test_the_cost_of_a_document_by_hand() -> None:
    """Branches: opener and 2, 3, 2 and 1 tokens, with a continuation of 2; contexts of 4, 4, 2 and 2; 8 in all."""
    groups = [each for each in two_documents() if each.prompt.trunk.ids[0] == 10]
    own, contexts = 4 + 2 + 3 + 2 + 1, 4 + 4 + 2 + 2
    costs = {
        ("shared", False, False): 4 + own,
        ("shared", False, True): 8 + own,
        ("shared", True, False): 8 + own + 4 * 2,
        ("naive", False, False): contexts + own,
        ("naive", True, True): 8 + contexts + own + 4 * 2,
    }
    for (layout, *wanted), cost in costs.items():
        assert document_cost(groups, Wanted(*wanted), layout) == cost


def test_sequences_of_like_lengths_share_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths 9, 8, 3, 3, 2, 1 within 18 tokens: 2 * 9; then 4 * 3. A fuller rank asks for three, then for six."""
    lengths, world = [3, 9, 1, 3, 8, 2], dist.World(0, 2, CPU)
    for largest, expected in ((2, [[1, 4], [0, 3, 5, 2]]), (3, [[1, 4], [0, 3], [5, 2]])):
        monkeypatch.setattr(dist, "largest", lambda _count, _world, largest=largest: largest)
        assert split_padded(lengths, 18, world) == expected
    monkeypatch.setattr(dist, "largest", lambda _count, _world: 6)
    assert sorted(split_padded(lengths, 18, world)) == [[i] for i in range(6)]


def test_a_micro_batch_is_within_its_budget_with_its_padding() -> None:
    """Sequences of one forward are as wide as the longest of the step, whichever micro-batch it is in."""
    groups, wanted = two_documents(), Wanted(continuations=True, text=False)
    parts = [[groups[p] for p in part] for part in documents(groups)]
    costs = padded_costs(parts, wanted, "naive")
    widest = max(
        rollout_batch(part, MARKERS, CPU, "naive", wanted, 0).packed.ids_NT.shape[1]
        for part in parts
    )
    counts = [sum(len(each.rollouts) for each in part) + 1 for part in parts]
    assert costs == [count * widest for count in counts]
    whole = rollout_batch(groups, MARKERS, CPU, "naive", wanted, 0).packed
    assert whole.ids_NT.numel() == sum(costs) > whole.num_tokens
    assert padded_costs(parts, wanted, "shared") == [
        document_cost(part, wanted, "shared") for part in parts
    ]


def read(ids_NT: torch.Tensor, kind) -> list[tuple[int, int]]:
    """(token whose hidden state is read, token that it is to predict) of every row."""
    return list(zip(ids_NT.flatten()[kind.hidden_R].tolist(), kind.target_R.tolist(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_tokens_they_are_named_for(layout: str) -> None:
    made = rollout_batch(two_documents(), MARKERS, CPU, layout, Wanted(True, True), 0)
    ids_NT = made.packed.ids_NT
    # After the opener: the thought, then the closer where it was sampled.
    assert read(ids_NT, made.actions) == [
        (1, 51), (51, 2),
        (1, 52), (52, 53),
        (1, 2),
        (1, 61),
        (1, 54),
        (1, 2),
    ]  # fmt: skip
    assert made.counts == (2, 2, 1, 1, 1, 1)
    assert made.behaviour_logp_R.tolist() == [-0.5, -1.0, -0.5, -1.0, -0.5, -0.5, -0.5, -0.5]
    assert made.actions.banned == (1,)
    assert made.continuations is not None
    assert read(ids_NT, made.continuations) == [
        (2, 14), (14, 15), (2, 14), (14, 15),
        (2, 33), (33, 34), (2, 33), (33, 34),
        (2, 12), (12, 13), (2, 12), (12, 13),
    ]  # fmt: skip
    assert made.no_think is not None
    assert read(ids_NT, made.no_think) == [
        (13, 14), (14, 15), (32, 33), (33, 34), (11, 12), (12, 13)
    ]  # fmt: skip
    assert made.text is not None
    assert read(ids_NT, made.text) == [
        *((i, i + 1) for i in range(10, 17)),
        *((i, i + 1) for i in range(30, 34)),
    ]
    assert {kind.banned for kind in (made.continuations, made.no_think, made.text)} == {(1, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_actions_are_current_token_by_token(layout: str) -> None:
    """A thought that was paused while the weights changed has tokens of both; a forced closer is no action."""
    versions = [[3, 4, 4], [4, 4], [2, 3]]
    ids = [([51, 52, 2], False), ([53, 2], True), ([54, 2], False)]
    rollouts = [
        replace(rollout(*each), version=np.array(version))
        for each, version in zip(ids, versions, strict=True)
    ]
    groups = [group(document(10, 8), 4, rollouts)]
    for version, expected in ((4, "011100"), (3, "100001"), (5, "000000")):
        made = rollout_batch(groups, MARKERS, CPU, layout, Wanted(False, False), version)
        assert made.current_R.tolist() == [each == "1" for each in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_lie_on_the_paths_of_their_own_branch(layout: str) -> None:
    """Equal tokens stand in many places: positions tell the branches apart."""
    groups = two_documents()
    made = rollout_batch(groups, MARKERS, CPU, layout, Wanted(True, True), 0)
    flat = made.packed.ids_NT.flatten().tolist()
    assert made.continuations is not None
    hidden = made.continuations.hidden_R.tolist()
    rollouts = [(each, one) for each in groups for one in each.rollouts]
    for b, (each, one) in enumerate(rollouts):
        start, (before, after) = made.packed.own_at[b], hidden[2 * b : 2 * b + 2]
        ids = [MARKERS.opener, *one.ids.tolist(), *each.prompt.continuation_ids.tolist()]
        assert flat[start : start + len(ids)] == ids
        assert (before, after) == (start + len(one.ids), start + len(one.ids) + 1)
    trunks = {row for kind in (made.no_think, made.text) if kind for row in kind.hidden_R.tolist()}
    ends = made.packed.trunk_at.tolist()
    assert trunks == {*range(ends[0], ends[0] + 7), *range(ends[1], ends[1] + 4)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_wanted_is_not_packed(layout: str) -> None:
    made = rollout_batch(two_documents(), MARKERS, CPU, layout, Wanted(False, False), 0)
    assert (made.continuations, made.no_think, made.text) == (None, None, None)
    packed = set(made.packed.ids_NT.flatten().tolist())
    assert packed - {0} == {*range(10, 14), *range(30, 33), 51, 52, 53, 54, 61, 1, 2}


def test_a_number_of_every_rollout_is_repeated_for_its_actions() -> None:
    values = np.array([[0.5, -1.0], [2.0, 0.0]])
    assert per_action(values, (2, 0, 1, 3), CPU).tolist() == [0.5, 0.5, 2.0, 0.0, 0.0, 0.0]


ITEMS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(0, 20)), max_size=14)
"""(trunk, tokens of the trunk, tokens of its own)."""


def tokens(items: list[tuple[int, int, int]], layout: str) -> int:
    """What a forward of items computes, from the definition; padding counts in the naive layout."""
    if layout == "naive":
        return len(items) * max(trunk + own for _, trunk, own in items)
    longest = {key: max(n for k, n, _ in items if k == key) for key, _, _ in items}
    return sum(longest.values()) + sum(own for _, _, own in items)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(items=ITEMS, budget=st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_forwards_of_a_scorer_keep_their_budget_and_are_as_full_as_it_allows(
    layout: str, items: list[tuple[int, int, int]], budget: int
) -> None:
    found = batches(items, budget, layout)
    order = [i for each in found for i in each]
    assert sorted(order) == list(range(len(items)))
    for each in found:
        assert len(each) == 1 or tokens([items[i] for i in each], layout) <= budget
    for each, after in pairwise(found):
        assert tokens([items[i] for i in [*each, after[0]]], layout) > budget
    keys = [items[i][0] for i in order]
    if layout == "shared":
        changes = sum(one != other for one, other in pairwise(keys))
        assert changes == max(0, len(set(keys)) - 1), "items of one trunk follow each other"
    else:
        lengths = [sum(items[i][1:]) for i in order]
        assert lengths == sorted(lengths)


def test_a_trunk_counts_once_a_forward() -> None:
    """7 + 3 + 2 tokens of one trunk fit 12; a longer cut of it pays for what it adds, 2."""
    items = [(5, 7, 3), (8, 4, 4), (5, 7, 2), (5, 9, 1)]
    assert batches(items, 12, "shared") == [[0, 2], [3], [1]]
    assert batches(items, 15, "shared") == [[0, 2, 3], [1]]
    assert batches(items, 23, "shared") == [[0, 2, 3, 1]]
    assert batches(items, 22, "shared") == [[0, 2, 3], [1]]
    assert batches(items, 20, "naive") == [[1, 2], [0, 3]]
    assert batches(items, 1, "naive") == [[1], [2], [0], [3]]
