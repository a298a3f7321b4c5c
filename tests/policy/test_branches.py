"""Trunks and branches in one forward give the numbers of one sequence at a time; rows, positions and masks by hand."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlpt.policy.attention import tree_attention
from rlpt.policy.branches import block_mask, bucketed, lay_out, owners, tree
from rlpt.policy.packing import pack
from rlpt.types import Branch, Trunk

CPU = torch.device("cpu")
VOCAB = 61


@dataclass(frozen=True)
class Wood:
    """Trunks that are wanted whole, and branches of these and of others."""

    trunks: list[Trunk]
    pairs: list[tuple[Trunk, Branch]]

    @property
    def lengths(self) -> list[int]:
        return [len(branch.ids) for _, branch in self.pairs]


def lengths(top: int, *often: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from(often), st.integers(0, top))


def groves(size: int) -> st.SearchStrategy[tuple[int, bool, list[tuple[int, list[int]]]]]:
    """(tokens of the trunk, whether it is wanted whole, [(cut, tokens of every branch there)])."""
    cut = st.tuples(lengths(size, 0, 1, size), st.lists(lengths(7, 0, 1), min_size=1, max_size=4))
    return st.tuples(st.just(size), st.booleans(), st.lists(cut, max_size=3))


WOODS = st.lists(st.integers(1, 14).flatmap(groves), min_size=1, max_size=3)
"""Documents, cuts and thoughts, the ends of every range often."""


def grown(drawn: list[tuple[int, bool, list[tuple[int, list[int]]]]], seed: int) -> Wood:
    """Plant what was drawn; its branches are handed over in any order."""
    draw = np.random.default_rng(seed)
    trunks, pairs = [], []
    for size, whole, cuts in drawn:
        each = Trunk("d", "x", 0, 0, draw.integers(0, VOCAB, size), np.arange(size + 1), ())
        trunks += [each] * whole
        pairs += [
            (each, Branch(cut, draw.integers(0, VOCAB, tokens), 0))
            for cut, siblings in cuts
            for tokens in siblings
        ]
    return Wood(trunks, [pairs[b] for b in draw.permutation(len(pairs))])


def planted(seed: int = 0) -> Wood:
    """A wood with everything in it."""
    ids = np.random.default_rng(seed)
    first, second = (
        Trunk("d", "x", 0, 0, ids.integers(0, VOCAB, size), np.arange(size + 1), ())
        for size in (17, 9)
    )
    shapes = (
        (first, 5, 4),
        (first, 5, 7),
        (second, 1, 3),
        (first, 17, 1),
        (second, 9, 5),
        (first, 5, 0),
    )
    pairs = [(each, Branch(cut, ids.integers(0, VOCAB, n), 0)) for each, cut, n in shapes]
    return Wood([second, first], pairs)


@pytest.fixture(scope="module")
def models(tiny, as_policy):
    """(plain model, policy) by family and layout, made once."""
    made: dict[tuple[str, str], tuple[Any, Any]] = {}

    def get(family: str, layout: str):
        if (family, layout) not in made:
            lm = tiny(family)
            made[family, layout] = lm, as_policy(lm, layout)
        return made[family, layout]

    return get


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "shared"), ("qwen3", "shared"), ("llama", "naive")]
)
@given(drawn=WOODS, seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_a_random_wood_gives_the_numbers_of_one_sequence_at_a_time(
    family: str, layout: str, drawn, seed: int, models, one_at_a_time, in_one_forward, assert_exact
) -> None:
    wood = grown(drawn, seed)
    lm, policy = models(family, layout)
    expected = one_at_a_time(lm, wood.trunks, wood.pairs)
    assume(sum(map(len, expected)))
    assert_exact(lm, policy, expected, in_one_forward(policy, wood.trunks, wood.pairs))


def test_cached_activations_and_recomputed_ones_give_the_same_numbers(
    tiny, as_policy, one_at_a_time, in_one_forward, assert_exact
) -> None:
    lm, wood = tiny("qwen3"), planted()
    policy = as_policy(lm, gradient_checkpointing=True)
    calls: list[int] = []
    policy.lm.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = in_one_forward(policy, wood.trunks, wood.pairs)
    assert_exact(lm, policy, one_at_a_time(lm, wood.trunks, wood.pairs), found)
    assert len(calls) == 2, "the block ran once more in the backward"


def document(size: int, first: int = 0) -> Trunk:
    """The ids are first, first + 1, ..."""
    return Trunk("d", "x", 0, 0, first + np.arange(size), np.arange(size + 1), ())


def test_a_document_stands_once_and_its_branches_go_on_from_their_cuts() -> None:
    """Trunk 10..14 up to its last cut, 4; then cut by cut: 4 has two thoughts, 1 has one; then a whole trunk."""
    shared, whole = document(5, 10), document(3, 50)
    pairs = [
        (shared, Branch(4, np.array([20, 21]), 0)),
        (shared, Branch(1, np.array([30]), 0)),
        (whole, Branch(3, np.array([60]), 0)),
        (shared, Branch(4, np.array([40, 41, 42]), 0)),
    ]
    flat = lay_out([whole], pairs)
    ids = [50, 51, 52, 60, 10, 11, 12, 13, 30, 20, 21, 40, 41, 42]
    assert flat.ids_M.tolist() == ids
    assert flat.position_M.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1, 4, 5, 4, 5, 6]
    assert flat.trunks == ((0, 3), (4, 8))
    assert flat.crossings == ((3, 4, 0, 3), (8, 9, 4, 5), (9, 14, 4, 8))
    assert flat.longest == 7
    packed = pack([whole], pairs, CPU, "shared")
    assert packed.num_tokens == 14
    assert packed.ids_NT.tolist() == [ids]
    # What predicts 51 and 52; 12 on the path of a branch; 20 (the trunk at the cut) and 21; 41 and 42; 30.
    assert packed.trunk_rows(0, 1, 3).tolist() == [0, 1]
    assert packed.context_rows(0, 2, 3).tolist() == [5]
    assert packed.branch_rows(0, 0, 2).tolist() == [7, 9]
    assert packed.branch_rows(3, 1, 3).tolist() == [11, 12]
    assert packed.branch_rows(1, 0, 1).tolist() == [4]
    assert packed.branch_rows(2, 0, 1).tolist() == [2]
    with pytest.raises(AssertionError, match="no context"):
        packed.trunk_rows(0, 0, 3)
    assert packed.branch_rows(2, 0, 0).tolist() == packed.branch_rows(2, 1, 1).tolist() == []


def test_one_sequence_at_a_time_has_a_row_each() -> None:
    first, second = document(3, 10), document(5, 50)
    pairs = [
        (second, Branch(2, np.array([60, 61]), 0)),
        (first, Branch(3, np.array([], dtype=int), 0)),
    ]
    packed = pack([first], pairs, CPU, "naive")
    assert packed.ids_NT.tolist() == [[10, 11, 12, 0], [50, 51, 60, 61], [10, 11, 12, 0]]
    assert packed.num_tokens == 3 + 4 + 3
    assert packed.position_NT is None
    assert packed.tree is None
    assert packed.trunk_rows(0, 1, 3).tolist() == [0, 1]
    assert packed.context_rows(0, 1, 2).tolist() == [4]
    assert packed.branch_rows(0, 0, 2).tolist() == [5, 6]
    assert packed.branch_rows(0, 1, 2).tolist() == [6]


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_a_branch_that_hangs_off_nothing_has_no_row_for_its_first_token(layout: str) -> None:
    packed = pack([], [(document(3), Branch(0, np.arange(4), 0))], CPU, layout)
    assert packed.branch_rows(0, 1, 4).tolist() == [0, 1, 2]
    with pytest.raises(AssertionError, match="no context"):
        packed.branch_rows(0, 0, 4)


def test_a_rank_without_work_computes_one_token() -> None:
    for layout in ("shared", "naive"):
        packed = pack([], [], CPU, layout)
        assert packed.ids_NT.shape == (1, 1)
    flat = lay_out([], [])
    assert (flat.trunks, flat.crossings, flat.longest) == (((0, 1),), (), 1)


@pytest.mark.parametrize("layout", ["shared", "naive"])
@pytest.mark.parametrize("cut", [-1, 6])
def test_a_cut_outside_its_document_is_refused(layout: str, cut: int) -> None:
    inside, outside = (Branch(at, np.array([1]), 0) for at in (5, cut))
    pack([], [(document(5), inside)], CPU, layout)
    message = rf"document d: a branch at cut {cut} of a trunk of 5 tokens; a cut lies in 0\.\.5"
    with pytest.raises(ValueError, match=message):
        pack([], [(document(5), outside)], CPU, layout)


def test_an_attention_that_would_not_hear_of_the_tree_is_refused(
    tiny, as_policy, in_one_forward
) -> None:
    policy, wood = as_policy(tiny("llama"), "naive"), planted()
    shared = pack(wood.trunks, wood.pairs, CPU, "shared")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: its attention, 'sdpa', .*'naive'"):
        in_one_forward(policy, wood.trunks, wood.pairs, shared)


def visible(wood: Wood) -> np.ndarray:
    """Which flat token sees which, from the definition: itself and its ancestors; padding itself."""
    flat = lay_out(wood.trunks, wood.pairs)
    size = bucketed(len(flat.ids_M))
    parent = np.full(size, -1)
    for start, stop in flat.trunks:
        parent[start + 1 : stop] = np.arange(start, stop - 1)
    for (_, branch), start, own in zip(wood.pairs, flat.context_at, flat.own_at, strict=True):
        parent[own : own + len(branch.ids)] = own - 1 + np.arange(len(branch.ids))
        if len(branch.ids):
            parent[own] = start + branch.cut - 1 if branch.cut else -1
    sees = np.eye(size, dtype=bool)
    for token in range(size):
        ancestor = parent[token]
        while ancestor >= 0:
            sees[token, ancestor] = True
            ancestor = parent[ancestor]
    return sees


def large() -> Wood:
    """Longer than a few blocks, so that some are full and many empty."""
    wide, small = document(430), document(40)
    lengths, cuts = (150, 3, 0, 1, 129, 40), (430, 300, 300, 17, 257, 300)
    pairs = [(wide, Branch(cut, np.arange(n), 0)) for cut, n in zip(cuts, lengths, strict=True)]
    return Wood([small, wide], [*pairs, (small, Branch(0, np.arange(9), 0))])


@given(drawn=WOODS, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_owners_say_who_sees_whom(drawn, seed: int) -> None:
    wood = grown(drawn, seed)
    owner, start, stop = owners(lay_out(wood.trunks, wood.pairs), wood.lengths)
    q, k = np.arange(len(owner))[:, None], np.arange(len(owner))[None]
    own = (owner[q] == owner[k]) & (k <= q)
    assert np.array_equal(own | ((k >= start[q]) & (k < stop[q])), visible(wood))


@pytest.mark.parametrize("wood", [planted(), large(), Wood([], [])], ids=["small", "large", "none"])
def test_a_block_mask_is_what_is_visible_block_by_block(wood: Wood) -> None:
    mask, sees = block_mask(lay_out(wood.trunks, wood.pairs), wood.lengths, CPU), visible(wood)
    at = torch.arange(len(sees))
    zero = torch.tensor(0)
    found = mask.mask_mod(zero, zero, at[:, None], at[None])
    assert np.array_equal(found.numpy(), sees)
    size = len(sees) // 128
    count = sees.reshape(size, 128, size, 128).sum((1, 3))
    for num, listed, wanted in (
        (mask.kv_num_blocks, mask.kv_indices, (count > 0) & (count < 128 * 128)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, count == 128 * 128),
    ):
        for q in range(size):
            chosen = listed[0, 0, q, : num[0, 0, q]].tolist()
            assert sorted(chosen) == np.flatnonzero(wanted[q]).tolist()
    if len(sees) > 256:
        assert mask.full_kv_num_blocks.sum() > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("wood", [planted(), large()], ids=["small", "large"])
def test_flex_attention_under_the_mask_is_attention_of_the_tree(wood: Wood) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    flat = lay_out(wood.trunks, wood.pairs)
    mask, count = block_mask(flat, wood.lengths, CPU), len(flat.ids_M)
    # The checks of shapes that tests put around every function cannot be traced.
    mask.mask_mod = inspect.unwrap(mask.mask_mod)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        2.0 * torch.randn(1, heads, bucketed(count), 8, generator=draw) for heads in (4, 2, 2)
    )
    found: Any = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    parts = (x[:, :, :count] for x in (query, key, value))
    expected = tree_attention(*parts, tree(flat, wood.lengths, CPU), 0.3)
    assert torch.allclose(found[:, :, :count], expected, atol=2e-6)


def test_padding_is_bounded_and_shapes_are_few() -> None:
    """At most an eighth or 127 rows more, from two blocks up; eight shapes a doubling, so that they can be counted."""
    for length in [*range(1, 3000), *range(3000, 40_000, 97)]:
        padded = bucketed(length)
        assert padded % 128 == 0
        assert length <= padded <= max(256, length + max(127, length // 8))
    for power in range(11, 18):
        low, high = 2**power, 2 ** (power + 1)
        assert (
            len({bucketed(n) for n in range(low + 1, high + 1, low // 128)} | {bucketed(high)}) == 8
        )
        assert (bucketed(low), bucketed(low + 1)) == (low, low + low // 8)
    assert [bucketed(n) for n in (0, 1, 256, 257)] == [256, 256, 256, 384]


def test_siblings_are_padded_to_less_than_twice_their_length() -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 0, 17, 7]
    trunk = document(2)
    pairs = [(trunk, Branch(1, np.arange(n), 0)) for n in lengths]
    flat = lay_out([], pairs)
    families = tree(flat, lengths, CPU).siblings
    assert [sorted(f.real_BL.sum(1).tolist()) for f in families] == [
        [1], [2], [3, 4], [5, 7, 8], [9, 16], [17],
    ]  # fmt: skip
    for family in families:
        assert family.at_BL.shape[1] < 2 * family.real_BL.sum(1).min()
        for at, real in zip(family.at_BL.tolist(), family.real_BL.tolist(), strict=True):
            own = [i for i, is_real in zip(at, real, strict=True) if is_real]
            assert own == list(range(own[0], own[0] + len(own)))
            assert set(at) == set(own)
            assert own[0] in flat.own_at.tolist()
