"""Checkpoints: named stateful parts through DCP, a progress record, and a marker that is written last.

`folders` says what lies where and when it is complete, `saving` writes beside the training, `choosing` says which one
a run goes on from, `reading` brings it back.
"""

from rlpt.checkpoint.choosing import check_intact, newest_intact, set_aside
from rlpt.checkpoint.folders import (
    MARKER,
    Progress,
    complete_steps,
    defect,
    find,
    path_of,
    read_progress,
    step_of,
)
from rlpt.checkpoint.reading import check_tokenizer, files, load_weights, restore
from rlpt.checkpoint.saving import Saver

__all__ = [
    "MARKER",
    "Progress",
    "Saver",
    "check_intact",
    "check_tokenizer",
    "complete_steps",
    "defect",
    "files",
    "find",
    "load_weights",
    "newest_intact",
    "path_of",
    "read_progress",
    "restore",
    "set_aside",
    "step_of",
]
