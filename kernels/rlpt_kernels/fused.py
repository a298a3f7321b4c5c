"""The fused forward in Triton, and a backward of vocabulary slabs around it: nothing of size N x V is ever written.

The forward leaves (max, sum, target, moment) of every tile, 16 bytes a row, and a second kernel
folds them in a fixed order: bitwise deterministic, and a row's numbers do not depend on the other rows. The
backward writes the gradient of one slab of logits and hands it to two library matmuls.

Index arithmetic: a tile's corner and a tile's partials are reached by 64-bit offsets; inside a tile offsets stay
below 256 x stride.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt_kernels import tiles
from rlpt_kernels.head import Gradients, Needs, Problem, Wanted
from rlpt_kernels.launch import (
    banned_pointers,
    bias_pointer,
    capability,
    interpreted,
    launching,
    programs,
)
from rlpt_kernels.matmul import add_product, product
from rlpt_kernels.notes import once
from rlpt_kernels.softmax import BASE_2, Pull, Softmax, concatenated
from rlpt_kernels.tiles import Tile

ROWS = 16384
"""Rows per launch of the forward: bounds the partials at 150 MB for 152k ids in tiles of 256, 620 MB in tiles of 64."""
SLAB = 8192
"""Ids per slab of the backward."""


class Fused:
    """See the module."""

    def unit(self, problem: Problem, wanted: Wanted) -> float:
        """Base 2: exp2 is what the hardware has."""
        return BASE_2

    def scan(self, problem: Problem, wanted: Wanted) -> Softmax:
        """The softmax of every row."""
        problem = _laid_out(problem)
        firsts = range(0, max(len(problem.target_N), 1), ROWS)
        return concatenated([_scan(problem.of_rows(slice(n, n + ROWS)), wanted) for n in firsts])

    def count(self, problem: Problem, threshold_N: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
        """How many scores are above a threshold in base 2 that `scan` has found, by the same tile: the same bits."""
        problem, above_N = _laid_out(problem), torch.zeros_like(problem.target_N)
        for first in range(0, len(above_N), ROWS):
            rows = slice(first, first + ROWS)
            above_N[rows] = _count(problem.of_rows(rows), threshold_N[rows].contiguous())
        return above_N

    def pull(self, problem: Problem, pull: Pull, needs: Needs) -> Gradients:
        """From the gradients of the outputs to those of the inputs."""
        found, ready = Gradients.zeros(problem, needs), _laid_out(problem)
        if not len(problem.target_N):
            return found
        width = min(SLAB, -(-len(problem.weight_VD) // 128) * 128)
        size = (len(problem.target_N), width)
        buffer_NS = problem.hidden_ND.new_empty(size, dtype=problem.operand_dtype)
        for start in range(0, len(problem.weight_VD), width):
            ids = slice(start, start + width)
            d_raw_NS = _pull(_slab(ready, ids), pull, start, buffer_NS)
            if found.hidden_ND is not None:
                add_product(found.hidden_ND, d_raw_NS, problem.weight_VD[ids])
            if found.weight_VD is not None:
                found.weight_VD[ids] = product(d_raw_NS.T, problem.hidden_ND, problem.dtype)
            if found.bias_V is not None:
                found.bias_V[ids] = d_raw_NS.sum(dim=0, dtype=problem.dtype)
        return found


def _laid_out(problem: Problem) -> Problem:
    """Operands of one dtype in rows of a multiple of 16 values that start at a multiple of 16 bytes.

    That is what bulk and asynchronous copies need. The columns that are added are 0 and change no product.
    """
    hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
    if hidden_ND.dtype != weight_VD.dtype:
        hidden_ND, weight_VD = hidden_ND.to(problem.dtype), weight_VD.to(problem.dtype)
    return replace(
        problem, hidden_ND=_ready(hidden_ND, "hidden"), weight_VD=_ready(weight_VD, "weight")
    )


def _ready(matrix: Tensor, name: str) -> Tensor:
    step, width = matrix.stride(0), matrix.shape[1]
    # A step of 0 is an expanded row, which a descriptor cannot say.
    whole = width % 16 == 0 and step % 16 == 0 and step >= width and matrix.stride(1) == 1
    if whole and matrix.data_ptr() % 16 == 0:
        return matrix
    once(
        f"triton: copies {name} at each call, whose rows of {matrix.shape[1]} values are not aligned to 16"
    )
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 16)).contiguous()


def _slab(problem: Problem, ids: slice) -> Problem:
    """The head over some of the ids. Targets stay as they are; the kernel is told where the slab starts."""
    columns = problem.head.columns(ids.start, ids.stop - ids.start)
    bias_V = None if problem.bias_V is None else problem.bias_V[ids]
    head = replace(problem.head, banned=(), banned_B=columns)
    return replace(problem, weight_VD=problem.weight_VD[ids], bias_V=bias_V, head=head)


def _scan(problem: Problem, wanted: Wanted) -> Softmax:
    from rlpt_kernels import triton_kernels as device_code

    rows, tile = len(problem.target_N), _tile(problem, "scan")
    if not rows:
        return Softmax.empty(problem, wanted.entropy, wanted.argmax)
    count, width = -(-len(problem.weight_VD) // tile.ids), 4 if wanted.entropy else 3
    partial = problem.hidden_ND.new_empty(count, width, rows, dtype=torch.float32)
    index = partial.new_empty(count if wanted.argmax else 0, rows, dtype=torch.int32)
    _sweep(
        problem, tile, None, partial, index, ENTROPY=wanted.entropy, ARGMAX=wanted.argmax,
        COUNT=False,
    )  # fmt: skip
    found = partial.new_empty(width, rows)
    argmax_N = torch.empty_like(problem.target_N) if wanted.argmax else None
    with launching(partial.device):
        cast(Any, device_code.combine_kernel)[(-(-rows // 16),)](
            partial, index, found, argmax_N, rows, count,
            ENTROPY=wanted.entropy, ARGMAX=wanted.argmax, ROWS=16, TILES=64, num_warps=4,
        )  # fmt: skip
    return Softmax(
        found[0], found[1], found[2], found[3] if wanted.entropy else None, argmax_N, BASE_2
    )


def _count(problem: Problem, threshold_N: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    tile = _tile(problem, "scan")
    count = -(-len(problem.weight_VD) // tile.ids)
    index = torch.empty(count, len(threshold_N), dtype=torch.int32, device=threshold_N.device)
    _sweep(problem, tile, threshold_N, None, index, ENTROPY=False, ARGMAX=False, COUNT=True)
    return index.sum(dim=0)


def _sweep(
    problem: Problem,
    tile: Tile,
    threshold_N: Tensor | None,
    partial: Tensor | None,
    index: Tensor,
    **features: bool,
) -> None:
    from rlpt_kernels import triton_kernels as device_code

    hidden, weight = _operands(problem, tile)
    with launching(index.device):
        cast(Any, device_code.scan_kernel)[_grid(problem, tile)](
            hidden, weight, problem.hidden_ND.stride(0), problem.weight_VD.stride(0), problem.target_N,
            problem.head.scale(problem.hidden_ND, BASE_2), bias_pointer(problem),
            *banned_pointers(problem, tile.ids), threshold_N, partial, index, *_sizes(problem),
            problem.head.softcap or 1.0,
            BANNED=problem.head.banned_B is not None, **features, **_settings(problem, tile),
        )  # fmt: skip


def _pull(slab: Problem, pull: Pull, start: int, buffer_NS: Tensor) -> Float[Tensor, "N S"]:
    """The gradient of one slab of logits, in the operands' dtype."""
    from rlpt_kernels import triton_kernels as device_code

    tile = _tile(slab, "pull")
    hidden, weight = _operands(slab, tile)
    d_raw_NS = buffer_NS[:, : len(slab.weight_VD)]
    with launching(buffer_NS.device):
        cast(Any, device_code.pull_kernel)[_grid(slab, tile)](
            hidden, weight, slab.hidden_ND.stride(0), slab.weight_VD.stride(0), slab.target_N - start,
            slab.head.scale(slab.hidden_ND, BASE_2), bias_pointer(slab), pull.packed(),
            _descriptor(d_raw_NS, tile.rows, tile.ids) if tma(slab) else d_raw_NS, d_raw_NS.stride(0),
            *_sizes(slab), slab.head.softcap or 1.0, ENTROPY=pull.entropy_factor_N is not None,
            **_settings(slab, tile),
        )  # fmt: skip
    if slab.head.banned_B is not None:
        # The kernel does not know of bans, and may have left an overflow there; no gradient comes from a banned id.
        d_raw_NS.index_fill_(1, slab.head.banned_B, 0.0)
    return d_raw_NS


