"""Groups -> micro-batches of whole documents, as rows of one forward: what is trained, and what rewards are read from.

Denominators are not here: weights arrive with the counts of the whole step, over all micro-batches and ranks, so a
gradient does not depend on how the step was split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlpt import dist
from rlpt.frames import Framed
from rlpt.policy.packing import Layout, Packed, Rows, pack, rows
from rlpt.types import Branch, Group, Markers, Trunk, bare_branch, concat


@dataclass(frozen=True)
class Wanted:
    """Which rows a micro-batch has beside the actions."""

    continuations: bool
    """Held-out tokens after every thought, and after none: for rewards, and for the gold term."""
    text: bool
    """Every token of every trunk, once: for the next-token term."""
    targets: bool = True
    """Whether held-out tokens are among them."""


@dataclass(frozen=True)
class RolloutBatch:
    """One micro-batch of the RL stage, without anything that a reward decides."""

    packed: Packed
    actions: Rows
    counts: tuple[int, ...]
    """Actions of every rollout, group by group."""
    behaviour_logp_R: Float[Tensor, " R"]
    current_R: Bool[Tensor, " R"]
    """Actions that the very weights of this step sampled."""
    watched_R: Bool[Tensor, " R"]
    """Actions that were sampled after the prompt that is trained: of the others behaviour is no measure."""
    horizons: tuple[int, ...]
    """Held-out tokens after every rollout."""
    continuations: Rows | None
    no_think: Rows | None
    text: Rows | None


def documents(groups: Sequence[Group]) -> list[list[int]]:
    """Indices of groups, by document: its cuts stay together, and so do a paragraph and its masks."""
    found: dict[tuple[int, str], list[int]] = {}
    for p, group in enumerate(groups):
        found.setdefault(group.prompt.key[:2], []).append(p)
    return list(found.values())


def by_trunk(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of every trunk, in the order of `trunks_of`."""
    found: dict[int, list[Group]] = {}
    for group in groups:
        found.setdefault(id(group.prompt.trunk), []).append(group)
    return list(found.values())


def trunks_of(groups: Sequence[Group]) -> list[Trunk]:
    """The trunks of groups, each once, in order."""
    return list({id(group.prompt.trunk): group.prompt.trunk for group in groups}.values())


