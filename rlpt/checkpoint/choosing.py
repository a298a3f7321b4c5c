"""Which checkpoint a run goes on from: the newest whose files have the hashes that its manifest says."""

from pathlib import Path

from rlpt import dist
from rlpt.checkpoint import folders
from rlpt.console import say
from rlpt.phases import CLOCK
from rlpt_data.strict import UserError


def newest_intact(run_dir: Path, world: dist.World) -> int | None:
    """The step to go on from, None where nothing is saved; what is damaged or incomplete is said and passed over.

    Raises UserError where all are: a run is not started over what somebody may put right. Collective.
    """
    if world.is_main:
        folders.mend(run_dir)
    passed: list[int] = []
    # What the main rank sees: the others may see a shared folder later.
    seen = dist.gathered([(path, folders.defect(path)) for path in folders.folders(run_dir)], world)
    for path, lacks in reversed(seen[0]):
        step = folders.step_of(path)
        reason = lacks or damage(path, world)
        if reason is None:
            if passed:
                say(
                    f"{run_dir}: going on from step {step}; steps {step + 1}-{passed[0]} are done again",
                    world.is_main,
                )
            return step
        passed.append(step)
        say(f"WARNING: {path}: {reason}; it is passed over", world.is_main)
    if passed:
        newest = folders.path_of(run_dir, passed[0]).name
        raise UserError(
            f"{run_dir}: has no complete checkpoint but {newest}, which is damaged; put it right, or remove that "
            "folder to start over"
        )
    return None


def damage(path: Path, world: dist.World) -> str | None:
    """Which files of a complete checkpoint have another hash than its manifest says. Every rank reads its share.

    Collective.
    """
    entries = folders.manifest(path)
    if any(entry.blake2b is None for entry in entries.values()):
        say(f"{path}: of an older format without hashes; sizes alone are checked", world.is_main)
        return None
    mine = dist.share(sorted(entries), world)
    found = dist.unshare([_difference(path, name, entries[name]) for name in mine], world)
    return "; ".join(reason for reason in found if reason is not None) or None


def check_intact(path: Path, world: dist.World) -> None:
    """Raises UserError where a checkpoint that somebody named is not what was saved. Collective."""
    if (reason := damage(path, world)) is not None:
        raise UserError(f"{path}: {reason}; restore it, or name another step")


def _difference(path: Path, name: str, entry: folders.Entry) -> str | None:
    CLOCK.beat()
    try:
        found = folders.entry_of(path / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found == entry:
        return None
    return f"{name} has blake2b {found.blake2b}, the manifest says {entry.blake2b}"


def set_aside(run_dir: Path, step: int) -> None:
    """Rename the folders that are newer than the step a run goes on from. Nothing is deleted."""
    for path in folders.folders(run_dir):
        if folders.step_of(path) > step:
            say(f"{path}: kept as {folders.put_aside(path).name}")
