"""Held-out questions: how often is the answer after a thought right, and how often without one?

Every question is answered several times, in an order and with noise that neither batches nor ranks change. The control
`empty` answers straight after opener and closer: a stage that teaches the format of answers raises both.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pydantic import TypeAdapter

from rlpt import dist
from rlpt.evaluate.attempts import pass_at_k
from rlpt.reward.base import Reward
from rlpt.rollout.engine import Engine
from rlpt.rows import unzipped, zipped
from rlpt.statistics import Interval, pair, ratio_intervals
from rlpt.types import Group, Markers, Prompt, Rollout, concat
from rlpt_data.strict import UserError

PURPOSE = "answers"


@dataclass(frozen=True)
class Answered:
    """One question and what became of it, thought by thought."""

    question: str
    """Its document's id."""
    asked: str
    gold: str
    thoughts: list[str]
    predictions: list[str]
    right: list[bool]
    predictions_empty: list[str]
    """Without a thought."""
    right_empty: list[bool]
    thought_tokens: list[int]
    closed: list[bool]
    """Whether the policy ended the thought itself."""


_ANSWERED = TypeAdapter(Answered)


def answer(
    engine: Engine,
    prompts: Sequence[Prompt],
    reward: Reward,
    markers: Markers,
    samples: int,
    prediction_tokens: int,
    read: Callable[[Sequence[int]], str],
    world: dist.World,
) -> list[Answered]:
    """Records of all ``prompts`` (the same global list on every rank), on every rank. Collective."""
    mine = dist.share(prompts, world)
    groups = engine.collect(engine.submit(mine, samples, PURPOSE))
    bare = [_without_thought(prompt, markers) for prompt in mine]
    tickets = engine.submit(bare, samples, f"{PURPOSE}/empty", prediction_tokens)
    empty = [_as_predictions(group, markers) for group in engine.collect(tickets)]
    right_PG, right_empty_PG = (reward(part).reward_PG == 1.0 for part in (groups, empty))
    records = [
        _record(*parts, read) for parts in zip(groups, right_PG, empty, right_empty_PG, strict=True)
    ]
    return dist.unshare(records, world)


def _without_thought(prompt: Prompt, markers: Markers) -> Prompt:
    """The thought is over before it begins: what is sampled in its place is the prediction."""
    return replace(prompt, policy_ids=concat(prompt.policy_ids, [markers.closer]))


def _as_predictions(group: Group, markers: Markers) -> Group:
    """What was sampled in the place of thoughts, as predictions after empty ones."""
    return replace(group, rollouts=tuple(_as_prediction(r, markers) for r in group.rollouts))


def _as_prediction(rollout: Rollout, markers: Markers) -> Rollout:
    ids = concat([markers.closer], rollout.thought_ids)
    sampled = np.arange(len(ids)) > 0
    logp = np.concatenate([np.zeros(1, rollout.logp.dtype), rollout.logp[: rollout.thought_len]])
    version = np.full(len(ids), rollout.version[0])
    return Rollout(ids, sampled, logp, version, 0, "budget")


def _record(
    group: Group,
    right_G: Bool[np.ndarray, " G"],
    empty: Group,
    right_empty_G: Bool[np.ndarray, " G"],
    read: Callable[[Sequence[int]], str],
) -> Answered:
    prompt, rollouts = group.prompt, group.rollouts
    return Answered(
        question=prompt.trunk.document,
        asked=read(prompt.context_ids.tolist()),
        gold=read(prompt.continuation_ids.tolist()),
        thoughts=[read(rollout.thought_ids.tolist()) for rollout in rollouts],
        predictions=[read(rollout.prediction_ids.tolist()) for rollout in rollouts],
        right=right_G.tolist(),
        predictions_empty=[read(rollout.prediction_ids.tolist()) for rollout in empty.rollouts],
        right_empty=right_empty_G.tolist(),
        thought_tokens=[rollout.thought_len for rollout in rollouts],
        closed=[rollout.finish == "closer" for rollout in rollouts],
    )


def summarise(records: Sequence[Answered], *, draws: int, seed: int) -> dict[str, float | None]:
    """Metrics by name; intervals over questions, None where they are too few.

    `rlvr/accuracy` is the mean over k thoughts of a question (mean@k), over questions; `rlvr/pass_at_K` the expected
    share of questions that one of K thoughts answers.
    """
    samples = len(records[0].right)
    measured = _intervals(
        records,
        {
            "accuracy": [np.mean(record.right) for record in records],
            "accuracy_empty": [np.mean(record.right_empty) for record in records],
            "accuracy_minus_empty": [
                np.mean(record.right) - np.mean(record.right_empty) for record in records
            ],
        },
        draws,
        seed,
    )
    table: dict[str, float | None] = {}
    for name, interval in measured.items():
        table |= {
            f"rlvr/{name}": interval.mean,
            f"rlvr/{name}_ci_low": interval.ci_low,
            f"rlvr/{name}_ci_high": interval.ci_high,
        }
    right_PG = np.array([record.right for record in records], np.float64)
    for k in (2**i for i in range(1, samples.bit_length())):
        table[f"rlvr/pass_at_{k}"] = float(pass_at_k(right_PG, k).mean())
    return table | {
        "rlvr/thought_length": float(np.mean([record.thought_tokens for record in records])),
        "rlvr/closer_rate": float(np.mean([record.closed for record in records])),
        "rlvr/questions": float(len(records)),
        "rlvr/samples": float(samples),
    }


def in_words(values: Mapping[str, float | None]) -> str:
    """One line of `summarise`."""
    return (
        f"accuracy on {values['rlvr/questions']:.0f} held-out questions {values['rlvr/accuracy']:.3f}, "
        f"without a thought {values['rlvr/accuracy_empty']:.3f}"
    )


def change(
    before: Sequence[Answered], after: Sequence[Answered], *, draws: int, seed: int
) -> dict[str, Interval]:
    """Of accuracy, and of accuracy without a thought, question by question. Raises ValueError for other questions."""
    order = pair(
        [(record.question,) for record in before], [(record.question,) for record in after]
    )
    pairs = [(before[i], record) for i, record in zip(order, after, strict=True)]
    moved = {
        f"{name}_change": [
            np.mean(getattr(late, field)) - np.mean(getattr(early, field)) for early, late in pairs
        ]
        for name, field in (("accuracy", "right"), ("accuracy_empty", "right_empty"))
    }
    return _intervals(after, moved, draws, seed)


def _intervals(
    records: Sequence[Answered], values: dict[str, list[Any]], draws: int, seed: int
) -> dict[str, Interval]:
    ones = np.ones(len(records))
    question_N = np.array([record.question for record in records])
    sums = {name: (np.array(column, np.float64), ones) for name, column in values.items()}
    return ratio_intervals(sums, question_N, draws=draws, seed=seed)


# ---- files ---------------------------------------------------------------------------------------


def path_of(run_dir: Path, stage: str, step: int) -> Path:
    return run_dir / "answers" / f"{stage}_{step:06d}.jsonl.zst"


def save(path: Path, records: Sequence[Answered]) -> None:
    """A question a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(zipped(text.encode()))
    temporary.replace(path)


def load(path: Path) -> list[Answered]:
    """What `save` wrote. Raises UserError where it is damaged."""
    try:
        lines = unzipped(path.read_bytes()).splitlines()
        return [_ANSWERED.validate_json(line, strict=True, extra="forbid") for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path}: damaged: {error}; restore it, or start the run over in another folder"
        ) from error
