"""`rlpt eval`: policies over held-out shards -> eval.json and prompts.parquet each, ladder.json over all of them.

torchrun --nproc-per-node N -m rlpt.evaluate.job CONFIG [--set k=v]...      or      rlpt eval CONFIG

Every rung at every seed is evaluated in parts that are kept, so that a job that was killed goes on, and finished ones
are taken as they are. The table over all of them is made from their files.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpt import checkpoint, dist
from rlpt.agreement import Trial
from rlpt.config import longest_branch
from rlpt.console import progress
from rlpt.evaluate import files, ladder
from rlpt.evaluate.bits_per_byte import measure_windows
from rlpt.evaluate.continuation import measure
from rlpt.evaluate.evaluation import Evaluation, leak_of
from rlpt.evaluate.parts import Parts, Shard
from rlpt.evaluate.plot import check_installed, draw
from rlpt.evaluate.records import write_parquet
from rlpt.evaluate.rungs import Ladder, Rung, climbed, place, plan, tasks
from rlpt.evaluate.spending import thinking
from rlpt.evaluate.subject import Questions, Subject, answered, decoder, questions
from rlpt.jobs import EvalJobConfig, Task
from rlpt.lock import NAME, only_one
from rlpt.policy import load
from rlpt.policy.policy import Policy
from rlpt.rollout import sync
from rlpt.rollout.engine import Engine
from rlpt.rollout.start import open_engine
from rlpt.runlog import write_json
from rlpt_data.shards import ShardFolder

_HEADLINE = (
    *("verdict", "verdict_reasons", "gain_heldout", "controls", "null", "wrong_target", "leak"),
    *("bits_per_byte", "next_token_accuracy_no_think", "next_token_accuracy_thought"),
)
WHOLE: Shard = (1, 1)


def run(config: EvalJobConfig, shard: Shard = WHOLE) -> dict[str, Any]:
    """Evaluate all rungs, write the files on rank 0, and return the headline numbers with the paths, or the ladder.

    ``shard`` (1 of n, ...) computes its part of the prompts alone and leaves the table to a job without one. Raises
    UserError, before any model is loaded, for what cannot be evaluated.
    """
    folder = ShardFolder.open(config.shards)
    climb = climbed(config, folder)
    if len(climb.rungs) > 1 and config.figure != "none":
        check_installed(config.figure)
    # Shards work side by side, and nobody else with one of them.
    lock = NAME if shard == WHOLE else f"{NAME}_{shard[0]}_of_{shard[1]}"
    with (
        dist.world() as world,
        only_one(config.out_dir, world, lock),
        closing(Bench(config, folder, climb, world)) as bench,
    ):
        for rung, out, task in tasks(config, climb, folder, world):
            if not _finished(out, task, world):
                _evaluate(bench, rung, out, task, shard)
        if shard != WHOLE:
            return {"out_dir": str(config.out_dir), "shard": f"{shard[0]}/{shard[1]}"}
        found = _concluded(config, climb, folder) if world.is_main else {}
        return dist.gathered(found, world)[0]


class Bench:
    """The policy and the engine in hand. Rungs of one run share them: only the weights change."""

    def __init__(
        self, config: EvalJobConfig, folder: ShardFolder, climb: Ladder, world: dist.World
    ) -> None:
        self.config = config
        self.folder = folder
        self.climb = climb
        self.world = world
        self.rung: Rung | None = None
        """Whose weights are in hand, whatever its name and budget."""
        self.policy: Policy | None = None
        self.engine: Engine | None = None
        self.version = 0

    def plan(self, rung: Rung) -> load.Blueprint:
        return plan(rung.policy, self.config, self.climb.prompts, self.climb.thought, self.folder)

    def at(self, rung: Rung, task: Task) -> Subject:
        """The subject of a rung, its weights loaded and published. Collective."""
        made = self.plan(rung)
        if self.rung is None or replace(rung, name="", budget=None) != self.rung:
            self._load(rung, made)
            self._publish(Trial(task, self.folder, made, self.world))
        assert self.policy is not None
        assert self.engine is not None
        markers, tokens = made.vocabulary.markers, task.evaluation.batch_tokens
        return Subject.of(self.policy, self.engine, markers, self.world, tokens)

    def _load(self, rung: Rung, made: load.Blueprint) -> None:
        alike = self.rung is not None and self.rung.policy == rung.policy
        if not (alike and rung.checkpoint is not None):
            self.close()
            self.policy = load.load(rung.policy, made, self.world, self.config.seed)
        assert self.policy is not None
        if rung.checkpoint is not None:
            tokenizer = str(self.folder.manifest.tokenizer_hash)
            checkpoint.load_weights(rung.checkpoint, self.policy, tokenizer, self.world)
        self.rung = replace(rung, name="", budget=None)

    def _publish(self, trial: Trial) -> None:
        """The weights to the engine, which is started if need be; both paths of numbers are tried first."""
        assert self.policy is not None
        if self.engine is None:
            trial.layout(self.policy)
            config, climb = self.config, self.climb
            self.engine = open_engine(
                *(config.engine, trial.cfg.policy, trial.plan, climb.thought),
                *(longest_branch(climb.prompts, climb.thought), str(self.folder.manifest.tokenizer_hash)),
                *(config.out_dir / "engine", config.seed, self.world),
            )  # fmt: skip
        sync.publish(self.policy, self.engine, self.version)
        self.version += 1
        if not self.engine.is_reference:
            trial.engine(self.engine, self.policy)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self.policy = self.rung = None


def _finished(out: Path, task: Task, world: dist.World) -> bool:
    """Whether a folder has this very evaluation. Collective; raises UserError where it has another."""
    parts = Parts(out, task, world)
    return dist.gathered(parts.finished, world)[0]


def _evaluate(bench: Bench, rung: Rung, out: Path, task: Task, shard: Shard) -> None:
    """One task, from its parts as far as there are some. Collective."""
    # Before the weights: what cannot be asked is refused at once.
    asked = questions(task, bench.folder, bench.plan(rung).vocabulary.markers)
    subject = bench.at(rung, task)
    own = replace(
        asked.procedure, purpose=task.purpose, budget=task.budget_tokens, chunk=task.chunk_prompts
    )
    asked = asked._replace(procedure=own)
    total = _steps(asked, shard)
    title = rung.name if task.seed == task.policy_seed else f"{rung.name}, seed {task.seed}"
    with progress(title, total, 0, bench.world.is_main) as report:
        parts = Parts(out, task, bench.world, report, shard)
        if shard != WHOLE:
            _part(asked, subject, parts, bench.world)
            return
        found = answered(asked, subject, bench.world, parts)
    if bench.world.is_main:
        spent = thinking(asked.prompts, found.records, bench.plan(rung).config)
        summary = found.summary | {"thinking": spent}
        _write(out, task, bench.folder, replace(found, summary=summary), parts)
    dist.barrier(bench.world)


def _steps(asked: Questions, shard: Shard) -> int:
    """Parts of a job: of every chunk thoughts, greedy ones where they are asked for and, of its own, records; then the
    first shard has windows and the leak test."""
    (number, count), procedure = shard, asked.procedure
    assert procedure.chunk is not None
    chunks = -(-len(asked.prompts) // procedure.chunk)
    leaks = procedure.leak_prompts > 0 and procedure.budget != 0
    own = len(range(number - 1, chunks, count))
    return chunks * (1 + procedure.greedy) + own + (number == 1) * (1 + leaks)


def _part(asked: Questions, subject: Subject, parts: Parts, world: dist.World) -> None:
    """A shard's part: all thoughts, which controls of other documents need, and the records of its own prompts."""
    measure(
        *(subject.scorer, subject.engine, asked.prompts, asked.procedure, world),
        *(subject.unbanned, parts),
    )
    if parts.shard[0] == 1:
        batch = asked.procedure.batch
        parts("windows", lambda: measure_windows(subject.scorer, asked.windows, world, batch))
        leak_of(subject.engine, asked.prompts, asked.procedure, world, parts)


