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

NO_THINK, OWN, NULL = "no_think", "own", "null"
WRONG, WRONG_NO_THINK = "wrong_target", "wrong_no_think"
Key = tuple[int, str, int, int]


@dataclass(frozen=True)
class Record:
    """Thought ``sample`` of one prompt. ``logp["own"] - logp["no_think"]``, summed over the tokens,
    is its gain.

    ``logp`` has one array a frame: no_think (the trunk itself), own, and the controls that were
    asked for. All are about the prompt's own continuation, except wrong_target (own thought) and
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
    first_correct_no_think: bool
    """The likeliest first token of the continuation is the true one, without a thought."""
    first_correct_thought: bool
    thought_ids: Int[np.ndarray, " Z"]
    finish: Finish
    named_prefix: int
    """Tokens of the longest prefix of the continuation that the thought contains: naming the
    answer, a diagnostic.
    """
    opener_mass: float | None = None
    """p(opener | context) with nothing removed from the softmax; None: not measured."""

    @property
    def key(self) -> Key:
        return (self.epoch, self.document, self.cut, self.sample)

    @property
    def num_tokens(self) -> int:
        return len(self.continuation_ids)

    def total(self, frame: str) -> float:
        """Log-probability of the whole continuation under a frame, summed in float64."""
        return float(np.sum(self.logp[frame], dtype=np.float64))


def frames(records: Sequence[Record]) -> list[str]:
    """Every frame that some record has, in the order of appearance."""
    return list(dict.fromkeys(frame for record in records for frame in record.logp))


def write_parquet(
    path: Path, records: Sequence[Record], decode: Callable[[Sequence[int]], str]
) -> None:
    """One row per record: keys, sums per frame, per-token log-probabilities of no_think and own,
    and the texts.
    """
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    for record in records:
        for name, value in _row(record, decode).items():
            columns[name].append(value)
    for frame in frames(records):
        columns[f"logp_{frame}"] = [r.total(frame) if frame in r.logp else None for r in records]
    pq.write_table(pa.table(columns), path, compression="zstd")


_COLUMNS = (
    *(
        "epoch",
        "document",
        "domain",
        "cut",
        "sample",
        "num_tokens",
        "num_bytes",
        "gain",
        "finish",
        "named_prefix",
    ),
    *("first_correct_no_think", "first_correct_thought", "opener_mass", "thought", "continuation"),
    *("thought_ids", "continuation_ids", "token_logp_no_think", "token_logp_own"),
)


def _row(record: Record, decode: Callable[[Sequence[int]], str]) -> dict[str, object]:
    plain = {name: getattr(record, name) for name in _COLUMNS if hasattr(record, name)}
    thought, continuation = record.thought_ids.tolist(), record.continuation_ids.tolist()
    return {
        **plain,
        "gain": (record.total(OWN) - record.total(NO_THINK)) / record.num_tokens,
        "thought": decode(thought),
        "continuation": decode(continuation),
        "thought_ids": thought,
        "continuation_ids": continuation,
        "token_logp_no_think": record.logp[NO_THINK].tolist(),
        "token_logp_own": record.logp[OWN].tolist(),
    }
