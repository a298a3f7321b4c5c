"""Attention over packed trunks and branches, handed to transformers through its `AttentionInterface`.

A trunk attends to itself, causally. A branch attends to its trunk up to its cut and to itself, causally: one softmax
over two stretches of keys. On a CPU the stretches are attended to apart and merged by their log-sum-exps; on CUDA one
call of flex_attention takes both under a block mask.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "rlpt_branches"
"""What a transformers model is told to use. It makes no masks for a name it does not know."""


def implementation(layout: str) -> str:
    """The attention of a layout, as transformers names it."""
    return NAME if layout == "shared" else "sdpa"


def check_implementation(lm: Any) -> None:
    """Refuse a model whose attention would not hear of a tree. Raises ValueError."""
    name = lm.config._attn_implementation
    if name != NAME:
        raise ValueError(
            f"{type(lm).__name__}: its attention, {name!r}, would let a branch see its neighbours; make the model with "
            f"attn_implementation = {NAME!r}, or pack with the layout 'naive'"
        )


class Crossing(NamedTuple):
    """The branches of one cut: queries [start, stop), and their keys before the cut [trunk_start, trunk_stop)."""

    start: int
    stop: int
    trunk_start: int
    trunk_stop: int


class Siblings(NamedTuple):
    """Branches of like length, B of them, padded to L tokens: their own causal attention is one call."""

    at_BL: Int[Tensor, "B L"]
    """Flat position of every token; padding repeats a branch's last."""
    real_BL: Bool[Tensor, "B L"]


@dataclass(frozen=True)
class Tree:
    """Where the trunks and branches lie in one flat row of M tokens."""

    trunks: tuple[tuple[int, int], ...]
    """[start, stop) of every trunk."""
    crossings: tuple[Crossing, ...]
    siblings: tuple[Siblings, ...]
    longest: int
    """Tokens of the longest path, trunk and branch together."""
    mask: Any = field(default=None, repr=False)
    """The same as a block mask of flex_attention, on CUDA."""


