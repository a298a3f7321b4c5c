"""Every target, in the order of the table."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import config_targets
import engine_targets
import run_targets
import shard_targets
import source_targets
from fuzzing import Target

MODULES = (config_targets, source_targets, shard_targets, run_targets, engine_targets)


def targets(scratch: Path) -> Iterator[Target]:
    """``scratch``: an empty folder where readers of files find theirs."""
    return chain.from_iterable(module.targets(scratch) for module in MODULES)
