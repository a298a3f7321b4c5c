"""Groups as rows of JSON, whole: what a checkpoint's buffer and saved rollouts are made of.

A row names its document by the position in the stage's order; text is read from the shards again.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from rlpt.rows import Row, unzipped, zipped
from rlpt.types import Finish, Group, Prompt, Rollout
from rlpt_data.strict import Strict, UserError, json_of


def group_row(group: Group) -> Row:
    prompt = group.prompt
    return {
        "document": prompt.trunk.document,
        "cut": prompt.key[2],
        "budget": group.budget,
        "rollouts": [_rollout_row(rollout) for rollout in group.rollouts],
    }


def _rollout_row(rollout: Rollout) -> Row:
    return {
        "ids": rollout.ids.tolist(),
        "action": rollout.action.astype(int).tolist(),
        "logp": [float(value) for value in rollout.logp],
        "version": rollout.version.tolist(),
        "thought_len": rollout.thought_len,
        "finish": rollout.finish,
    }


def groups_of(rows: Sequence[Row], prompts: Sequence[Prompt], where: str) -> list[Group]:
    """Rows back into groups of the prompts they were sampled for. Raises UserError where the text is another one."""
    known = {(prompt.trunk.document, prompt.key[2]): prompt for prompt in prompts}
    groups = []
    for row in rows:
        prompt = known.get((row["document"], row["cut"]))
        if prompt is None:
            raise UserError(
                f"{where}: holds thoughts before token {row['cut']} of document {row['document']}, which these shards "
                "and this seed do not cut there; use the run's own shards, prompts and seed"
            )
        groups.append(Group(prompt, tuple(map(_rollout, row["rollouts"])), row["budget"]))
    return groups


def _rollout(row: Row) -> Rollout:
    return Rollout(
        np.array(row["ids"], dtype=np.int64),
        np.array(row["action"], dtype=bool),
        np.array(row["logp"], dtype=np.float32),
        np.array(row["version"], dtype=np.int64),
        row["thought_len"],
        row["finish"],
    )


Index = Annotated[int, Field(ge=0, lt=2**31)]


class _RolloutRow(Strict):
    ids: Annotated[list[Index], Field(min_length=1)]
    action: list[Literal[0, 1]]
    logp: list[float]
    version: list[Annotated[int, Field(ge=-1, lt=2**53)]]
    thought_len: Index
    finish: Finish

    @model_validator(mode="after")
    def _one_length(self) -> "_RolloutRow":
        if {len(self.action), len(self.logp), len(self.version)} != {len(self.ids)}:
            raise ValueError("ids, action, logp and version differ in length")
        if self.thought_len >= len(self.ids):
            raise ValueError("the thought has no closer")
        return self


class _GroupRow(Strict):
    document: str
    cut: int
    budget: Index | None
    rollouts: Annotated[list[_RolloutRow], Field(min_length=1)]


class _LotRow(Strict):
    """A document in hand (`rlpt.lots`)."""

    place: str
    position: Annotated[int, Field(ge=0, lt=2**53)]
    uses: Index
    budget: Index | None
    cuts: list[int]
    groups: list[_GroupRow] | None


class _RatingRow(Strict):
    """What is known of a document or a prompt (`rlpt.pool`)."""

    place: str
    position: int
    of: Literal["document", "prompt"]
    name: str
    rating: list[float]


def _checked(row: Any) -> Row:
    """The row, once all of it is what a row holds. Raises ValueError."""
    kind = _RatingRow if isinstance(row, dict) and "of" in row else _LotRow
    try:
        kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return row


def packed(rows: Iterable[Row]) -> bytes:
    """JSON lines, compressed."""
    return zipped("".join(json.dumps(row) + "\n" for row in rows).encode())


def unpacked(data: bytes, where: str) -> list[Row]:
    """Whatever was packed. Raises UserError where the bytes are damaged."""
    return _read(data, where, json_of)


def supply_rows(data: bytes, where: str) -> list[Row]:
    """Documents in hand and ratings, once all of each is what such a row holds. Raises UserError."""
    return _read(data, where, lambda line: _checked(json_of(line)))


def _read(data: bytes, where: str, row_of: Callable[[bytes], Row]) -> list[Row]:
    try:
        return [row_of(line) for line in unzipped(data).splitlines()]
    except ValueError as error:
        raise UserError(
            f"{where}: damaged: {error}; restore it, or go on from another checkpoint"
        ) from error
