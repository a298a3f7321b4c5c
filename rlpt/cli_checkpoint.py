"""`rlpt checkpoint list|verify|prune|reshard`; like all commands they hold no logic."""

from pathlib import Path

import click

from rlpt.cli_options import InOrder, finish, json_option, run_argument, show


@click.group(cls=InOrder)
def checkpoint() -> None:
    """Look at the checkpoints of a run, check them, thin them out."""


@checkpoint.command("list")
@run_argument
@json_option
def list_checkpoints(run_dir: Path, as_json: bool) -> None:
    """Name what lies in the checkpoints folder of RUN: step, stage, size, age, complete or damaged."""
    from rlpt.checkpoint.keeping import listed
    from rlpt.checkpoint.shown import table

    found = listed(run_dir)
    show(table(found))
    finish({"checkpoints": found}, as_json)


@checkpoint.command()
@click.argument("reference", metavar="RUN[@STEP]")
@json_option
def verify(reference: str, as_json: bool) -> None:
    """Read every file of a checkpoint, or of all of RUN, and compare it with what was saved.

    Hashes, the progress record, and the shape and type of every tensor. Exits 1 if any is damaged.
    """
    from rlpt.checkpoint.keeping import verified

    found = verified(reference)
    for path, defects in found.items():
        click.echo(f"{path}: {'; '.join(defects) or 'intact'}")
    finish({"checkpoints": found}, as_json)
    if any(found.values()):
        click.get_current_context().exit(1)


@checkpoint.command()
@run_argument
@click.option("--keep-last", type=click.IntRange(1), required=True, help="The newest so many stay.")
@click.option(
    "--keep-every",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Those whose step is a multiple of it stay, too; 0: none.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@json_option
def prune(run_dir: Path, keep_last: int, keep_every: int, dry_run: bool, as_json: bool) -> None:
    """Remove checkpoints of RUN, and what damaged and unfinished ones left.

    The newest intact one always stays.
    """
    from rlpt.checkpoint.keeping import pruned

    found = pruned(run_dir, keep_last, keep_every, dry_run)
    for name in found["removed"]:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    click.echo(f"{found['bytes']:,} bytes {'would be' if dry_run else 'are'} free again")
    finish(found | {"dry_run": dry_run}, as_json)


@checkpoint.command()
@click.argument("reference", metavar="RUN@STEP")
@click.option("--ranks", type=click.IntRange(1), required=True, help="As if so many had saved it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new run folder.")
@json_option
def reshard(reference: str, ranks: int, out: Path, as_json: bool) -> None:
    """Rewrite a checkpoint as even files of another number of ranks, compared bit for bit.

    No run needs it, since a run goes on with any number of ranks; it is for readers that want fewer
    files, or more of them.
    """
    from rlpt.checkpoint.resharding import resharded

    path = resharded(reference, ranks, out)
    click.echo(f"resharded: {path}")
    finish({"out": path}, as_json)
