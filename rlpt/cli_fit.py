"""The command `rlpt fit`; like all commands it holds no logic."""

from collections.abc import Sequence
from pathlib import Path

import click

from rlpt.cli_options import finish, json_option, show


@click.command()
@click.argument(
    "sources", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--x",
    default="steps",
    show_default=True,
    help="Compute of a run: steps, tokens, flops or seconds; of a table: a column.",
)
@click.option(
    "--y",
    default="gain_heldout.mean",
    show_default=True,
    help="A number of the evaluations (bits_per_byte.mean), of metrics.jsonl (reward/mean), or a column.",
)
@click.option(
    "--law",
    type=click.Choice(["sigmoid", "power"]),
    default="sigmoid",
    show_default=True,
    help="ScaleRL's sigmoid or RPT's power law.",
)
@click.option(
    "--skip-before",
    type=click.FloatRange(0),
    metavar="X",
    help="Drop points before this compute; a twentieth of the largest if absent.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="FRACTION",
    help="Of the compute, to be predicted; half if absent and there are points enough; 0: none.",
)
@click.option(
    "--start-value", type=float, metavar="R0", help="Of the sigmoid; the first point if absent."
)
@click.option(
    "--from-step",
    type=click.IntRange(0),
    metavar="N",
    help="Where a run's compute begins; its first stage of thinking if absent.",
)
@click.option(
    "--noise",
    type=click.Choice(["residuals", "intervals"]),
    default="residuals",
    show_default=True,
    help="Where the noise of points is taken from: the fit, or their own 95% intervals.",
)
@click.option("--shared-ceiling", is_flag=True, help="Fit all runs again under one ceiling.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of fit.json; RUN's if absent.",
)
@json_option
def fit(
    sources: Sequence[Path], out: Path | None, as_json: bool, noise: str, **asked: object
) -> None:
    """Fit a law of performance over compute: where would more compute lead?

    RUN is a run folder, a ladder.json of `rlpt eval`, or a .csv. Writes fit.json, fit.svg and
    fit.png.
    """
    from rlpt.law.job import Request, run
    from rlpt.law.table import render

    request = Request(**asked, weighted=noise == "intervals")  # pyright: ignore[reportArgumentType]
    found = run(sources, request, out)
    show(render(found))
    click.echo(f"\nfit: {found['out']}\nfigure: {found['figure']}")
    finish(found, as_json)