def tma(problem: Problem) -> bool:
    """Whether the chip copies tiles in bulk, by descriptor; else they are loaded by pointer."""
    return capability(problem.hidden_ND.device) >= 90


def _operands(problem: Problem, tile: Tile) -> tuple[Any, Any]:
    if not tma(problem):
        return problem.hidden_ND, problem.weight_VD
    hidden = _descriptor(problem.hidden_ND, tile.rows, tile.width)
    return hidden, _descriptor(problem.weight_VD, tile.ids, tile.width)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    # Made on the host: a descriptor made on the device needs an allocator that the autograd thread does not see.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _tile(problem: Problem, kernel: tiles.Kernel) -> Tile:
    bent = problem.bias_V is not None or problem.head.softcap is not None
    half, chip = problem.hidden_ND.dtype != torch.float32, capability(problem.hidden_ND.device)
    return tiles.tile(chip, kernel, half=half, bent=bent)


def _grid(problem: Problem, tile: Tile) -> tuple[int]:
    rows, ids = len(problem.target_N), len(problem.weight_VD)
    return (programs(problem.hidden_ND.device, -(-rows // tile.rows) * -(-ids // tile.ids)),)


def _sizes(problem: Problem) -> tuple[int, int, int]:
    vocab, width = problem.weight_VD.shape
    return len(problem.target_N), vocab, width


def _settings(problem: Problem, tile: Tile) -> dict[str, Any]:
    return {
        "TMA": tma(problem),
        # The interpreter multiplies the bit patterns of bfloat16.
        "UPCAST": interpreted(),
        "PRECISION": "ieee",
        "BIAS": problem.bias_V is not None,
        "SOFTCAP": problem.head.softcap is not None,
        "BM": tile.rows,
        "BN": tile.ids,
        "BK": tile.width,
        "GROUP": tiles.group(problem.hidden_ND.shape[1]),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
