"""Trunks and branches in one flat row of tokens: a document is computed once, however many thoughts hang off it.

`[trunk | branches of its first cut | branches of its second | ... | next trunk | ...]`. Positions of a branch go on
from its cut; `rlpt.policy.attention` lets it see its trunk up to there. Everything else in a decoder works token by
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlpt.policy.attention import Crossing, Siblings, Tree
from rlpt.types import Branch, Trunk, concat

BUCKET = 128
"""Rows of one compiled shape: a multiple of this, or of an eighth of the power of two below."""


@dataclass
class _Grove:
    """One document while it is laid out."""

    trunk: Trunk
    length: int = 0
    """Tokens of the trunk that somebody needs."""
    branches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Flat:
    """The flat row, and where things begin in it."""

    ids_M: Int[np.ndarray, " M"]
    position_M: Int[np.ndarray, " M"]
    trunk_at: Int[np.ndarray, " K"]
    """Flat position of the first token of every trunk that was asked for."""
    context_at: Int[np.ndarray, " B"]
    """Of the first token of every branch's trunk."""
    own_at: Int[np.ndarray, " B"]
    """Of every branch's first own token."""
    trunks: tuple[tuple[int, int], ...]
    crossings: tuple[Crossing, ...]
    longest: int


def lay_out(trunks: Sequence[Trunk], branches: Sequence[tuple[Trunk, Branch]]) -> Flat:
    """Every trunk once (whole where it is asked for, else up to its last cut), its branches behind it, cut by cut.

    Raises ValueError where a cut lies outside its trunk.
    """
    groves = _groves(trunks, branches)
    own_at = np.zeros(len(branches), dtype=np.int64)
    starts: dict[int, int] = {}
    ids, positions, ends, crossings, longest, top = [], [], [], [], 1, 0
    for key, grove in groves.items():
        starts[key] = start = top
        ids.append(grove.trunk.ids[: grove.length])
        positions.append(np.arange(grove.length))
        top += grove.length
        ends.append((start, top))
        longest = max(longest, grove.length)
        for b in grove.branches:
            branch = branches[b][1]
            own_at[b] = top
            ids.append(branch.ids)
            positions.append(branch.cut + np.arange(len(branch.ids)))
            _cross(crossings, start, top, branch)
            top += len(branch.ids)
            longest = max(longest, branch.cut + len(branch.ids))
    # A rank without work joins a forward with one token: FSDP gathers parameters on all ranks at once.
    alone = [np.zeros(1, dtype=np.int64)] * (top == 0)
    ends = [end for end in ends if end[0] < end[1]] or [(0, 1)] * (top == 0)
    return Flat(
        concat(*ids, *alone),
        concat(*positions, *alone),
        np.array([starts[id(trunk)] for trunk in trunks], dtype=np.int64),
        np.array([starts[id(trunk)] for trunk, _ in branches], dtype=np.int64),
        own_at,
        tuple(ends),
        tuple(crossings),
        longest,
    )


def _groves(trunks: Sequence[Trunk], branches: Sequence[tuple[Trunk, Branch]]) -> dict[int, _Grove]:
    groves: dict[int, _Grove] = {}
    for trunk in trunks:
        groves.setdefault(id(trunk), _Grove(trunk)).length = len(trunk.ids)
    for b, (trunk, branch) in enumerate(branches):
        check_cut(trunk, branch)
        grove = groves.setdefault(id(trunk), _Grove(trunk))
        grove.length = max(grove.length, branch.cut)
        grove.branches.append(b)
    for grove in groves.values():
        grove.branches.sort(key=lambda b: branches[b][1].cut)
    return groves


def check_cut(trunk: Trunk, branch: Branch) -> None:
    """Refuse a branch that hangs off nothing."""
    if not 0 <= branch.cut <= len(trunk.ids):
        raise ValueError(
            f"document {trunk.document}: a branch at cut {branch.cut} of a trunk of {len(trunk.ids)} tokens; a cut "
            f"lies in 0..{len(trunk.ids)}"
        )


def _cross(crossings: list[Crossing], start: int, top: int, branch: Branch) -> None:
    """Let the branch at ``top`` see its trunk, together with the branch before it where they share a cut."""
    if not branch.cut or not len(branch.ids):
        return
    stop, last = top + len(branch.ids), crossings[-1] if crossings else None
    if last is not None and last[1:] == (top, start, start + branch.cut):
        crossings[-1] = last._replace(stop=stop)
    else:
        crossings.append(Crossing(top, stop, start, start + branch.cut))


