"""What lies where shards shall go: nothing, these shards, other shards, or something else."""

from pathlib import Path
from typing import Any

from rlpt_data.manifest import NAME, Manifest, digest, read_manifest
from rlpt_data.plan import Plan
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError
from rlpt_data.work import remove_leftovers, say

FAILED = "failed_unit"
"""The reason of drops that stand for units which could not be read."""


def input_hash(plan: Plan) -> str | None:
    """Of everything outside the configuration that the bytes depend on; None: unknown."""
    hashes = [found.blake2b for found in plan.inputs]
    if None in hashes:
        return None
    parts = [*sorted(map(str, hashes)), *(f"{k}={v}" for k, v in plan.resources.items())]
    return digest(" ".join(parts).encode())


def check_target(out: Path) -> None:
    """Raises UserError for a folder that is something else, and for a URL."""
    if out.parts and out.parts[0].endswith(":"):
        raise UserError(
            f"{out}: shards are written to this machine; choose a folder, upload it after"
        )
    if (
        out.exists()
        and not (out / NAME).is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise UserError(f"{out}: not a shard folder, so it is not touched; choose another out")


def present_shards(out: Path, plan: Plan, overwrite: bool) -> Manifest | None:
    """The manifest of a folder that needs no work; None: write it.

    Raises UserError where it holds shards of another plan and ``overwrite`` is False.
    """
    if overwrite or not (out / NAME).is_file():
        return None
    found = read_manifest(out)
    change = _difference(found, plan.config, input_hash(plan))
    then, now = found.config.get("recipe"), plan.config["recipe"]
    if then is not None and then != now:
        raise UserError(
            f"{out}: shards of another version; this one would write others (recipe {then}, now "
            f"{now}); use them as they are, or give --overwrite or another out"
        )
    if change:
        raise UserError(f"{out}: holds other shards ({change}); give --overwrite or another out")
    if found.drops.get(FAILED):
        say(f"{out}: some units could not be read; trying them again")
        return None
    try:
        ShardFolder.open(out)
    except UserError as error:
        say(f"{error}: writing it again")
        return None
    say(f"{out}: already prepared from this corpus and configuration")
    remove_leftovers(out)
    return found


def _difference(found: Manifest, table: dict[str, Any], corpus: str | None) -> str | None:
    keys = sorted(key for key in table if found.config.get(key) != table[key])
    if keys:
        return f"another {', '.join(keys)}"
    if corpus is None:
        return "the source cannot tell whether its corpus is the same"
    return "the corpus has changed" if found.input_hash != corpus else None
