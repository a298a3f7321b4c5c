"""Groups with advantages -> micro-batches of whole groups, as flat rows that carry everything the objective needs.

Denominators are not here: ``weight`` arrives with the counts of the whole step, over all micro-batches and ranks, so a
gradient does not depend on how the step was split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlpt.frames import Framed
from rlpt.policy.packing import Packed, Rows, pack, rows
from rlpt.types import Branch, Group, Markers, Trunk, concat


@dataclass(frozen=True)
class Weighted:
    """A group with what the update needs to know of it."""

    group: Group
    advantage_G: Float[np.ndarray, " G"]
    weight_G: Float[np.ndarray, " G"]
    """Weight of one action of each rollout: the inverse of a count over the whole step."""


@dataclass(frozen=True)
class ActionBatch:
    """One micro-batch of the RL stage."""

    packed: Packed
    actions: Rows
    behaviour_logp_R: Float[Tensor, " R"]
    advantage_R: Float[Tensor, " R"]
    weight_R: Float[Tensor, " R"]
    num_tokens: int
    """Tokens that are computed, padding left out."""
    trunk_text: Rows | None
    """Rows of the next-token term: every token of every trunk, once."""


def split_documents(items: Sequence[Weighted], size: int) -> list[list[Weighted]]:
    """Micro-batches of ``size`` whole documents (trunks), in order."""
    documents = [
        list(part) for _, part in groupby(items, key=lambda item: id(item.group.prompt.trunk))
    ]
    return [
        [item for document in documents[i : i + size] for item in document]
        for i in range(0, len(documents), size)
    ]


def action_batch(
    items: Sequence[Weighted], markers: Markers, device: torch.device, with_text: bool
) -> ActionBatch:
    """Pack the rollouts of whole groups; rows are their actions only (forced closers and openers are none)."""
    pairs, hidden, target, logp, advantage, weight = [], [], [], [], [], []
    for item in items:
        for g, rollout in enumerate(item.group.rollouts):
            pairs.append(_rollout_pair(item.group, g))
            at = np.flatnonzero(rollout.action)
            target.append(rollout.ids[at])
            hidden.append(at)
            logp.append(rollout.logp[at])
            advantage.append(np.full(len(at), item.advantage_G[g]))
            weight.append(np.full(len(at), item.weight_G[g]))
    trunks = _trunks(items) if with_text else []
    packed = pack(trunks, pairs, device)
    flat = [
        _rows_of(packed, b, branch, at)
        for b, ((_, branch), at) in enumerate(zip(pairs, hidden, strict=True))
    ]
    actions = rows(flat, target, (markers.opener,), device)
    text = _text_rows(packed, trunks, markers, device) if with_text else None
    numbers = [_tensor(part, device) for part in (logp, advantage, weight)]
    count = sum(branch.cut + len(branch.ids) for _, branch in pairs) + sum(
        len(t.ids) for t in trunks
    )
    return ActionBatch(packed, actions, numbers[0], numbers[1], numbers[2], count, trunk_text=text)


def _rows_of(packed: Packed, number: int, branch: Branch, actions: np.ndarray) -> np.ndarray:
    return packed.branch_rows(number, branch.score_start, len(branch.ids))[actions]


def _rollout_pair(group: Group, g: int) -> tuple[Trunk, Branch]:
    """The branch of one rollout; ``score_start`` is where its own tokens begin, after the opener."""
    prompt = group.prompt
    prefix = prompt.policy_ids[prompt.cut :]
    branch = Branch(prompt.cut, concat(prefix, group.rollouts[g].ids), score_start=len(prefix))
    return prompt.trunk, branch


def _trunks(items: Sequence[Weighted]) -> list[Trunk]:
    return [
        next(part).group.prompt.trunk
        for _, part in groupby(items, key=lambda item: id(item.group.prompt.trunk))
    ]


def _text_rows(
    packed: Packed, trunks: Sequence[Trunk], markers: Markers, device: torch.device
) -> Rows:
    hidden = [packed.trunk_rows(k, 1, len(trunk.ids)) for k, trunk in enumerate(trunks)]
    return rows(hidden, [trunk.ids[1:] for trunk in trunks], markers.ids, device)


def _tensor(parts: Sequence[np.ndarray], device: torch.device) -> Float[Tensor, " R"]:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)


def framed_batch(
    frames: Sequence[Framed], markers: Markers, device: torch.device
) -> tuple[Packed, list[Rows]]:
    """Pack framed documents. Text rows have both markers removed from the softmax, thought rows the opener only."""
    packed = pack([], [(frame.trunk, frame.branch) for frame in frames], device)
    text, thought = ([], []), ([], [])
    for b, frame in enumerate(frames):
        at = np.flatnonzero(frame.context_target)
        _add(
            text,
            packed.context_rows(b, 1, len(frame.context_target) + 1)[at - 1],
            frame.trunk.ids[at],
        )
        own = packed.branch_rows(b, 0, len(frame.branch.ids))
        for into, mask in ((text, frame.text_target), (thought, frame.thought_target)):
            _add(into, own[mask], frame.branch.ids[mask])
    kinds = [(text, markers.ids), (thought, (markers.opener,))]
    return packed, [rows(pieces[0], pieces[1], banned, device) for pieces, banned in kinds]


def _add(into: tuple[list, list], hidden: np.ndarray, target: np.ndarray) -> None:
    into[0].append(hidden)
    into[1].append(target)
