"""A job's configuration -> its rungs: every policy found, at every thinking budget, before any model is loaded.

What is missing, of another tokenizer or asked other prompts is refused here, all of it in one line.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpt import checkpoint, dist
from rlpt.config import PolicyConfig, PromptConfig, ThoughtConfig, longest_branch
from rlpt.jobs import EvalJobConfig, RungConfig, Task
from rlpt.policy import load
from rlpt.runlog import read_config
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import Strict, UserError, parse

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rung:
    """One policy at one thinking budget."""

    name: str
    origin: str
    """What the configuration calls it."""
    policy: PolicyConfig
    checkpoint: Path | None = None
    revision: str = ""
    """Of a model of the hub: the commit."""
    budget: int | None = None

    @property
    def run_dir(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def step(self) -> int | None:
        return None if self.checkpoint is None else checkpoint.step_of(self.checkpoint)


@dataclass(frozen=True)
class Ladder:
    """The rungs of a job, which are asked alike."""

    rungs: tuple[Rung, ...]
    against: Rung
    prompts: PromptConfig
    thought: ThoughtConfig
    missing: tuple[str, ...]
    """Rungs that were left out, and why."""


def climbed(config: EvalJobConfig, folder: ShardFolder) -> Ladder:
    """The ladder of a job. Raises UserError for all that cannot be evaluated."""
    found, missing = _subjects(config)
    prompts, thought = _asked(config, found)
    for rung in found:
        if rung.checkpoint is not None:
            checkpoint.check_tokenizer(rung.checkpoint, str(folder.manifest.tokenizer_hash))
        plan(rung.policy, config, prompts, thought, folder)
    rungs = tuple(_at_budgets(config, found))
    names = [rung.name for rung in rungs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"ladder: {len(names)} rungs, and {twice[0]!r} names several; give names")
    against = config.against or names[0]
    if against not in names:
        raise UserError(f"against = {against!r}: no such rung; there are {', '.join(names)}")
    return Ladder(rungs, rungs[names.index(against)], prompts, thought, tuple(missing))


def _subjects(config: EvalJobConfig) -> tuple[list[Rung], list[str]]:
    """(the rungs that are there, a line for every one that is not)."""
    found: list[Rung] = []
    missing: list[str] = []
    for asked in config.rungs:
        if asked.run is None:
            found.append(_model(asked))
            continue
        try:
            paths = checkpoints(asked.run)
        except UserError as error:
            missing.append(str(error))
            continue
        found += [_of_run(asked, path, len(paths) > 1, bool(config.ladder)) for path in paths]
    if missing and (not config.skip_missing or not found):
        left = "" if len(config.rungs) == 1 else " (skip_missing = true leaves them out)"
        if len(missing) == 1:
            raise UserError(missing[0] + left)
        listed = "; ".join(f"({n}) {line}" for n, line in enumerate(missing, start=1))
        raise UserError(f"ladder: {len(missing)} rungs have no checkpoint{left}: {listed}")
    return found, missing


def checkpoints(reference: str) -> list[Path]:
    """`RUN_DIR@STEP`, `RUN_DIR@last` or `RUN_DIR@all` -> complete checkpoints, oldest first. Raises UserError."""
    run, _, step = reference.rpartition("@")
    if step != "all":
        return [checkpoint.find(reference)]
    last = checkpoint.find(f"{run}@last")
    steps = checkpoint.complete_steps(Path(run))
    return [checkpoint.path_of(Path(run), step) for step in steps] or [last]


def _model(asked: RungConfig) -> Rung:
    if asked.hub is not None:
        path, revision = downloaded(asked.hub)
        name = asked.name or asked.hub.replace("/", "--")
        return Rung(name, asked.hub, _exact(PolicyConfig(path=path)), revision=revision)
    assert asked.policy is not None
    place = asked.policy.path
    name = asked.name or ("fresh" if place is None else place.resolve().name)
    return Rung(name, "fresh" if place is None else str(place), _exact(asked.policy))


def _of_run(asked: RungConfig, path: Path, several: bool, named: bool) -> Rung:
    run_dir, step = path.parent.parent, checkpoint.step_of(path)
    known = _table(run_dir)["policy"]
    assert isinstance(known, PolicyConfig)
    parts = [asked.name or (run_dir.resolve().name if named else "")]
    if several or not asked.name:
        parts.append(f"step_{step}")
    name = "-".join(part for part in parts if part)
    return Rung(name, f"{run_dir}@{step}", _exact(known), path)


def _exact(policy: PolicyConfig) -> PolicyConfig:
    """In float32 whatever it trained in: bf16 noise is larger than many gains. One job, however many ranks: the groups
    of replicas are the run's own affair."""
    return policy.model_copy(update={"compute_dtype": "float32", "replicas": 1})


_OF_A_RUN = {"policy": PolicyConfig, "prompts": PromptConfig, "thought": ThoughtConfig}


