"""Attention of a packed tree: exactly the softmax over what a token may see, values and gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlpt.policy.attention import (
    Tree,
    _by_scores,
    branch_attention,
    implementation,
    merge,
    stretch,
    tree_attention,
)
from rlpt.policy.branches import lay_out, tree
from rlpt.types import Branch, Trunk

CPU = torch.device("cpu")
SCALE = 0.4

Grove = tuple[int, tuple[tuple[int, int], ...]]
"""Tokens of a trunk, and (cut, tokens) of its branches."""

TREES: dict[str, tuple[Grove, ...]] = {
    "a trunk": ((5, ()),),
    "a branch": ((4, ((2, 3),)),),
    "siblings of one cut": ((6, ((4, 3), (4, 5), (4, 1))),),
    "cut at the start": ((5, ((0, 3), (0, 1), (2, 2))),),
    "cut at 1 and at the end": ((5, ((1, 2), (5, 4), (5, 1))),),
    "no tokens": ((4, ((2, 0), (2, 3), (3, 0), (3, 0), (3, 1))),),
    "lengths in five buckets": ((9, tuple((3 + k % 5, k) for k in range(20))),),
    "several trunks": ((5, ((2, 3), (4, 1))), (3, ()), (1, ((1, 2), (0, 2))), (8, ((7, 6),))),
    "branches alone": ((0, ((0, 4), (0, 2))), (3, ((3, 1),))),
}


def grown(groves: tuple[Grove, ...]) -> tuple[Tree, list[list[int]]]:
    """The tree, and the flat positions that every token may see, from the definition."""
    trunks = [
        Trunk("d", "x", 0, 0, np.arange(length), np.arange(length + 1), ()) for length, _ in groves
    ]
    pairs = [
        (trunk, Branch(cut, np.arange(length), 0))
        for trunk, (_, branches) in zip(trunks, groves, strict=True)
        for cut, length in branches
    ]
    flat = lay_out(trunks, pairs)
    seen: list[list[int]] = [[] for _ in flat.ids_M]
    for trunk, start in zip(trunks, flat.trunk_at.tolist(), strict=True):
        for j in range(len(trunk.ids)):
            seen[start + j] = [start + k for k in range(j + 1)]
    for (_, branch), start, own in zip(
        pairs, flat.context_at.tolist(), flat.own_at.tolist(), strict=True
    ):
        for j in range(len(branch.ids)):
            seen[own + j] = [start + k for k in range(branch.cut)] + [own + k for k in range(j + 1)]
    assert all(seen), "every token sees itself"
    return tree(flat, [len(branch.ids) for _, branch in pairs], CPU), seen


def drawn(
    size: int, kv_heads: int, dtype: torch.dtype = torch.float64, heads: int = 4, width: int = 6
) -> list[Tensor]:
    """Query, key and value; scores of the size of 4, so that a wrong key is seen."""
    draw = torch.Generator().manual_seed(size)
    return [
        (2.0 * torch.randn(1, count, size, width, generator=draw, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, seen: list[list[int]]) -> Tensor:
    """Token by token and head by head, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    out, share = [], query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):
        rows = []
        for i, at in enumerate(seen):
            p = torch.softmax(SCALE * (key[0, h // share, at] @ query[0, h, i]), dim=0)
            rows.append(p @ value[0, h // share, at])
        out.append(torch.stack(rows))
    return torch.stack(out)[None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", TREES)
def test_values_and_gradients_are_those_of_the_softmax_over_what_is_seen(
    name: str, kv_heads: int
) -> None:
    shape, seen = grown(TREES[name])
    parts = drawn(len(seen), kv_heads)
    found, expected = tree_attention(*parts, shape, SCALE), dense(*parts, seen)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    for mine, theirs in zip(
        *(torch.autograd.grad((x * weight).sum(), parts) for x in (found, expected)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-11)


def test_gradients_are_the_slopes_of_the_values() -> None:
    shape, seen = grown(((3, ((2, 2), (2, 1), (3, 1), (0, 1))), (1, ((1, 1),))))
    parts = drawn(len(seen), 1, heads=2, width=2)
    assert torch.autograd.gradcheck(lambda *qkv: tree_attention(*qkv, shape, SCALE), parts)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_half_precision_loses_its_own_digits_only(dtype: torch.dtype, bar: float) -> None:
    """bfloat16 has 8 bits: an error of two units in the last place, relative to the tensor's norm."""
    shape, seen = grown(TREES["lengths in five buckets"])
    parts = drawn(len(seen), 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in parts]
    found, expected = tree_attention(*parts, shape, SCALE), dense(*exact, seen)
    assert found.dtype == dtype
    grads = torch.autograd.grad(found.double().sin().sum(), parts)
    known = torch.autograd.grad(expected.sin().sum(), exact)
    for mine, theirs in zip((found, *grads), (expected, *known), strict=True):
        assert mine.dtype == dtype
        assert torch.linalg.vector_norm(mine.double() - theirs) < bar * theirs.norm()


def test_what_a_token_may_not_see_changes_nothing() -> None:
    shape, seen = grown(TREES["several trunks"])
    parts = [x.detach() for x in drawn(len(seen), 2)]
    before = tree_attention(*parts, shape, SCALE)
    for j in range(len(seen)):
        blind = torch.tensor([j not in at for at in seen])
        other = [parts[0], *(x.clone() for x in parts[1:])]
        for x in other[1:]:
            x[:, :, j] += 3.0
        after = tree_attention(*other, shape, SCALE)
        assert torch.equal(after[:, :, blind], before[:, :, blind])
        assert (after - before)[:, :, ~blind].abs().amin(dim=(0, 1, 3)).gt(0).all()


def test_two_stretches_merge_by_hand() -> None:
    """Weights 1 : 3, so a quarter of one output and three quarters of the other; their sum is 4."""
    out, other = torch.tensor([[4.0, 0.0]]), torch.tensor([[8.0, 4.0]])
    merged, lse = merge(out, torch.tensor([0.0]), other, torch.tensor([3.0]).log())
    assert torch.allclose(merged, torch.tensor([[7.0, 3.0]]))
    assert torch.allclose(lse, torch.tensor([4.0]).log())
    # A stretch without keys has the log-sum-exp of nothing.
    merged, lse = merge(torch.zeros(1, 2), torch.tensor([-torch.inf]), other, torch.tensor([0.7]))
    assert torch.equal(merged, other)
    assert torch.allclose(lse, torch.tensor([0.7]))


def test_scores_of_a_thousand_do_not_overflow_a_merge() -> None:
    one, high, low = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 1000.0, 999.0))
    merged, lse = merge(one[None], high, 0.0 * one[None], low)
    assert merged.item() == pytest.approx(1.0 / (1.0 + np.exp(-1.0)), rel=1e-12)
    assert lse.item() == pytest.approx(1000.0 + np.log1p(np.exp(-1.0)), rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_a_stretch_from_plain_products_is_that_of_the_fused_operator(causal: bool) -> None:
    query, key, value = (x.detach().float() for x in drawn(7, 2))
    for mine, theirs in zip(
        _by_scores(query, key, value, causal, SCALE),
        stretch(query, key, value, causal, SCALE),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


class Layer(nn.Module):
    """Stands in for a decoder's attention."""

    layer_idx = 3
    num_key_value_groups = 2


def attend(longest: int = 9, mask: Tensor | None = None, tree: Any = "made", **settings: Any):
    shape, seen = grown(((longest - 2, ((longest - 2, 2),)),))
    tree = shape if tree == "made" else tree
    return branch_attention(Layer(), *drawn(len(seen), 2), mask, tree=tree, **settings)


def test_a_layer_gets_tokens_before_heads_and_the_usual_scale() -> None:
    shape, seen = grown(TREES["a branch"])
    parts = drawn(len(seen), 2)
    found, _ = branch_attention(Layer(), *parts, None, tree=shape)
    expected = tree_attention(*parts, shape, 6**-0.5).transpose(1, 2)
    assert torch.equal(found, expected)
    assert not torch.allclose(
        found, branch_attention(Layer(), *parts, None, scaling=0.1, tree=shape)[0]
    )


def test_without_a_tree_rows_are_ordinary_sequences() -> None:
    parts = drawn(7, 2)
    found, _ = branch_attention(Layer(), *parts, None, scaling=SCALE)
    expected = dense(*parts, [list(range(i + 1)) for i in range(7)])
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-12)


def test_a_decoding_state_attends_by_itself() -> None:
    class State:
        longest = 4

        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float):
            return query.transpose(1, 2) * layer * scale

    parts = drawn(5, 2)
    found, _ = branch_attention(Layer(), *parts, None, scaling=0.5, tree=State())
    assert torch.equal(found, parts[0].transpose(1, 2) * 1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sliding_window": 8},
            r"Layer: a sliding window of 8 tokens is shorter than the longest path, 9; set policy\.layout = 'naive'",
        ),
        ({"softcap": 50.0}, r"Layer: attention with softcap .* set policy\.layout = 'naive'"),
        ({"s_aux": torch.ones(4)}, r"Layer: attention with s_aux .* set policy\.layout = 'naive'"),
        ({"position_bias": torch.ones(1)}, r"attention with position_bias .* 'naive'"),
        ({"dropout": 0.1}, r"Layer: attention dropout 0\.1; rewards and losses need dropout 0"),
    ],
    ids=["window", "softcap", "sinks", "bias", "dropout"],
)
def test_what_would_be_left_out_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(**settings)


def test_what_changes_nothing_is_accepted() -> None:
    bare = attend()[0]
    settings = {"sliding_window": 9, "softcap": None, "dropout": 0.0}
    assert torch.equal(attend(**settings)[0], bare)
    assert torch.equal(attend(sliding_window=None, use_cache=False)[0], bare)


def test_padding_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'shared' knows no padding masks; pack sequences"):
        attend(mask=torch.ones(1, 1, 9, 9, dtype=torch.bool), tree=None)


def test_only_the_shared_layout_has_an_attention_of_its_own() -> None:
    assert implementation("naive") == "sdpa"
    assert implementation("shared") == "rlpt_branches"
