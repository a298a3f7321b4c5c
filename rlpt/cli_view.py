"""`rlpt report` and `rlpt watch`: what a run has to show, on a page and in the terminal."""

from collections.abc import Sequence
from pathlib import Path

import click

from rlpt.cli_options import finish, json_option, run_argument
from rlpt.summary import text


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Default: report.html in RUN; of several in the folder that holds them.",
)
@json_option
def report(runs: Sequence[Path], out: Path | None, as_json: bool) -> None:
    """Draw one RUN, or several side by side, as one offline HTML file.

    Held-out numbers with their controls first; then every dumped thought beside the text it was to
    help with, curves, where the time goes, engine against trainer, data, settings and evidence.
    """
    from rlpt.report import write
    from rlpt.report.run import read_object

    path = write(runs, out)
    missing: list[str] = []
    summary = {}
    if len(runs) == 1:
        summary = read_object(runs[0] / "summary.json", "the final numbers", missing)
        click.echo("\n".join(f"{runs[0]}: {line}" for line in missing) or text(summary))
    click.echo(f"\nreport: {path}")
    finish({"report": path, "summary": summary}, as_json)


@click.command()
@run_argument
@click.option("--once", is_flag=True, help="One picture; so, too, where stdout is no terminal.")
@click.option(
    "--every",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@json_option
def watch(run_dir: Path, once: bool, every: float, as_json: bool) -> None:
    """Follow RUN in the terminal: stage and time left, metrics, the last evaluation.

    Also where a step's time goes, engine against trainer and the last rollout. q leaves; the run
    does not notice.
    """
    from rlpt.watch import watch as watch_run

    finish(watch_run(run_dir, once, every), as_json)