def branch_attention(
    module: nn.Module,
    query: Float[Tensor, "N H T d"],
    key: Float[Tensor, "N h S d"],
    value: Float[Tensor, "N h S d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Any = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "N T H d"], None]:
    """What transformers calls in every layer. ``tree`` is a `Tree`, a decoding state with an ``attend`` of its own, or
    absent: then rows are ordinary sequences.
    """
    check: Any = refuse
    check(module, key.shape[2] if tree is None else tree.longest, dropout, kwargs)
    if tree is None:
        if attention_mask is not None:
            raise ValueError("the layout 'shared' knows no padding masks; pack sequences instead")
        plain: Any = sdpa_attention_forward
        return plain(module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(tree, Tree):
        return tree.attend(module.layer_idx, query, key, value, scale), None
    attend: Any = tree_attention if tree.mask is None else _flex
    return attend(query, key, value, tree, scale).transpose(1, 2), None


AttentionInterface.register(NAME, branch_attention)


@torch.compiler.disable
def refuse(module: nn.Module, longest: int, dropout: float, settings: dict[str, Any]) -> None:
    """Refuse what a layer asks of its attention beyond causality, rather than leave it out. Raises ValueError."""
    name = type(module).__name__
    window = settings.get("sliding_window")
    if window is not None and window < longest:
        raise ValueError(
            f"{name}: a sliding window of {window} tokens is shorter than the longest path, {longest}; set "
            "policy.layout = 'naive'"
        )
    for key in ("softcap", "s_aux", "position_bias"):
        if settings.get(key) is not None:
            raise ValueError(
                f"{name}: attention with {key} is unknown to 'shared'; set policy.layout = 'naive'"
            )
    if dropout:
        raise ValueError(f"{name}: attention dropout {dropout}; rewards and losses need dropout 0")


@torch.compiler.disable
def tree_attention(
    query: Float[Tensor, "1 H M d"],
    key: Float[Tensor, "1 h M d"],
    value: Float[Tensor, "1 h M d"],
    tree: Tree,
    scale: float,
) -> Float[Tensor, "1 H M d"]:
    """Exact attention of a packed tree; differentiable. Cost: every trunk once, every branch against its trunk."""
    return _TreeAttention.apply(query, key, value, tree, scale)  # pyright: ignore[reportReturnType]


class _TreeAttention(torch.autograd.Function):
    """Two stretches of keys under one softmax.

    With o_i, l_i the output and log-sum-exp of a stretch: l = log sum_i exp l_i, o = sum_i exp(l_i - l) o_i. The
    backward of a stretch given the *merged* o and l recovers the probabilities of the whole softmax, exp(score - l),
    so the gradients of the stretches add up to the exact one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float):
        out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
        lse = torch.full(out.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
        if query.dtype == torch.float64:
            lse = lse.double()
        for start, stop in tree.trunks:
            at = slice(start, stop)
            found = stretch(query[:, :, at], key[:, :, at], value[:, :, at], True, scale)
            out[at], lse[at] = map(_flat, found)
        for start, stop, *ends in tree.crossings:
            at, seen = slice(start, stop), slice(*ends)
            found = stretch(query[:, :, at], key[:, :, seen], value[:, :, seen], False, scale)
            out[at], lse[at] = map(_flat, found)
        for family in tree.siblings:
            own = [_gather(x, family) for x in (query, key, value)]
            found = stretch(own[0], own[1], own[2], True, scale)
            merge_into(out, lse, family, found)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return _headed(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        out, lse = _headed(out), _headed(lse)
        back = _Backward(ctx.scale, (grads[0], query, key, value, out, lse))
        for start, stop in ctx.tree.trunks:
            back.add(slice(start, stop), slice(start, stop), True)
        for start, stop, first, last in ctx.tree.crossings:
            back.add(slice(start, stop), slice(first, last), False)
        for family in ctx.tree.siblings:
            back.add_own(family)
        dq, dk, dv = (_headed(x) for x in back.totals)
        return dq, dk, dv, None, None


class _Backward:
    """Adds the gradients of stretches where they belong."""

    def __init__(self, scale: float, known: tuple[Tensor, ...]) -> None:
        self.scale = scale
        self.known = known
        """Gradient of the output, query, key, value, output, log-sum-exp."""
        self.totals = [torch.zeros_like(x[0].transpose(0, 1)) for x in known[1:4]]

    def add(self, at: slice, seen: slice, causal: bool) -> None:
        grad, query, key, value, out, lse = self.known
        parts = stretch_backward(
            grad[:, :, at], query[:, :, at], key[:, :, seen], value[:, :, seen], out[:, :, at],
            lse[:, :, at], causal, self.scale,
        )  # fmt: skip
        for total, part, where in zip(self.totals, parts, (at, seen, seen), strict=True):
            total[where] += _flat(part)

    def add_own(self, family: Siblings) -> None:
        grad, query, key, value, out, lse = (_gather(x, family) for x in self.known)
        # Padding repeats a token, whose gradient must count once.
        grad = grad * family.real_BL[:, None, :, None]
        parts = stretch_backward(grad, query, key, value, out, lse, True, self.scale)
        at = family.at_BL[family.real_BL]
        for total, part in zip(self.totals, parts, strict=True):
            total.index_add_(0, at, _own(part, family))


def stretch(
    query: Float[Tensor, "B H L d"], key: Float[Tensor, "B h S d"], value: Float[Tensor, "B h S d"],
    causal: bool, scale: float,
) -> tuple[Float[Tensor, "B H L d"], Float[Tensor, "B H L"]]:  # fmt: skip
    """Attention to one stretch of keys, and the log-sum-exp of its scores."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    return _by_scores(query, key, value, causal, scale)


def stretch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, given output and log-sum-exp of the whole softmax."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, scale=scale
    )


def _by_scores(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`stretch` from plain products, for decoding on CUDA, where a query is one token and the scores are few."""
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    score = (query.float() @ key.float().transpose(-1, -2)) * scale
    if causal:
        ahead = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(ahead, -torch.inf)
    lse = score.logsumexp(-1)
    return ((score - lse[..., None]).exp() @ value.float()).to(query.dtype), lse


def merge_into(
    out: Float[Tensor, "M H d"], lse: Float[Tensor, "M H"], family: Siblings, found: tuple[Tensor, Tensor]
) -> None:  # fmt: skip
    """Take the branches' own stretch into the softmax."""
    at = family.at_BL[family.real_BL]
    out[at], lse[at] = merge(out[at], lse[at], *(_own(x, family) for x in found))


def merge(
    out: Float[Tensor, "*M d"], lse: Float[Tensor, "*M"], other: Float[Tensor, "*M d"], other_lse: Float[Tensor, "*M"]
) -> tuple[Float[Tensor, "*M d"], Float[Tensor, "*M"]]:  # fmt: skip
    """Output and log-sum-exp over both stretches of keys."""
    whole = torch.logaddexp(lse, other_lse)
    own, theirs = ((part - whole).exp()[..., None] for part in (lse, other_lse))
    return (out * own + other * theirs).to(out.dtype), whole


def _flat(x: Tensor) -> Tensor:
    """(1, H, L, ...) -> (L, H, ...)."""
    return x[0].transpose(0, 1)


def _headed(x: Tensor) -> Tensor:
    """(M, H, ...) -> (1, H, M, ...)."""
    return x.transpose(0, 1)[None]


def _gather(x: Tensor, family: Siblings) -> Tensor:
    """(1, H, M, ...) -> (B, H, L, ...)."""
    return x[0].transpose(0, 1)[family.at_BL].transpose(1, 2)


def _own(x: Tensor, family: Siblings) -> Tensor:
    """(B, H, L, ...) -> (real tokens, H, ...)."""
    return x.transpose(1, 2)[family.real_BL]


_compiled_flex: Any = None


def _flex(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
    """flex_attention under a block mask: part of a compiled block, or compiled once for all lengths.

    Past dynamo's limit of variants it would fall back to full scores; `fullgraph` makes that an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    if _compiled_flex is None and not torch.compiler.is_compiling():
        _compiled_flex = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex
    grouped = query.shape[1] != key.shape[1]
    return attend(query, key, value, block_mask=tree.mask, scale=scale, enable_gqa=grouped)
