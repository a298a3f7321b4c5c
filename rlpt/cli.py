"""The one command, `rlpt`: words in, a call into the library, words and an exit code out.

Nothing but click and the standard library is imported here; every command imports what it needs in
its body, so that `rlpt --help` and a mistyped option answer at once. No command holds logic.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rlpt.cli_checkpoint import checkpoint
from rlpt.cli_data import data
from rlpt.cli_fit import fit
from rlpt.cli_options import (
    InOrder,
    conclude,
    config_argument,
    finish,
    json_option,
    run_argument,
    set_option,
    show,
)
from rlpt.cli_view import report, watch
from rlpt.console import show_log
from rlpt.exits import MistakeError, guarded, is_main_rank
from rlpt.summary import proving_text, text


@click.group(
    cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="rlpt")
def cli() -> None:
    """A policy thinks, then the held-out text says how good the thought was.

    Every command exits 0 on success, 2 on a mistake in what it was given, 1 on a fault; a run that
    a signal ends saves and exits 143, or 130 after Ctrl-C.
    """


cli.add_command(data)


@cli.command()
@config_argument
@set_option
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: go on from the last complete checkpoint of this run folder, if it has one.",
)
@click.option("--dry-run", is_flag=True, help="Resolve and check everything, print the plan, stop.")
@json_option
def train(
    config: Path, overrides: Sequence[str], resume: str, dry_run: bool, as_json: bool
) -> None:
    """Run the stages of CONFIG.

    On N ranks: torchrun --nproc-per-node N -m rlpt.train CONFIG.
    """
    from rlpt.config import RunConfig
    from rlpt_data.strict import load

    settings = load(RunConfig, config, overrides)
    # torch comes with the trainer: a mistake in CONFIG is answered before it loads.
    from rlpt.train import run

    summary = run(settings, resume=resume, dry_run=dry_run)
    conclude(summary, as_json)


@cli.command()
@config_argument
@set_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8700, show_default=True)
def engine(config: Path, overrides: Sequence[str], host: str, port: int) -> None:
    """Serve the policy of CONFIG with vLLM to a trainer elsewhere.

    The trainer names its address in engine.vllm.addresses and publishes the weights. Both need the
    same secret in the environment variable RLPT_ENGINE_TOKEN.
    """
    from rlpt.config import RunConfig
    from rlpt_data.strict import load

    settings = load(RunConfig, config, overrides)
    from rlpt.rollout.start import serve_engine

    serve_engine(settings, host, port)


@cli.command()
@run_argument
@click.option("--step", type=click.IntRange(1), required=True, help="As in metrics.jsonl.")
@json_option
def replay(run_dir: Path, step: int, as_json: bool) -> None:
    """Compute one step of RUN again, beside what it wrote down.

    Needs the checkpoint before it and its groups (rollout.save_groups = true).
    """
    from rlpt.replay import replay as replay_step

    found = replay_step(run_dir, step)
    for name, pair in found.items():
        click.echo(f"{name:40} {pair['run']:< 22.15g} {pair['replay']:< 22.15g}")
    finish(found, as_json)


def _shard(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[int, int]:
    number, _, count = (text or "1/1").partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{text!r}: which of how many, as in 1/4.")
    return int(number), int(count)


@cli.command("eval")
@config_argument
@set_option
@click.option(
    "--shard",
    metavar="I/N",
    callback=_shard,
    help="Compute the I-th of N parts only, for other machines to do the rest. With all of them in "
    "out_dir the same command without --shard puts them together.",
)
@json_option
def evaluate(config: Path, overrides: Sequence[str], shard: tuple[int, int], as_json: bool) -> None:
    """Evaluate a checkpoint, or a ladder of them, on held-out text.

    A job that was killed goes on when it is started again. On N ranks: torchrun --nproc-per-node N
    -m rlpt.evaluate.job CONFIG.
    """
    from rlpt.jobs import EvalJobConfig
    from rlpt_data.strict import load

    settings = load(EvalJobConfig, config, overrides)
    from rlpt.evaluate.job import run

    found = run(settings, shard)
    if "rungs" not in found:
        return conclude(found, as_json)
    from rlpt.evaluate.shown import render

    if is_main_rank():
        show(render(found))
    finish(found, as_json)


cli.add_command(fit)


cli.add_command(checkpoint)
cli.add_command(report)
cli.add_command(watch)


@cli.command()
@run_argument
@click.option("--step", type=int, help="The checkpoint to export; the last complete one if absent.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@json_option
def export(run_dir: Path, step: int | None, out: Path, as_json: bool) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from rlpt.export import export as export_folder

    path = export_folder(run_dir, step, out)
    click.echo(f"exported: {path}")
    finish({"out": path}, as_json)


@cli.command()
@click.option(
    "--plan",
    "config",
    metavar="CONFIG",
    type=click.Path(path_type=Path),
    help="Instead: the tokens, FLOPs and memory of a step of a run of CONFIG, naive and shared.",
)
@click.option("--ranks", type=click.IntRange(1), help="With --plan: how many share the run.")
@set_option
@json_option
def doctor(config: Path | None, ranks: int | None, overrides: Sequence[str], as_json: bool) -> None:
    """Say what this machine can run.

    What is missing comes with the command that fixes it; exits 1 if rlpt cannot run here.
    """
    if config is not None:
        return _plan(config, ranks or 1, overrides, as_json)
    if ranks is not None or overrides:
        raise click.UsageError("--ranks and --set belong to --plan CONFIG.")
    from rlpt.doctor import examine, render

    found = examine()
    show(render(found))
    finish(found, as_json)
    if not found["ok"]:
        click.get_current_context().exit(1)


def _plan(config: Path, ranks: int, overrides: Sequence[str], as_json: bool) -> None:
    from rlpt.config import RunConfig
    from rlpt_data.strict import load

    settings = load(RunConfig, config, overrides)
    from rlpt.plan import plan, render

    found = plan(settings, ranks)
    show(render(found))
    finish(found, as_json)


@cli.command()
@config_argument
@set_option
@json_option
def downstream(config: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Ask an exported folder questions and last words.

    Tasks of lm-evaluation-harness from local files, with and without a thought, on transformers or
    vLLM; the extra `downstream`.
    """
    from rlpt.downstream import DownstreamConfig, run
    from rlpt_data.strict import load

    settings = load(DownstreamConfig, config, overrides)
    found = run(settings)
    click.echo(text(found))
    finish(found | {"out": settings.out_dir / "downstream.json"}, as_json)


