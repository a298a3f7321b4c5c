"""Trunks and branches -> tensors. Callers name rows by (trunk, position) and (branch, position), never by layout.

This is the naive layout: one sequence per trunk and one per branch, ``trunk.ids[:cut] + branch.ids``, padded on the
right. Causal attention never looks right, so padding needs no mask and cannot change a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlpt.types import Branch, Trunk, concat


@dataclass(frozen=True)
class Packed:
    """Padded tokens of one micro-batch and where each trunk and branch lies in them."""

    ids_NT: Int[Tensor, "N T"]
    num_trunks: int
    cuts: tuple[int, ...]
    """The cut of every branch: where its own tokens begin in its sequence."""

    def trunk_rows(self, trunk: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``trunk.ids[start:stop]`` (start >= 1)."""
        assert start >= 1, "the first token of a window has no context"
        return trunk * self.ids_NT.shape[1] + np.arange(start - 1, stop - 1)

    def context_rows(self, branch: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``trunk.ids[start:stop]`` on a branch's own path."""
        assert start >= 1, "the first token of a window has no context"
        return (self.num_trunks + branch) * self.ids_NT.shape[1] + np.arange(start - 1, stop - 1)

    def branch_rows(self, branch: int, start: int, stop: int) -> Int[np.ndarray, " S"]:
        """Flat indices of the hidden states that predict ``branch.ids[start:stop]``."""
        first = (self.num_trunks + branch) * self.ids_NT.shape[1] + self.cuts[branch]
        return first + np.arange(start - 1, stop - 1)


@dataclass(frozen=True)
class Rows:
    """Rows to score: which hidden state, which target, and the ids that are removed from the softmax."""

    hidden_R: Int[Tensor, " R"]
    target_R: Int[Tensor, " R"]
    banned: tuple[int, ...]


def pack(
    trunks: Sequence[Trunk], branches: Sequence[tuple[Trunk, Branch]], device: torch.device
) -> Packed:
    """Lay out ``trunks`` (whole) and ``branches`` (with the part of their trunk that they see)."""
    sequences = [trunk.ids for trunk in trunks]
    sequences += [concat(trunk.ids[: branch.cut], branch.ids) for trunk, branch in branches]
    width = max((len(ids) for ids in sequences), default=1)
    ids_NT = np.zeros((max(len(sequences), 1), width), dtype=np.int64)
    for n, ids in enumerate(sequences):
        ids_NT[n, : len(ids)] = ids
    cuts = tuple(branch.cut for _, branch in branches)
    return Packed(torch.from_numpy(ids_NT).to(device), len(trunks), cuts)


def rows(
    hidden: Sequence[np.ndarray],
    target: Sequence[np.ndarray],
    banned: tuple[int, ...],
    device: torch.device,
) -> Rows:
    """Concatenate the pieces of one kind of row."""
    hidden_R, target_R = concat(*hidden), concat(*target)
    assert len(hidden_R) == len(target_R), (len(hidden_R), len(target_R))
    return Rows(
        torch.from_numpy(hidden_R).to(device), torch.from_numpy(target_R).to(device), banned
    )
