"""What every launch of a Triton kernel needs: where it may run, and pointers it can read."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from rlpt_kernels.head import Problem


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined: they then run on CPU tensors, slowly."""
    from rlpt_kernels.triton_kernels import scan_kernel

    return type(scan_kernel).__name__ == "InterpretedFunction"


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run there, and the remedy; None where they can."""
    try:
        here = interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton==3.7.1, or choose slabs"
    if device.type != "cuda":
        remedy = (
            "move the tensors to a GPU, choose slabs, or set TRITON_INTERPRET=1 before the import"
        )
        return None if here else f"tensors are on {device}; {remedy}"
    if capability(device) < 80:
        return f"{device} has compute capability {capability(device) / 10}; it must be 8.0 or more: choose slabs"
    return None


def capability(device: torch.device) -> int:
    """80, 90, 100, ..; the interpreter plays the part of a Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def programs(device: torch.device, tiles: int) -> int:
    """How many programs share the tiles: one for each multiprocessor."""
    here = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )
    return min(here, tiles)


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Kernels go to the current device: make it the tensors' own."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def bias_pointer(problem: Problem) -> Float[Tensor, " V"]:
    """The bias in float32, or something to point at that is never read."""
    if problem.bias_V is None:
        return problem.hidden_ND.new_empty(0, dtype=torch.float32)
    return problem.bias_V.float().contiguous()


def keep_pointer(problem: Problem) -> Int8[Tensor, " V"]:
    """1 for each id inside the softmax, 0 for each that is banned; empty where none are."""
    banned_B = problem.head.banned_B
    if banned_B is None:
        return problem.hidden_ND.new_empty(0, dtype=torch.int8)
    keep_V = problem.hidden_ND.new_ones(len(problem.weight_VD), dtype=torch.int8)
    return keep_V.index_fill_(0, banned_B, 0)


def banned_pointers(problem: Problem, ids: int) -> tuple[Int32[Tensor, " B"], Int32[Tensor, " T"]]:
    """The banned ids in order, and where in them each tile of ``ids`` ids begins and ends; empty without bans."""
    like, banned_B = problem.hidden_ND, problem.head.banned_B
    if banned_B is None:
        return like.new_empty(0, dtype=torch.int32), like.new_empty(0, dtype=torch.int32)
    tiles = -(-len(problem.weight_VD) // ids)
    border_T = torch.arange(tiles + 1, device=like.device) * ids
    return banned_B.int(), torch.searchsorted(banned_B, border_T, out_int32=True)
