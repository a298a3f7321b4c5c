"""`rlpt eval`: a checkpoint or model folder over held-out shards -> eval.json, prompts.parquet."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlpt import checkpoint, dist
from rlpt.agreement import Trial
from rlpt.config import (
    EvalJobConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
    longest_branch,
)
from rlpt.evaluate.continuation import Procedure
from rlpt.evaluate.continuation import Scorer as ScorerLike
from rlpt.evaluate.evaluation import Evaluation, evaluate
from rlpt.evaluate.records import write_parquet
from rlpt.evaluate.summary import Resampling, Unit
from rlpt.policy import load
from rlpt.policy.scoring import Scorer
from rlpt.prompts import held_out, held_out_windows
from rlpt.rollout import sync
from rlpt.rollout.engine import Engine
from rlpt.rollout.start import open_engine
from rlpt.runlog import read_config
from rlpt.types import Markers
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import Strict, UserError, parse

Decode = Callable[[Sequence[int]], str]

NEUTRAL_TEXT = " ."
"""The filler control repeats the tokens of this: they mean nothing and occur everywhere."""


class Subject(NamedTuple):
    """What is evaluated."""

    scorer: ScorerLike
    engine: Engine
    markers: Markers
    unbanned: ScorerLike | None = None
    """A scorer of the same policy that keeps the markers in the softmax, for the opener mass."""


def run(config: EvalJobConfig) -> dict[str, Any]:
    """Evaluate, write the files on rank 0, and return the headline numbers with the paths."""
    config = resolved(config)
    folder = ShardFolder.open(config.shards)
    with dist.world() as world:
        subject = open_subject(config, folder, world)
        try:
            found = evaluate_subject(config, folder, subject, world)
        finally:
            subject.engine.close()
        if world.is_main:
            _write(config, folder, found)
    return {
        **{name: found.summary[name] for name in _HEADLINE if name in found.summary},
        "eval": str(config.out_dir / "eval.json"),
        "records": str(config.out_dir / "prompts.parquet"),
    }


_HEADLINE = (
    "verdict",
    "verdict_reasons",
    "gain_heldout",
    "controls",
    "null",
    "wrong_target",
    "bits_per_byte",
    "next_token_accuracy_no_think",
    "next_token_accuracy_thought",
)


_OF_A_RUN = {"policy": PolicyConfig, "prompts": PromptConfig, "thought": ThoughtConfig}
"""What a job takes from the run behind its checkpoint where it gives none of its own."""


def resolved(config: EvalJobConfig) -> EvalJobConfig:
    """With policy, prompts and thought filled in: the config's own, else the run's, else the defaults.

    The policy computes in float32 whatever it trained in: bf16 noise is larger than many gains.
    """
    blank: dict[str, Any] = {"prompts": PromptConfig(), "thought": ThoughtConfig()}
    known = blank if config.run is None else _of_run(config.run)
    own = {name: getattr(config, name) for name in _OF_A_RUN}
    parts = known | {name: part for name, part in own.items() if part is not None}
    # One job, however many ranks: the groups of replicas are the run's own affair.
    parts["policy"] = parts["policy"].model_copy(update={"compute_dtype": "float32", "replicas": 1})
    return config.model_copy(update=parts)


def _of_run(reference: str) -> dict[str, Strict]:
    path = checkpoint.find(reference).parent.parent / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: absent, so the checkpoint's policy is unknown; restore the file")
    table = read_config(path)
    if absent := [name for name in _OF_A_RUN if name not in table]:
        raise UserError(f"{path}: has no {absent[0]!r}, so it is no run's; restore the file")
    return {
        name: parse(model, table[name], f"{path} [{name}]") for name, model in _OF_A_RUN.items()
    }


def open_subject(config: EvalJobConfig, folder: ShardFolder, world: dist.World) -> Subject:
    """Load the policy of a `resolved` configuration, with the checkpoint's weights if any."""
    assert config.policy, "resolve the configuration first"
    assert config.thought, "resolve the configuration first"
    assert config.prompts, "resolve the configuration first"
    longest = longest_branch(config.prompts, config.thought)
    window = max(longest, config.evaluation.longest_window)
    plan = load.blueprint(config.policy, folder, window, config.prompts.frame)
    policy = load.load(config.policy, plan, world, config.seed)
    if config.run is not None:
        tokenizer = str(folder.manifest.tokenizer_hash)
        checkpoint.load_weights(checkpoint.find(config.run), policy, tokenizer)
    markers, tokens = plan.vocabulary.markers, config.evaluation.batch_tokens
    trial = Trial(config, folder, plan, world)
    trial.layout(policy)
    engine = open_engine(
        *(config.engine, config.policy, plan, config.thought, longest),
        *(str(folder.manifest.tokenizer_hash), config.out_dir / "engine", config.seed, world),
    )
    try:
        sync.publish(policy, engine, 0)
        if not engine.is_reference:
            trial.engine(engine, policy)
    except BaseException:
        engine.close()
        raise
    scorer, unbanned = (Scorer(policy, banned, world, tokens) for banned in (markers.ids, ()))
    return Subject(scorer, engine, markers, unbanned)


def evaluate_subject(
    config: EvalJobConfig | RunConfig, folder: ShardFolder, subject: Subject, world: dist.World
) -> Evaluation:
    """The evaluation that ``config`` describes, of a policy that is already loaded."""
    cfg, split = config.evaluation, folder.split(config.evaluation.split)
    assert config.prompts, "resolve the configuration first"
    prompts = held_out(
        split, config.prompts, subject.markers, cfg.prompts, config.seed, cfg.domains
    )
    windows = (
        held_out_windows(
            split, cfg.bits_per_byte_tokens, cfg.bits_per_byte_documents, config.seed, cfg.domains
        )
        if cfg.bits_per_byte_documents
        else []
    )
    procedure = Procedure(
        subject.markers,
        neutral_ids(folder),
        cfg.thoughts,
        cfg.controls,
        config.seed,
        cfg.batch_documents,
    )
    resampling = Resampling(unit_of(folder.manifest.split_by), cfg.bootstrap, config.seed)
    return evaluate(
        *(subject.scorer, subject.engine, prompts, windows, procedure, resampling, world),
        unbanned=subject.unbanned,
    )


def neutral_ids(folder: ShardFolder) -> tuple[int, ...]:
    """Ids of the filler text in the shard's own encoding."""
    return tuple(int(i) for i in folder.encode(NEUTRAL_TEXT))


def unit_of(split_by: str) -> Unit:
    """The bootstrap unit of a split: domains where whole ones were held out, else documents."""
    return "domain" if split_by == "domain" else "document"


def decoder(folder: ShardFolder) -> Decode:
    """Ids -> text for people to read, byte for byte; ids without text (markers) read as nothing."""
    token_bytes = folder.token_bytes()

    def decode(ids: Sequence[int]) -> str:
        known = (token_bytes[index] for index in ids if index < len(token_bytes))
        return b"".join(known).decode("utf-8", errors="replace")

    return decode


def _write(config: EvalJobConfig, folder: ShardFolder, found: Evaluation) -> None:
    out: Path = config.out_dir
    out.mkdir(parents=True, exist_ok=True)
    write_parquet(out / "prompts.parquet", found.records, decoder(folder))
    table = {
        "config": config.model_dump(mode="json"),
        "shards": folder.manifest.hash,
        **found.summary,
    }
    temporary = out / "eval.json.tmp"
    temporary.write_text(json.dumps(table, indent=1, allow_nan=False))
    temporary.rename(out / "eval.json")
