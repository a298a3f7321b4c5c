"""Which tile each chip runs: shipped, not tuned at run time, so that a cold start is fast and a row's bits
never change.

A tile depends on the chip, the dtype and the features asked for, never on the number of rows. `python -m
rlpt_kernels.aot` compiles every entry for its chip, without one, and shows registers, spills and shared
memory.
"""

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["scan", "pull"]


@dataclass(frozen=True)
class Tile:
    """Rows x ids x width of one step of the main loop, and how it is run."""

    rows: int
    ids: int
    width: int
    warps: int
    stages: int


_WIDE = Tile(128, 256, 64, 8, 4)
_WIDE_SHALLOW = Tile(128, 256, 64, 8, 3)
_SQUARE = Tile(128, 128, 64, 8, 3)
_SQUARE_DEEP = Tile(128, 128, 64, 8, 4)
_NARROW = Tile(128, 64, 64, 8, 4)
_NARROW_SHALLOW = Tile(128, 64, 64, 8, 3)
_FLOAT32 = Tile(128, 64, 16, 8, 3)
"""float32 operands have no tensor core that multiplies them exactly: correct, and slow."""


def tile(capability: int, kernel: Kernel, *, half: bool, bent: bool) -> Tile:
    """The tile of ``capability`` (80, 90, 100, ..). ``bent``: the head has a bias or a softcap."""
    if not half:
        return _FLOAT32
    # From 120 on, chips have the shared memory and the matmul of before 90 again.
    if not 90 <= capability < 120:
        return _NARROW_SHALLOW if bent and kernel == "pull" else _SQUARE
    if capability >= 100:
        return _NARROW if bent else _SQUARE_DEEP
    if bent:
        return _SQUARE
    return _WIDE if kernel == "scan" else _WIDE_SHALLOW


def group(width: int) -> int:
    """How many row tiles share a tile of the weight: as many as the L2 (50 MB on Hopper) holds beside it."""
    return 16 if width >= 4096 else 32
