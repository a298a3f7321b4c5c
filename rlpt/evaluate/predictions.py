"""Rollouts -> what they predict, where the policy writes a prediction after the closer. Pure; bytes are compared."""

from collections.abc import Sequence

from rlpt.evaluate.records import Prediction
from rlpt.reward.match import predicted, prefix_match
from rlpt.types import Group


def prediction(
    group: Group, g: int, closer: int, token_bytes: Sequence[bytes]
) -> Prediction | None:
    """What rollout ``g`` predicts; None where the frame asks for no prediction (no ``token_bytes``).

    It matches as RPT has it (arXiv 2506.08007, Eq. 3), whatever reward the policy was trained with.
    """
    if not token_bytes:
        return None
    ids = [int(index) for index in group.rollouts[g].prediction_ids if index != closer]
    gold = [token_bytes[int(index)] for index in group.prompt.continuation_ids]
    match = prefix_match(predicted(group, g, closer, token_bytes), gold)
    marks = group.prompt.frame.answer
    return Prediction(tuple(ids), first_of_answer(ids, marks, token_bytes), match)


def first_of_answer(
    ids: Sequence[int], marks: tuple[bytes, bytes] | None, token_bytes: Sequence[bytes]
) -> int | None:
    """The first of ``ids`` that begins inside the last whole pair of marks; without marks the first of all."""
    if marks is None:
        return ids[0] if ids else None
    said = b"".join(token_bytes[index] for index in ids)
    stop = said.rfind(marks[1])
    opened = said.rfind(marks[0], 0, max(stop, 0))
    if opened < 0:
        return None
    start, at = opened + len(marks[0]), 0
    for index in ids:
        if start <= at < stop:
            return index
        at += len(token_bytes[index])
    return None