def _write(out: Path, task: Task, folder: ShardFolder, found: Evaluation, parts: Parts) -> None:
    """The files of one evaluation; eval.json last: with it the evaluation is finished."""
    write_parquet(out / "prompts.parquet", found.records, decoder(folder))
    files.save(out / files.WHOLE, found)
    write_json(out / files.CLOCK, parts.seconds())
    table = {"config": task.model_dump(mode="json"), "shards": task.shards, **found.summary}
    write_json(out / "eval.json", table)
    parts.remove()


def _concluded(config: EvalJobConfig, climb: Ladder, folder: ShardFolder) -> dict[str, Any]:
    """What the files of all tasks amount to."""
    if len(climb.rungs) == len(config.all_seeds) == 1:
        summary = files.load(config.out_dir / files.WHOLE).summary
        return {
            **{name: summary[name] for name in _HEADLINE if name in summary},
            "eval": str(config.out_dir / "eval.json"),
            "records": str(config.out_dir / "prompts.parquet"),
        }
    folders = {
        rung.name: [place(config, climb, rung, seed) for seed in config.all_seeds]
        for rung in climb.rungs
    }
    table = ladder.table(climb, folders, folder, config.all_seeds)
    write_json(config.out_dir / "ladder.json", table)
    drawn = None
    if config.figure != "none":
        drawn = draw(table, config.out_dir / f"gain_by_compute.{config.figure}")
    return table | {
        "ladder": str(config.out_dir / "ladder.json"),
        "figure": drawn and str(drawn),
    }


def main() -> None:
    """`python -m rlpt.evaluate.job CONFIG`: the command `rlpt eval`, for torchrun."""
    import sys

    from rlpt.cli import main as command_line

    command_line(["eval", *sys.argv[1:]])


if __name__ == "__main__":
    main()