def tree(flat: Flat, lengths: Sequence[int], device: torch.device) -> Tree:
    """What attention needs of a layout; ``lengths`` are the branches' own tokens."""
    mask = block_mask(flat, lengths, device) if device.type == "cuda" else None
    siblings = () if mask is not None else _siblings(flat.own_at, np.asarray(lengths), device)
    return Tree(flat.trunks, flat.crossings, siblings, flat.longest, mask)


def _siblings(
    own_at: Int[np.ndarray, " B"], lengths: np.ndarray, device: torch.device
) -> tuple[Siblings, ...]:
    """Branches by powers of two of their length: padding is less than half of any call."""
    sizes = np.array([int(length - 1).bit_length() for length in lengths])
    families = []
    for size in sorted(set(sizes[lengths > 0].tolist())):
        (chosen,) = np.nonzero((sizes == size) & (lengths > 0))
        offset = np.arange(lengths[chosen].max())
        real = offset < lengths[chosen, None]
        at = own_at[chosen, None] + np.minimum(offset, lengths[chosen, None] - 1)
        families.append(Siblings(*(torch.from_numpy(x).to(device) for x in (at, real))))
    return tuple(families)


def bucketed(length: int) -> int:
    """The padded length of a compiled forward: at most an eighth more (or one bucket), eight shapes per doubling.

    Two buckets at least: one block alone is a case of its own to the compiler.
    """
    step = max(BUCKET, (1 << (max(length, 1) - 1).bit_length()) // 16)
    return max(2 * BUCKET, -(-length // step) * step)


def block_mask(flat: Flat, lengths: Sequence[int], device: torch.device) -> Any:
    """The layout as a block mask of flex_attention over ``bucketed(M)`` tokens; padding sees itself alone.

    Made from stretches, block by block: the mask itself would be M x M.
    """
    from torch.nn.attention.flex_attention import BlockMask

    table = torch.from_numpy(np.stack(owners(flat, lengths))).to(device)
    owner_M, start_M, stop_M = table
    at_M = torch.arange(len(owner_M), device=device)
    begins = torch.cat([owner_M[:1] == owner_M[:1], owner_M[1:] != owner_M[:-1]])
    first_M = torch.where(begins, at_M, 0).cummax(0).values
    count = _overlaps(start_M, stop_M) + _overlaps(first_M, at_M + 1)
    seen = count.unflatten(0, (-1, BUCKET)).sum(1)[None, None]
    full = seen == BUCKET * BUCKET

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= first_M[q]) & (k <= q)
        return own | ((k >= start_M[q]) & (k < stop_M[q]))

    blocks = (*_listed((seen > 0) & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BUCKET, mask_mod=sees)


def _overlaps(start_M: Int[Tensor, " M"], stop_M: Int[Tensor, " M"]) -> Int[Tensor, "M blocks"]:
    """How many keys of every block lie in each token's stretch."""
    edge = torch.arange(0, len(start_M), BUCKET, device=start_M.device)
    last = torch.minimum(stop_M[:, None], edge + BUCKET)
    return (last - torch.maximum(start_M[:, None], edge)).clamp(min=0).int()


def _listed(wanted: Bool[Tensor, "1 1 q k"]) -> tuple[Int[Tensor, "1 1 q"], Int[Tensor, "1 1 q k"]]:
    """How many blocks of keys every block of queries wants, and which, those first."""
    order = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32), order.int()


def owners(
    flat: Flat, lengths: Sequence[int]
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Of every token: the number of its trunk or branch, and the stretch [start, stop) of trunk that it sees, too."""
    size = bucketed(len(flat.ids_M))
    owner = -1 - np.arange(size)
    start, stop = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    pieces = [*flat.trunks, *zip(flat.own_at, flat.own_at + np.asarray(lengths), strict=True)]
    for number, piece in enumerate(pieces):
        owner[slice(*piece)] = number
    for crossing in flat.crossings:
        start[slice(*crossing[:2])], stop[slice(*crossing[:2])] = crossing[2:]
    return owner, start, stop
