"""The commands `rlpt data ...`: corpus -> shards. As in `rlpt.cli`, each imports in its body."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from rlpt.cli_options import (
    InOrder,
    conclude,
    config_argument,
    finish,
    folder_argument,
    json_option,
    set_option,
    show,
)


@click.group(cls=InOrder)
def data() -> None:
    """Corpus -> shards: prepare, inspect, stats, merge, index, annotate, export-pairs, verify."""


@data.command()
@config_argument
@set_option
@click.option("--overwrite", is_flag=True, help="Replace a folder prepared from another config.")
@json_option
def prepare(config: Path, overrides: Sequence[str], overwrite: bool, as_json: bool) -> None:
    """Turn the corpus that CONFIG names into a folder of shards.

    Interrupted, it goes on where it was. Exits 1 if a part of the corpus could not be read.
    """
    from rlpt_data.prepare import PrepareConfig
    from rlpt_data.prepare import prepare as prepare_shards
    from rlpt_data.strict import load

    settings = load(PrepareConfig, config, overrides)
    manifest = prepare_shards(settings, overwrite=overwrite)
    counts = {split: count.model_dump() for split, count in manifest.counts.items()}
    conclude({"out": settings.out, "hash": manifest.hash, "counts": counts}, as_json)
    if failed := manifest.drops.get("failed_unit"):
        click.echo(f"{failed} units of the corpus could not be read; run it again", err=True)
        click.get_current_context().exit(1)


@data.command()
@folder_argument
@click.option(
    "--html", type=click.Path(path_type=Path), help="Where the datasheet goes; default: DIR.html."
)
@json_option
def inspect(folder: Path, html: Path | None, as_json: bool) -> None:
    """Show counts, drops and a few documents of shards, and write their datasheet.

    What was dropped comes with its reason and samples, a document with its candidate cuts.
    """
    from rlpt_data import datasheet
    from rlpt_data.prepare import inspect as inspect_shards
    from rlpt_data.prepare import render_inspect

    found = inspect_shards(folder)
    show(render_inspect(found))
    html = html or datasheet.default_path(folder)
    datasheet.write(folder, html)
    click.echo(f"datasheet: {html}")
    finish(found | {"datasheet": str(html)}, as_json)


@data.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@json_option
def stats(folders: Sequence[str], as_json: bool) -> None:
    """Count documents, tokens, cuts, lengths and domains of shards, split by split."""
    from rlpt_data.stats import render_stats
    from rlpt_data.stats import stats as stats_of

    found = [stats_of(folder) for folder in folders]
    for each in found:
        show(render_stats(each))
    finish({"folders": found}, as_json)


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folders", metavar="IN...", nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace a folder of shards that is there.")
@json_option
def merge(out: Path, folders: Sequence[str], overwrite: bool, as_json: bool) -> None:
    """Write the documents of the folders IN, which have one tokenizer, as the folder OUT.

    No text is in it twice, and what one folder holds out is in no other's train split.
    """
    from rlpt_data.merging import merge as merge_shards

    manifest = merge_shards(out, folders, overwrite=overwrite)
    counts = {split: count.model_dump() for split, count in manifest.counts.items()}
    drops = {name: manifest.drops.get(name, 0) for name in ("duplicate", "held_out_elsewhere")}
    conclude({"out": out, "hash": manifest.hash, "counts": counts, "dropped": drops}, as_json)


@data.command()
@config_argument
@set_option
@json_option
def index(config: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Turn the evaluation sets that CONFIG names into an index for decontamination."""
    from rlpt_data.contamination import IndexConfig, build_index
    from rlpt_data.strict import load

    conclude(build_index(load(IndexConfig, config, overrides)), as_json)


@data.command()
@folder_argument
@click.option("--model", required=True, type=click.Path(path_type=Path), help="A model folder.")
@click.option("--window", default=512, show_default=True, help="Tokens the proxy sees at once.")
@click.option("--short-window", default=32, show_default=True, help="The same for short_loss.")
@json_option
def annotate(folder: Path, model: Path, window: int, short_window: int, as_json: bool) -> None:
    """Add a proxy model's entropy, loss and rank of every token, as sidecars of the shards."""
    from rlpt.annotate import annotate as annotate_shards

    found = annotate_shards(folder, model, window=window, short_window=short_window)
    conclude(found, as_json)


@data.command("export-pairs")
@folder_argument
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="A .parquet file, or a folder."
)
@click.option("--split", default="train", show_default=True, help="train, dev or test.")
@click.option(
    "--layout",
    type=click.Choice(["trl", "verl", "verifiers"]),
    default="trl",
    show_default=True,
    help="Whose columns hold the text; verifiers is what prime-rl reads.",
)
@click.option("--min-context", type=click.IntRange(1), default=1, show_default=True)
@click.option("--max-context", type=click.IntRange(1), help="The last so many tokens; else all.")
@click.option("--horizon", type=click.IntRange(1), help="Tokens of continuation; else all.")
@json_option
def export_pairs(
    folder: Path,
    out: Path,
    split: str,
    layout: Literal["trl", "verl", "verifiers"],
    min_context: int,
    max_context: int | None,
    horizon: int | None,
    as_json: bool,
) -> None:
    """Write context and continuation of every candidate cut as Parquet, for other trainers.

    Without limits every row holds its whole document: give --max-context and --horizon.
    """
    from rlpt_data.export import export_pairs as export
    from rlpt_data.pairs import Limits

    limits = Limits(min_context=min_context, max_context=max_context, horizon=horizon)
    conclude(export(folder, out, split, layout, limits), as_json)


@data.command()
@folder_argument
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    help="Compare with this index of evaluation sets instead of the folder's own.",
)
@json_option
def verify(folder: Path, index: Path | None, as_json: bool) -> None:
    """Check every checksum and invariant of shards, and that no evaluation item is in them."""
    from rlpt_data.shards import verify_folder

    found = verify_folder(folder, index)
    click.echo(f"{folder}: every checksum and invariant holds")
    finish(found, as_json)
