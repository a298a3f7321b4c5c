"""What is evaluated and what it is asked: a policy behind a scorer and an engine, held-out prompts, a procedure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlpt import dist
from rlpt.config import RunConfig
from rlpt.evaluate.annotated import annotated_entropies
from rlpt.evaluate.continuation import Keep, Procedure, afresh
from rlpt.evaluate.continuation import Scorer as ScorerLike
from rlpt.evaluate.controls import check
from rlpt.evaluate.evaluation import Evaluation, evaluate
from rlpt.evaluate.quantities import Resampling, Unit
from rlpt.jobs import Task
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import held_out, held_out_windows
from rlpt.rollout.engine import Engine
from rlpt.types import Markers, Prompt, Trunk
from rlpt_data.shards import ShardFolder

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

    @classmethod
    def of(
        cls, policy: Policy, engine: Engine, markers: Markers, world: dist.World, tokens: int
    ) -> "Subject":
        """A loaded policy; ``tokens`` are those of one forward."""
        scorer = Scorer(policy, markers.ids, world, tokens, certainty=True)
        return cls(scorer, engine, markers, Scorer(policy, (), world, tokens))


class Questions(NamedTuple):
    """What every policy is asked that is compared with another."""

    prompts: list[Prompt]
    windows: list[Trunk]
    """For bits per byte."""
    procedure: Procedure
    resampling: Resampling


def questions(config: Task | RunConfig, folder: ShardFolder, markers: Markers) -> Questions:
    """The held-out prompts and windows of a configuration, and what is done with them."""
    cfg, split = config.evaluation, folder.split(config.evaluation.split)
    prompts = held_out(split, config.prompts, markers, cfg.prompts, config.seed, cfg.domains)
    check(prompts, cfg.controls)
    windows = (
        held_out_windows(
            split, cfg.bits_per_byte_tokens, cfg.bits_per_byte_documents, config.seed, cfg.domains
        )
        if cfg.bits_per_byte_documents
        else []
    )
    procedure = Procedure(
        markers,
        neutral_ids(folder),
        cfg.thoughts,
        cfg.controls,
        config.seed,
        cfg.batch_documents,
        greedy=cfg.greedy,
        leak_prompts=cfg.leak_prompts,
        token_bytes=folder.token_bytes() if config.thought.prediction_tokens else (),
        annotated=annotated_entropies(folder, cfg.split, prompts, cfg.proxy),
    )
    resampling = Resampling(unit_of(folder.manifest.split_by), cfg.bootstrap, config.seed)
    return Questions(prompts, windows, procedure, resampling)


def evaluate_subject(
    config: RunConfig, folder: ShardFolder, subject: Subject, world: dist.World
) -> Evaluation:
    """The evaluation that a run's configuration describes, of a policy that is already loaded."""
    return answered(questions(config, folder, subject.markers), subject, world)


def answered(
    asked: Questions, subject: Subject, world: dist.World, keep: Keep = afresh
) -> Evaluation:
    """Ask a subject."""
    return evaluate(
        *(subject.scorer, subject.engine, asked.prompts, asked.windows),
        *(asked.procedure, asked.resampling, world),
        unbanned=subject.unbanned,
        keep=keep,
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
