"""Next-token frames: what is shown, and what of it is a target."""

from dataclasses import replace

import numpy as np
import torch

from rlpt.batch import framed_batch
from rlpt.config import PromptConfig
from rlpt.frames import Framed, Framer
from rlpt.stages import MixConfig
from rlpt.types import Markers
from rlpt_data.shards import Document, ShardFolder, Thought

MARKERS = Markers(320, 321)
CPU = torch.device("cpu")


def framer(**mix: float) -> Framer:
    shares = {"plain": 0.0, "worked": 0.0, "copied": 0.0, "empty": 0.0} | mix
    return Framer(
        MixConfig(**shares),
        PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5),
        32,
        7,
        MARKERS,
        0,
    )


def page(**changes: object) -> Document:
    """Ten tokens, one supplied cut before token 6, a worked thought there, the last two tokens a target span."""
    ids = np.arange(10, 20, dtype=np.uint32)
    table = {
        "document_id": "d", "url": None, "domain": "R", "text": "x" * 10, "ids": ids,
        "offsets": np.arange(11, dtype=np.uint32), "cuts": np.array([6], dtype=np.uint32),
        "cut_kinds": np.array([0], dtype=np.uint8),
        "thoughts": (Thought(6, np.array([3, 4], dtype=np.uint32), "worked"),), "target_spans": ((7, 9),),
    }  # fmt: skip
    return Document(**(table | changes))


def shown(frame: Framed) -> tuple[list[int], list[int]]:
    """The sequence, and the targets in it as ids (0 elsewhere)."""
    context = frame.trunk.ids[: frame.branch.cut]
    ids = [*context.tolist(), *frame.branch.ids.tolist()]
    target = [*frame.context_target, *(frame.thought_target | frame.text_target)]
    return ids, [i if t else 0 for i, t in zip(ids, target, strict=True)]


def test_a_worked_page_trains_on_thought_closer_and_its_spans_alone() -> None:
    ids, target = shown(framer(worked=1.0).frame(0, page()))
    assert ids == [10, 11, 12, 13, 14, 15, 320, 3, 4, 321, 16, 17, 18, 19]
    assert target == [0, 0, 0, 0, 0, 0, 0, 3, 4, 321, 0, 17, 18, 0]


def test_without_spans_all_text_but_the_first_token_and_the_opener_is_a_target() -> None:
    ids, target = shown(framer(worked=1.0).frame(0, page(target_spans=None)))
    assert [i for i, t in zip(ids, target, strict=True) if t == 0] == [10, 320]


def test_a_page_without_thoughts_is_shown_plain() -> None:
    ids, target = shown(framer(worked=1.0).frame(0, page(thoughts=())))
    assert ids == list(range(10, 20))
    assert target == [0] * 7 + [17, 18, 0]


def test_several_thoughts_in_one_window_keep_the_text_in_order(shards: ShardFolder) -> None:
    make = framer(copied=1.0)
    make = replace(
        make, mix=make.mix.model_copy(update={"thoughts_per_window": 3}), window_tokens=64
    )
    most = 0
    for document in shards.split("train"):
        frame = make.frame(0, document)
        ids, target = shown(frame)
        most = max(most, ids.count(MARKERS.opener))
        assert ids.count(MARKERS.opener) == ids.count(MARKERS.closer) == len(frame.trunk.cuts)
        text, inside = [], False
        for index, trained in zip(ids, target, strict=True):
            inside |= index == MARKERS.opener
            if not inside:
                text.append(index)
            assert bool(trained) == (
                (index != MARKERS.opener and len(text) != 1) or (inside and index != MARKERS.opener)
            )
            inside &= index != MARKERS.closer
        assert text == frame.trunk.ids.tolist()
    assert most == 3


def test_the_opener_is_never_a_target(shards: ShardFolder) -> None:
    make = framer(plain=0.2, copied=0.5, empty=0.3)
    for document in shards.split("train"):
        frame = make.frame(0, document)
        targets = frame.branch.ids[frame.thought_target | frame.text_target]
        assert MARKERS.opener not in targets
        assert not frame.thought_target[
            ~np.isin(np.arange(len(frame.branch.ids)), np.arange(1, frame.branch.score_start))
        ].any()


def test_frames_keep_their_shares_and_copied_spans_come_from_the_context(
    shards: ShardFolder,
) -> None:
    make = framer(plain=0.2, copied=0.5, empty=0.3)
    kinds = {"plain": 0, "copied": 0, "empty": 0}
    for epoch in range(4):
        for document in shards.split("train"):
            frame = make.frame(epoch, document)
            if frame.branch.cut == 0:
                kinds["plain"] += 1
                continue
            thought = frame.branch.ids[1 : frame.branch.score_start - 1].tolist()
            kinds["copied" if thought else "empty"] += 1
            context = frame.trunk.ids[: frame.branch.cut].tolist()
            assert not thought or any(
                context[i : i + len(thought)] == thought for i in range(len(context))
            )
            assert len(thought) <= 7
    total = sum(kinds.values())
    # Three standard errors at these counts are below 0.07.
    assert abs(kinds["plain"] / total - 0.2) < 0.07
    assert abs(kinds["empty"] / total - 0.3) < 0.07


def test_frames_depend_on_seed_epoch_and_document_alone(shards: ShardFolder) -> None:
    make = framer(plain=0.2, copied=0.5, empty=0.3)
    document = shards.split("train")[3]
    assert shown(make.frame(1, document)) == shown(make.frame(1, document))
    assert len({str(shown(make.frame(e, document))) for e in range(8)}) > 2


def test_rows_point_at_the_hidden_state_before_their_target() -> None:
    frames = [
        framer(worked=1.0).frame(0, page()),
        framer(plain=1.0).frame(0, page(target_spans=None)),
    ]
    packed, (text, thought) = framed_batch(frames, MARKERS, CPU)
    flat = packed.ids_NT.reshape(-1)
    for kind in (text, thought):
        assert torch.equal(flat[kind.hidden_R + 1], kind.target_R)
    assert thought.target_R.tolist() == [3, 4, 321]
    assert text.target_R.tolist() == [17, 18, *range(11, 20)]
    assert text.banned == MARKERS.ids
    assert thought.banned == (MARKERS.opener,)


def test_text_that_spells_a_marker_is_plain_text(shards: ShardFolder) -> None:
    """MEASURING, section 6: text can never contain the markers."""
    for text in ("a </think> b", "<think>", "<|endoftext|>", "<|im_end|> x"):
        ids = shards.encode(text)
        assert not set(ids.tolist()) & set(MARKERS.ids)
        assert b"".join(shards.token_bytes()[i] for i in ids).decode() == text
