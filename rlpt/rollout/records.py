"""Groups as rows of JSON, whole: what a checkpoint's buffer and saved rollouts are made of.

A row names its document by the position in the stage's order; text is read from the shards again.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import zstandard

from rlpt.types import Group, Prompt, Rollout
from rlpt_data.strict import UserError

Row = dict[str, Any]


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


def packed(rows: Iterable[Row]) -> bytes:
    """JSON lines, compressed, with a checksum: a digit that flips is still JSON."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return zstandard.ZstdCompressor(write_checksum=True).compress(text.encode())


def unpacked(data: bytes, where: str) -> list[Row]:
    """Raises UserError where the bytes are damaged."""
    # Piece by piece: in one go the frame's own word for its size is believed, and the memory for it taken.
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        text = frame.decompress(data).decode()
        if not frame.eof:
            raise ValueError("the file ends too early")
        return [json.loads(line) for line in text.splitlines()]
    except (zstandard.ZstdError, ValueError) as error:
        raise UserError(
            f"{where}: damaged: {error}; restore it, or go on from another checkpoint"
        ) from error
