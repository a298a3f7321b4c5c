"""Vocabulary-parallel heads: each rank holds the rows [start, stop) of the weight, and all see the same rows
of hidden.

Local statistics are one small matrix a rank, gathered once in float32 and merged in the order of the ids:
every rank computes the same bits. Shares may be unequal and padded; a gap, an overlap or a stray target is
refused on every rank.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from rlpt_kernels.head import Wanted
from rlpt_kernels.softmax import Softmax

_LARGEST_EXACT = 1 << 24
"""Ids travel in float32 beside the statistics, which holds whole numbers up to here."""


def merge(local: Softmax, start: int, stop: int, wanted: Wanted, group: str) -> tuple[Softmax, int]:
    """(softmax over all shares, size of the vocabulary), the same bits on every rank.

    One all-gather of [N + 1, columns] float32: the statistics, and a last row with the rank's [start, stop).
    Raises ValueError where the shares do not make up one vocabulary.
    """
    process_group = _resolve_process_group(GroupName(group))
    mine = _packed(local, start, stop)
    everyone = mine.new_empty(process_group.size(), *mine.shape)
    dist.all_gather_single(everyone.flatten(0, 1), mine, group=process_group)
    told = everyone[:, -1, :3].tolist()
    if len({unit for _, _, unit in told}) > 1:
        raise ValueError("impl differs between ranks: some count scores in base 2, some in base e")
    shares = sorted((int(a), int(b), rank) for rank, (a, b, _) in enumerate(told))
    _check_shares(shares)
    parts = [_unpacked(everyone[rank, :-1], local.unit, wanted) for _, _, rank in shares]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    return merged, shares[-1][1]


def summed(value: Tensor, group: str) -> Tensor:
    """The sum over ranks, in place: ranks counted, or float32 gradients of hidden."""
    dist.all_reduce(value, group=_resolve_process_group(GroupName(group)))
    return value


def _packed(local: Softmax, start: int, stop: int) -> Float[Tensor, "N1 C"]:
    if stop >= _LARGEST_EXACT:
        raise ValueError(f"vocab_stop = {stop}: vocabulary-parallel heads hold fewer than 2^24 ids")
    columns = [local.max_N, local.sum_N, local.target_N]
    columns += [x for x in (local.moment_N,) if x is not None]
    if local.argmax_N is not None:
        columns.append((local.argmax_N + start).to(local.max_N.dtype))
    statistics_NC = torch.stack(columns, dim=1)
    share_1C = statistics_NC.new_zeros(1, statistics_NC.shape[1])
    share_1C[0, 0], share_1C[0, 1], share_1C[0, 2] = start, stop, local.unit
    return torch.cat([statistics_NC, share_1C])


def _unpacked(statistics_NC: Float[Tensor, "N C"], unit: float, wanted: Wanted) -> Softmax:
    columns = list(statistics_NC.unbind(dim=1))
    moment_N = columns[3] if wanted.entropy else None
    argmax_N: Int[Tensor, " N"] | None = columns[-1].long() if wanted.argmax else None
    return Softmax(columns[0], columns[1], columns[2], moment_N, argmax_N, unit)


def _check_shares(shares: list[tuple[int, int, int]]) -> None:
    expected = 0
    for start, stop, rank in shares:
        if start != expected:
            raise ValueError(
                f"vocab_start = {start} of rank {rank} in the group, but the ids before it end at {expected}: "
                f"shares of a vocabulary must follow one another; they are {[x[:2] for x in shares]}"
            )
        expected = stop
