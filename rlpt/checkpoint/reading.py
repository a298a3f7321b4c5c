"""Checkpoints come back: in place, on any number of ranks, or the weights alone."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from rlpt import dist
from rlpt.checkpoint.choosing import check_intact
from rlpt.checkpoint.folders import manifest, read_progress
from rlpt.checkpoint.metadata import Planner, Reader
from rlpt.policy.policy import Policy
from rlpt_data.strict import UserError


def state_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Named parts -> the nested state that DCP reads and writes."""
    state: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Policy):
            state[name] = {key: value.detach() for key, value in part.named_parameters()}
        elif isinstance(part, tuple):
            state[name] = get_optimizer_state_dict(*part)
        else:
            state[name] = part
    return state


def restore(path: Path, parts: Mapping[str, Any]) -> None:
    """Read the parts back in place, on any number of ranks. Raises UserError where they are damaged. Collective."""
    state = state_of(parts)
    read_into(state, path)
    for name, part in parts.items():
        if isinstance(part, tuple):
            set_optimizer_state_dict(*part, optim_state_dict=state[name])


def read_into(state: dict[str, Any], path: Path) -> None:
    """Fill a nested state with what a checkpoint has of it. Raises UserError where that cannot be read. Collective."""
    try:
        _quietly(lambda: dcp_load(state, storage_reader=Reader(path), planner=Planner()))
    except CheckpointException as error:
        cause = error.failures[min(error.failures)][0]
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(
            f"{path}: cannot be read: {type(cause).__name__}: {cause}; restore it, or use another checkpoint"
        ) from error


def files(path: Path, prefix: str) -> list[tuple[str, bytes]]:
    """Files of a checkpoint that single ranks wrote, as its manifest has them: (path, contents)."""
    names = [name for name in sorted(manifest(path)) if name.startswith(prefix)]
    return [(str(path / name), (path / name).read_bytes()) for name in names]


def check_tokenizer(path: Path, tokenizer: str) -> None:
    """Raises UserError where a checkpoint knows the ids of another tokenizer than that of the given hash."""
    if (known := read_progress(path).tokenizer) != tokenizer:
        raise UserError(
            f"{path}: its tokenizer has hash {known}, the shards' has {tokenizer}; use the shards it was trained on, "
            "or prepare new ones with that run's tokenizer"
        )


def load_weights(path: Path, policy: Policy, tokenizer: str, world: dist.World) -> None:
    """The policy's weights alone. Raises UserError where they are another model's, of another tokenizer, or damaged.

    Collective.
    """
    check_tokenizer(path, tokenizer)
    check_intact(path, world)
    stored = Reader(path).read_metadata().state_dict_metadata
    for name, parameter in policy.named_parameters():
        found = getattr(stored.get(f"policy.{name}"), "size", None)
        if found != parameter.shape:
            has = "is absent" if found is None else f"has shape {tuple(found)}"
            raise UserError(
                f"{path}: tensor {name} {has}, this policy needs {tuple(parameter.shape)}; give [policy] the "
                "architecture of the run it starts from"
            )
    restore(path, {"policy": policy})


def _quietly(call: Any) -> None:
    with warnings.catch_warnings():
        # DCP warns of its own deprecated internals and of running without several ranks.
        warnings.simplefilter("ignore")
        call()