@cli.command()
@config_argument
@set_option
@json_option
def compare(config: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Train several methods from one start and put them in one table.

    Same prompts, same budget; mean and interval over seeds. Finished runs are taken as they are.
    Exits 1 if a bar of CONFIG is missed.
    """
    from rlpt.compare import CompareConfig, markdown, run
    from rlpt_data.strict import load

    settings = load(CompareConfig, config, overrides)
    found = run(settings)
    click.echo(markdown(found))
    for line in found["failed"]:
        click.echo(f"FAILED {line}", err=True)
    finish(found | {"out": settings.out_dir / "compare.json"}, as_json)
    if found["failed"]:
        click.get_current_context().exit(1)


def _seeds(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: whole numbers with commas, as in 0,1,2.") from error


@cli.command()
@click.option("--seeds", default="0", show_default=True, callback=_seeds, help="As in 0,1,2.")
@click.option("--report-only", is_flag=True, help="Exit 0 even if a bar is missed.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PART.KEY=VALUE",
    help="PART is pages, warmup or rl, a file of configs/proving, as in rl.stage.0.steps=5.",
)
@json_option
def prove(seeds: list[int], report_only: bool, overrides: Sequence[str], as_json: bool) -> None:
    """Run the proving ground with its controls.

    Generated text whose best possible policy is known, through the real pipeline. Exits 1 if a bar
    is missed.
    """
    from rlpt_data.prepare import PrepareConfig
    from rlpt_data.prepare import prepare as prepare_shards
    from rlpt_data.strict import load

    pages = [word.removeprefix("pages.") for word in overrides if word.startswith("pages.")]
    settings = load(PrepareConfig, Path("configs/proving/pages.toml"), pages)
    prepare_shards(settings)
    from rlpt.prove import run

    summary = run(seeds, [word for word in overrides if not word.startswith("pages.")])
    click.echo(proving_text(summary))
    finish(summary, as_json)
    if not (summary["passed"] or report_only):
        click.get_current_context().exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: see `rlpt.exits` for the codes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_log("rlpt_kernels", is_main_rank())
    sys.exit(guarded(lambda: _invoke(words), as_json="--json" in words))


def _invoke(words: list[str]) -> int:
    try:
        returned = cli.main(words, prog_name="rlpt", standalone_mode=False)
    except click.Abort as error:
        # click's own name for ctrl-C
        raise KeyboardInterrupt from error
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        raise MistakeError(_one_line(error)) from error
    return returned if isinstance(returned, int) else 0


def _one_line(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    place = context.command_path if context else "rlpt"
    return f"{place}: {error.format_message().strip()} See `{place} --help`."


if __name__ == "__main__":
    main()