def split_evenly(costs: Sequence[int], budget: int, world: dist.World) -> list[list[int]]:
    """Indices into micro-batches of about equal cost, each within ``budget`` or of one document: as few as the fullest
    rank needs, the same number on all ranks, none empty where every rank has as many documents. Collective.
    """
    count = max(1, min(len(costs), -(-sum(costs) // budget)))
    while count < len(costs) and max(_loads(_dealt(costs, count), costs)) > budget:
        count += 1
    return _dealt(costs, dist.largest(count, world))


def split_padded(lengths: Sequence[int], budget: int, world: dist.World) -> list[list[int]]:
    """Indices of sequences into micro-batches of like lengths, each within ``budget`` tokens with its padding, or of
    one sequence; the same number on all ranks, none empty where every rank has as many sequences. Collective.
    """
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not bins or (len(bins[-1]) + 1) * lengths[bins[-1][0]] > budget:
            bins.append([])
        bins[-1].append(i)
    for _ in range(dist.largest(len(bins), world) - len(bins)):
        fullest = max(bins, key=len)
        bins.append(fullest[len(fullest) // 2 :])
        del fullest[len(fullest) // 2 :]
    return bins


def _dealt(costs: Sequence[int], count: int) -> list[list[int]]:
    """Longest first into the emptiest bin: no bin holds more than 4/3 of the best split (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen = min(range(count), key=lambda b: (loads[b], len(bins[b])))
        bins[chosen].append(i)
        loads[chosen] += costs[i]
    return [sorted(each) for each in bins]


def _loads(bins: Sequence[Sequence[int]], costs: Sequence[int]) -> list[int]:
    return [sum(costs[i] for i in each) for each in bins]


def padded_costs(documents: Sequence[Sequence[Group]], wanted: Wanted, layout: Layout) -> list[int]:
    """Tokens that every document fills in any micro-batch of these; naive: with its padding to the longest of them."""
    if layout == "shared":
        return [document_cost(groups, wanted, layout) for groups in documents]
    widest, counts = 0, []
    for groups in documents:
        paths = [
            branch.cut + len(branch.ids)
            for group in groups
            for g in range(len(group.rollouts))
            for _, branch in [_branch(group, g, wanted)]
        ]
        paths += [branch.cut + len(branch.ids) for _, branch in bare_pairs(groups, wanted)]
        if wanted.continuations or wanted.text:
            paths += [len(trunk.ids) for trunk in trunks_of(groups)]
        widest = max(widest, *paths)
        counts.append(len(paths))
    return [count * widest for count in counts]


def document_cost(groups: Sequence[Group], wanted: Wanted, layout: Layout) -> int:
    """Tokens that the groups of one document compute, padding left out."""
    return sum(_trunk_cost(part, wanted, layout) for part in by_trunk(groups))


def _trunk_cost(groups: Sequence[Group], wanted: Wanted, layout: Layout) -> int:
    trunk = groups[0].prompt.trunk
    branches = [
        _branch(group, g, wanted)[1] for group in groups for g in range(len(group.rollouts))
    ]
    branches += [branch for _, branch in bare_pairs(groups, wanted)]
    own = sum(len(branch.ids) for branch in branches)
    whole = len(trunk.ids) if wanted.continuations or wanted.text else 0
    if layout == "naive":
        return own + whole + sum(branch.cut for branch in branches)
    return own + max(whole, *(branch.cut for branch in branches))


def rollout_batch(
    groups: Sequence[Group],
    markers: Markers,
    device: torch.device,
    layout: Layout,
    wanted: Wanted,
    version: int,
    temperature: float = 1.0,
) -> RolloutBatch:
    """Pack the rollouts of whole groups; action rows leave out forced closers and the opener.

    ``version`` is that of the weights which are trained, ``temperature`` the one that actions were sampled at.
    """
    pairs = [_branch(group, g, wanted) for group in groups for g in range(len(group.rollouts))]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    trunks = trunks_of(groups) if wanted.continuations or wanted.text else []
    packed = pack(trunks, pairs + bare_pairs(groups, wanted), device, layout)
    at = [np.flatnonzero(rollout.action) for rollout in rollouts]
    hidden = [
        packed.branch_rows(b, branch.score_start, len(branch.ids))[kept]
        for b, ((_, branch), kept) in enumerate(zip(pairs, at, strict=True))
    ]
    chosen = list(zip(rollouts, at, strict=True))
    sampled = [r.ids[kept] for r, kept in chosen]
    actions = rows(hidden, sampled, (markers.opener,), device, temperature)
    behaviour = concat_floats([r.logp[kept] for r, kept in chosen], device)
    current = np.concatenate([r.version[kept] == version for r, kept in chosen])
    plain = [not group.hinted for group in groups for _ in group.rollouts]
    watched = np.repeat(plain, [len(kept) for kept in at])
    held_out = wanted.continuations
    return RolloutBatch(
        packed,
        actions,
        tuple(len(kept) for kept in at),
        behaviour,
        torch.from_numpy(current).to(device),
        torch.from_numpy(watched).to(device),
        tuple(group.prompt.horizon for group in groups for _ in group.rollouts),
        _continuation_rows(packed, groups, markers, device) if held_out else None,
        _no_think_rows(packed, trunks, groups, markers, device) if held_out else None,
        _text_rows(packed, text_positions(groups, wanted), markers, device)
        if wanted.text
        else None,
    )


def _branch(group: Group, g: int, wanted: Wanted) -> tuple[Trunk, Branch]:
    """The branch of one rollout; ``score_start`` is where its own tokens begin, after the opener."""
    prompt = group.prompt
    prefix = prompt.policy_ids[prompt.cut :]
    after = concat(prompt.frame.bridge, prompt.continuation_ids) if wanted.continuations else ()
    ids = concat(prefix, group.rollouts[g].ids, after)
    return prompt.trunk, Branch(prompt.cut, ids, score_start=len(prefix))


def framed(groups: Sequence[Group]) -> bool:
    """Whether held-out text without a thought is no part of the trunk, because a frame stands before it."""
    return any(group.prompt.frame.between for group in groups)


def bare_pairs(groups: Sequence[Group], wanted: Wanted) -> list[tuple[Trunk, Branch]]:
    """Held-out text without a thought, where it takes branches of its own."""
    if not wanted.continuations or not framed(groups):
        return []
    return [(group.prompt.trunk, bare_branch(group.prompt)) for group in groups]


def _continuation_rows(
    packed: Packed, groups: Sequence[Group], markers: Markers, device: torch.device
) -> Rows:
    hidden, target, b = [], [], 0
    for group in groups:
        # A reward that scores the held-out text has no prediction between closer and continuation.
        for rollout in group.rollouts:
            start = len(group.prompt.policy_ids) - group.prompt.cut + len(rollout.ids)
            start += len(group.prompt.frame.bridge)
            hidden.append(packed.branch_rows(b, start, start + group.prompt.horizon))
            target.append(group.prompt.continuation_ids)
            b += 1
    return rows(hidden, target, markers.ids, device)


def _no_think_rows(
    packed: Packed,
    trunks: Sequence[Trunk],
    groups: Sequence[Group],
    markers: Markers,
    device: torch.device,
) -> Rows:
    order = {id(trunk): k for k, trunk in enumerate(trunks)}
    prompts = [group.prompt for group in groups]
    if framed(groups):
        first = sum(len(group.rollouts) for group in groups)
        starts = [len(prompt.frame.between) for prompt in prompts]
        hidden = [
            packed.branch_rows(first + k, start, start + prompt.horizon)
            for k, (start, prompt) in enumerate(zip(starts, prompts, strict=True))
        ]
    else:
        hidden = [packed.trunk_rows(order[id(p.trunk)], p.cut, p.cut + p.horizon) for p in prompts]
    return rows(hidden, [p.continuation_ids for p in prompts], markers.ids, device)


def text_positions(groups: Sequence[Group], wanted: Wanted) -> list[tuple[Trunk, np.ndarray]]:
    """Every trunk of the groups with the positions, int64, that the next-token term trains on."""
    found = []
    for part in by_trunk(groups):
        trunk = part[0].prompt.trunk
        free = np.ones(len(trunk.ids), dtype=bool)
        # The first has no context, and a frame is no text.
        free[: max(1, trunk.head)] = False
        for prompt in [group.prompt for group in part] if not wanted.targets else ():
            free[prompt.cut : prompt.cut + prompt.horizon] = False
        found.append((trunk, np.flatnonzero(free)))
    return found


def _text_rows(
    packed: Packed,
    positions: Sequence[tuple[Trunk, np.ndarray]],
    markers: Markers,
    device: torch.device,
) -> Rows:
    hidden = [
        packed.trunk_rows(k, 1, len(trunk.ids))[at - 1] for k, (trunk, at) in enumerate(positions)
    ]
    return rows(hidden, [trunk.ids[at] for trunk, at in positions], markers.ids, device)


def concat_floats(parts: Sequence[np.ndarray], device: torch.device) -> Float[Tensor, " R"]:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)


def action_pairs(groups: Sequence[Group]) -> list[tuple[Trunk, Branch]]:
    """The sampled tokens of every rollout, to be scored as they were sampled."""
    wanted = Wanted(continuations=False, text=False)
    return [_branch(group, g, wanted) for group in groups for g in range(len(group.rollouts))]


def per_action(
    value_PG: Float[np.ndarray, "P G"], counts: Sequence[int], device: torch.device
) -> Float[Tensor, " R"]:
    """The number of every rollout, repeated for its actions."""
    return torch.from_numpy(np.repeat(value_PG.reshape(-1), counts).astype(np.float32)).to(device)


def framed_batch(
    frames: Sequence[Framed], markers: Markers, device: torch.device
) -> tuple[Packed, list[Rows]]:
    """Pack framed documents. Text rows have both markers removed from the softmax, thought rows the opener only.

    Every frame is a document of its own: there is no trunk to share.
    """
    packed = pack([], [(frame.trunk, frame.branch) for frame in frames], device, "naive")
    text, thought = ([], []), ([], [])
    for b, frame in enumerate(frames):
        at = np.flatnonzero(frame.context_target)
        _add(
            text,
            packed.context_rows(b, 1, len(frame.context_target) + 1)[at - 1],
            frame.trunk.ids[at],
        )
        # Without a trunk the first token has no context, and is no target.
        first = 0 if frame.branch.cut else 1
        own, ids = packed.branch_rows(b, first, len(frame.branch.ids)), frame.branch.ids[first:]
        for into, mask in ((text, frame.text_target), (thought, frame.thought_target)):
            _add(into, own[mask[first:]], ids[mask[first:]])
    kinds = [(text, markers.ids), (thought, (markers.opener,))]
    return packed, [rows(pieces[0], pieces[1], banned, device) for pieces, banned in kinds]


def _add(into: tuple[list, list], hidden: np.ndarray, target: np.ndarray) -> None:
    into[0].append(hidden)
    into[1].append(target)
