"""What the commands of `rlpt` share: their arguments, and how they say what they found."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from rlpt.exits import MistakeError, is_main_rank
from rlpt.summary import Summary, text

config_argument = click.argument("config", type=click.Path(path_type=Path))
run_argument = click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))


class _Local(click.Path):
    """A path; a URL would lose one of its slashes and be one, too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            raise MistakeError(
                f"{value}: this command needs the shards on this machine; bring them here with "
                "`rlpt data merge DIR URL`"
            )
        return super().convert(value, param, ctx)


folder_argument = click.argument("folder", metavar="DIR", type=_Local(path_type=Path))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of CONFIG, as in stage.0.steps=5; may be repeated.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="End with one line of JSON on stdout."
)


def finish(result: Summary, as_json: bool) -> None:
    """Print the machine-readable last line if it was asked for."""
    if as_json and is_main_rank():
        click.echo(json.dumps(result, default=str))


def conclude(summary: Summary, as_json: bool) -> None:
    """Print the summary of a run, and the machine-readable last line if it was asked for."""
    if is_main_rank():
        click.echo(text(summary))
    finish(summary, as_json)


def show(renderable: Any) -> None:
    """Print a table for people to read."""
    from rich.console import Console

    from rlpt_data.visible import Visible

    # A pipe has no width of its own, and rich would fold tables at 80.
    Console(width=None if sys.stdout.isatty() else 140).print(Visible(renderable))


class InOrder(click.Group):
    """Lists its commands in the order of the pipeline, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
