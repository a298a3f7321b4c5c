"""Trunks and branches -> tensors. Callers name rows by (trunk, position) and (branch, position), never by layout.

shared: one flat row in which a trunk stands once for all its branches (`rlpt.policy.branches`).
naive: one sequence per trunk and one per branch, ``trunk.ids[:cut] + branch.ids``, padded on the right. Causal
attention never looks right, so padding needs no mask and cannot change a number. Works for every architecture, and is
what the shared layout is held against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlpt.policy.attention import Tree
from rlpt.policy.branches import bucketed, check_cut, lay_out, tree
from rlpt.types import Branch, Trunk, concat

Layout = Literal["shared", "naive"]


@dataclass(frozen=True)
class Packed:
    """Tokens of one micro-batch and where each trunk and branch lies in them."""

    ids_NT: Int[Tensor, "N T"]
    trunk_at: Int[np.ndarray, " K"]
    """Flat index of the first token of every trunk."""
    context_at: Int[np.ndarray, " B"]
    """Of the first token of the trunk on every branch's path."""
    own_at: Int[np.ndarray, " B"]
    """Of the first own token of every branch."""
    cuts: tuple[int, ...]
    num_tokens: int
    """Tokens that are computed, padding left out."""
    position_NT: Int[Tensor, "N T"] | None = None
    """None where every sequence counts from 0."""
    tree: Tree | None = None
    """None where rows are ordinary sequences."""

    def trunk_rows(self, trunk: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``trunk.ids[start:stop]`` (start >= 1)."""
        assert start >= 1, "the first token of a window has no context"
        return self.trunk_at[trunk] + np.arange(start - 1, stop - 1)

    def context_rows(self, branch: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``trunk.ids[start:stop]`` on a branch's own path."""
        assert start >= 1, "the first token of a window has no context"
        return self.context_at[branch] + np.arange(start - 1, stop - 1)

    def branch_rows(self, branch: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``branch.ids[start:stop]``; the first is the trunk's."""
        assert start >= 1 or self.cuts[branch] >= 1, "a branch at cut 0 has no context"
        at = self.own_at[branch] + np.arange(start - 1, stop - 1)
        if start == 0 and len(at):
            at[0] = self.context_at[branch] + self.cuts[branch] - 1
        return at


@dataclass(frozen=True)
class Rows:
    """Rows to score: which hidden state, which target, and the ids that are removed from the softmax."""

    hidden_R: Int[Tensor, " R"]
    target_R: Int[Tensor, " R"]
    banned: tuple[int, ...]
    temperature: float = 1.0


def pack(
    trunks: Sequence[Trunk],
    branches: Sequence[tuple[Trunk, Branch]],
    device: torch.device,
    layout: Layout,
) -> Packed:
    """Lay out ``trunks`` (whole) and ``branches`` (with the part of their trunk that they see).

    Trunks that are the same object are shared. Raises ValueError where a cut lies outside its trunk.
    """
    return (_shared if layout == "shared" else _naive)(trunks, branches, device)


def _shared(
    trunks: Sequence[Trunk], branches: Sequence[tuple[Trunk, Branch]], device: torch.device
) -> Packed:
    flat = lay_out(trunks, branches)
    count = len(flat.ids_M)
    spare = (bucketed(count) if device.type == "cuda" else count) - count
    ids, position = (
        torch.from_numpy(np.pad(x, (0, spare)))[None].to(device)
        for x in (flat.ids_M, flat.position_M)
    )
    cuts = tuple(branch.cut for _, branch in branches)
    shape = tree(flat, [len(branch.ids) for _, branch in branches], device)
    return Packed(
        ids, flat.trunk_at, flat.context_at, flat.own_at, cuts, count, position_NT=position, tree=shape
    )  # fmt: skip


def _naive(
    trunks: Sequence[Trunk], branches: Sequence[tuple[Trunk, Branch]], device: torch.device
) -> Packed:
    for trunk, branch in branches:
        check_cut(trunk, branch)
    sequences = [trunk.ids for trunk in trunks]
    sequences += [concat(trunk.ids[: branch.cut], branch.ids) for trunk, branch in branches]
    width = max((len(ids) for ids in sequences), default=1)
    ids_NT = np.zeros((max(len(sequences), 1), width), dtype=np.int64)
    for n, ids in enumerate(sequences):
        ids_NT[n, : len(ids)] = ids
    cuts = tuple(branch.cut for _, branch in branches)
    at = width * np.arange(len(sequences))
    context_at = at[len(trunks) :]
    return Packed(
        torch.from_numpy(ids_NT).to(device),
        at[: len(trunks)],
        context_at,
        context_at + np.array(cuts, dtype=np.int64),
        cuts,
        sum(map(len, sequences)),
    )


def rows(
    hidden: Sequence[np.ndarray],
    target: Sequence[np.ndarray],
    banned: tuple[int, ...],
    device: torch.device,
    temperature: float = 1.0,
) -> Rows:
    """Concatenate the pieces of one kind of row."""
    hidden_R, target_R = concat(*hidden), concat(*target)
    assert len(hidden_R) == len(target_R), (len(hidden_R), len(target_R))
    return Rows(
        torch.from_numpy(hidden_R).to(device),
        torch.from_numpy(target_R).to(device),
        banned,
        temperature,
    )
