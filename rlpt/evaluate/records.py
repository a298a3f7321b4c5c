"""One record per sampled thought: the numbers every table, interval and verdict of an evaluation is
made of.

Records are complete: a summary can be recomputed from them, and two evaluations can be paired by
their keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from rlpt.types import Finish

NO_THINK, OWN, NULL, GREEDY = "no_think", "own", "null", "greedy"
WRONG, WRONG_NO_THINK = "wrong_target", "wrong_no_think"
Key = tuple[int, str, int, int]


@dataclass(frozen=True)
class First:
    """What the policy would say comes first, after a thought or without one."""

    token: int
    """The likeliest id."""
    confidence: float | None = None
    """Its log-probability, nats; None: the scorer was not asked."""
    entropy: float | None = None
    """Of the first token's distribution, nats; None as above."""


@dataclass(frozen=True)
class Prediction:
    """What the policy wrote after the closer, where its frame asks for that."""

    ids: tuple[int, ...]
    first: int | None
    """The first token of it; in a chat, of what is marked as answer. None: there is none."""
    match: float
    """1 where it is the held-out text's beginning (`rlpt.reward.match.prefix_match`), else 0."""


@dataclass(frozen=True)
class Greedy:
    """The prompt's thought at temperature 0."""

    thought_ids: tuple[int, ...]
    prediction: Prediction | None


@dataclass(frozen=True)
class Record:
    """Thought ``sample`` of one prompt. ``logp["own"] - logp["no_think"]``, summed over the tokens,
    is its gain.

    ``logp`` has one array a frame: no_think (the trunk itself), own, greedy (the same for all thoughts of a prompt) and
    the controls that were asked for. All are about the prompt's own continuation, except wrong_target (own thought) and
    wrong_no_think (no thought), which are about another prompt's and are absent where every other
    continuation is the same.
    """

    epoch: int
    document: str
    domain: str
    cut: int
    """Token position in the document."""
    sample: int
    num_bytes: int
    continuation_ids: Int[np.ndarray, " C"]
    logp: Mapping[str, Float[np.ndarray, " _"]]
    firsts: Mapping[str, First]
    """Of no_think, own and greedy."""
    thought_ids: Int[np.ndarray, " Z"]
    finish: Finish
    named_prefix: int
    """Tokens of the longest prefix of the continuation that the thought contains: naming the
    answer, a diagnostic.
    """
    thought_nats: float
    """-log p of what was sampled of the thought, its closer included, at the sampling temperature."""
    thought_actions: int
    """How many tokens that were."""
    opener_mass: float | None = None
    """p(opener | context) with nothing removed from the softmax; None: not measured."""
    annotated_entropy: float | None = None
    """Nats, at the cut, by the proxy of the shards' annotations; None: there is none."""
    prediction: Prediction | None = None
    greedy: Greedy | None = None

    @property
    def key(self) -> Key:
        return (self.epoch, self.document, self.cut, self.sample)

    @property
    def num_tokens(self) -> int:
        return len(self.continuation_ids)

    @property
    def vote(self) -> int | None:
        """What this thought says is the next token: its prediction's first, else the likeliest after it."""
        return self.firsts[OWN].token if self.prediction is None else self.prediction.first

    def total(self, frame: str) -> float:
        """Log-probability of the whole continuation under a frame, summed in float64."""
        return float(np.sum(self.logp[frame], dtype=np.float64))

    def first_correct(self, frame: str) -> bool | None:
        """The likeliest first token of the continuation is the true one; None where the frame was not read."""
        first = self.firsts.get(frame)
        return None if first is None else first.token == int(self.continuation_ids[0])


def frames(records: Sequence[Record]) -> list[str]:
    """Every frame that some record has, in the order of appearance."""
    return list(dict.fromkeys(frame for record in records for frame in record.logp))


def prompts_of(records: Sequence[Record]) -> list[list[Record]]:
    """The records of every prompt, in the order of the prompts."""
    found: dict[tuple[int, str, int], list[Record]] = {}
    for record in records:
        found.setdefault(record.key[:3], []).append(record)
    return list(found.values())


def write_parquet(
    path: Path, records: Sequence[Record], decode: Callable[[Sequence[int]], str]
) -> None:
    """One row per record: keys, sums per frame, per-token log-probabilities of no_think and own,
    and the texts. What was not measured is null.
    """
    rows = [_row(record, decode) for record in records]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for frame in frames(records):
        columns[f"logp_{frame}"] = [r.total(frame) if frame in r.logp else None for r in records]
    pq.write_table(pa.table(columns), path, compression="zstd")


_PLAIN = (
    *("epoch", "document", "domain", "cut", "sample", "num_tokens", "num_bytes", "finish"),
    *("named_prefix", "opener_mass", "annotated_entropy", "thought_nats", "thought_actions"),
)


def _row(record: Record, decode: Callable[[Sequence[int]], str]) -> dict[str, object]:
    thought, continuation = record.thought_ids.tolist(), record.continuation_ids.tolist()
    said, greedy = record.prediction, record.greedy
    return {
        **{name: getattr(record, name) for name in _PLAIN},
        "gain": (record.total(OWN) - record.total(NO_THINK)) / record.num_tokens,
        "first_correct_no_think": record.first_correct(NO_THINK),
        "first_correct_thought": record.first_correct(OWN),
        "first_correct_greedy": record.first_correct(GREEDY),
        "entropy_no_think": record.firsts[NO_THINK].entropy,
        "thought": decode(thought),
        "continuation": decode(continuation),
        "thought_ids": thought,
        "continuation_ids": continuation,
        "token_logp_no_think": record.logp[NO_THINK].tolist(),
        "token_logp_own": record.logp[OWN].tolist(),
        "greedy_thought": None if greedy is None else decode(greedy.thought_ids),
        "prediction": None if said is None else decode(said.ids),
        "prediction_match": None if said is None else said.match,
    }