def _table(run_dir: Path) -> dict[str, Strict]:
    """What a job takes from the run behind a checkpoint."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: absent, so the checkpoint's policy is unknown; restore the file")
    table = read_config(path)
    if absent := [name for name in _OF_A_RUN if name not in table]:
        raise UserError(f"{path}: has no {absent[0]!r}, so it is no run's; restore the file")
    return {
        name: parse(model, table[name], f"{path} [{name}]") for name, model in _OF_A_RUN.items()
    }


def _asked(config: EvalJobConfig, rungs: Sequence[Rung]) -> tuple[PromptConfig, ThoughtConfig]:
    """Prompts and thoughts: the job's own, else those of the runs, which must agree, else the defaults."""
    parts: list[Any] = [config.prompts, config.thought]
    for place, name in enumerate(("prompts", "thought")):
        if parts[place] is not None:
            continue
        of_runs = [(rung, _table(rung.run_dir)[name]) for rung in rungs if rung.run_dir]
        for rung, other in of_runs[1:]:
            if other != of_runs[0][1]:
                raise UserError(
                    f"ladder: the runs of {of_runs[0][0].name} and {rung.name} differ in their [{name}]; give the "
                    f"job a [{name}] of its own, so that all rungs are asked the same"
                )
        parts[place] = of_runs[0][1] if of_runs else _OF_A_RUN[name]()
    prompts, thought = parts
    try:
        return prompts, config.sweep_of(thought)
    except ValueError as error:
        raise UserError(f"sweep: {error}") from error


def plan(
    policy: PolicyConfig,
    config: EvalJobConfig,
    prompts: PromptConfig,
    thought: ThoughtConfig,
    folder: ShardFolder,
) -> load.Blueprint:
    """Of a rung. Raises UserError where its tokenizer is not the shards', or its positions do not suffice."""
    longest = max(longest_branch(prompts, thought), config.evaluation.longest_window)
    return load.blueprint(policy, folder, longest, prompts.frame)


def _at_budgets(config: EvalJobConfig, rungs: Sequence[Rung]) -> Iterator[Rung]:
    if config.sweep is None:
        yield from rungs
        return
    for rung in rungs:
        for budget in config.sweep.budget_tokens:
            yield replace(rung, name=f"{rung.name}-budget_{budget}", budget=budget)


def tasks(
    config: EvalJobConfig, ladder: Ladder, folder: ShardFolder, world: dist.World
) -> Iterator[tuple[Rung, Path, Task]]:
    """(rung, its folder, what is evaluated) for every rung and seed. Collective; rank 0 reads all weights once."""
    known: dict[str, str] = {}
    for rung in ladder.rungs:
        if rung.origin not in known:
            own = identity(rung, config.seed) if world.is_main else ""
            known[rung.origin] = dist.gathered(own, world)[0]
        for seed in config.all_seeds:
            task = Task(
                policy=rung.policy,
                checkpoint=rung.checkpoint,
                weights=known[rung.origin],
                shards=folder.manifest.hash,
                prompts=ladder.prompts,
                thought=ladder.thought,
                budget_tokens=rung.budget,
                engine=config.engine,
                evaluation=config.evaluation,
                chunk_prompts=config.chunk_prompts,
                policy_seed=config.seed,
                seed=seed,
            )
            yield rung, place(config, ladder, rung, seed), task


def place(config: EvalJobConfig, ladder: Ladder, rung: Rung, seed: int) -> Path:
    """The folder of one evaluation: the job's own where it is the only one."""
    own = config.out_dir if len(ladder.rungs) == 1 else config.out_dir / rung.name
    return own if len(config.all_seeds) == 1 else own / f"seed_{seed}"


def identity(rung: Rung, seed: int) -> str:
    """What the weights are: a hash of their files, or the seed that fresh ones are drawn from."""
    folder = rung.checkpoint or rung.policy.path
    if folder is None:
        return f"fresh, seed {seed}"
    digest = hashlib.blake2b(digest_size=16)
    kinds = (".safetensors",) if rung.checkpoint is None else (".distcp", ".metadata")
    for path in sorted(folder.iterdir()):
        if path.name.endswith(kinds):
            digest.update(json.dumps([path.name, path.stat().st_size]).encode())
            with path.open("rb") as file:
                while part := file.read(_CHUNK):
                    digest.update(part)
    return digest.hexdigest()


def downloaded(hub: str) -> tuple[Path, str]:
    """(folder, commit) of a model of the hub. Raises UserError where it is not there, or not to be reached."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub.partition("@")
    wanted = ["*.json", "*.safetensors"]
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"hub = {hub!r}: not to be had ({type(error).__name__}: {reason}); check the name and the network, or "
            "download it and name its folder as policy.path"
        ) from error
    return Path(path), Path(path).name
