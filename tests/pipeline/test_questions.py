"""Files of questions: what can be asked is asked whole, what cannot be is counted or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rlpt.config import PromptConfig
from rlpt.questions import (
    Questions,
    QuestionStream,
    context_of,
    evidence,
    held_out_questions,
    in_words,
    question_prompts,
    read,
)
from rlpt.rlvr import RLVRStage
from rlpt.types import Markers
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse

PROMPTS = PromptConfig(context_tokens=40, min_context_tokens=30, horizon_tokens=6)
MARKERS = Markers(320, 321)


def stage_of(file: Path, **questions: object) -> RLVRStage:
    table = {
        "name": "sums",
        "kind": "rlvr",
        "steps": 2,
        "documents_per_step": 2,
        "questions": {"train": str(file), "test": str(file)} | questions,
    }
    return parse(RLVRStage, table, "test")


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(file: Path, shards: ShardFolder, **questions: object) -> Questions:
    return read(file, stage_of(file, **questions), PROMPTS, shards)


def test_a_question_is_a_document_whose_cut_is_its_end(tmp_path: Path, shards: ShardFolder) -> None:
    rows = (
        {"question": " 2 + 3? ", "answer": "So it is\n#### 5\n"},
        {"question": "9?", "answer": 9},
    )
    file = lines(tmp_path / "sums.jsonl", *rows)
    found = asked(file, shards, answer_pattern="#### (.+)")
    assert found.dropped == {"whose answer matches no answer_pattern": 1}
    found = asked(
        file, shards, answer_pattern="(?:#### )?(.+)$", template="Q: {question}\nA:  {answer}\n"
    )
    assert [document.text for document in found.documents] == [
        "Q: 2 + 3?\nA:  5\n",
        "Q: 9?\nA:  9\n",
    ]
    (first, second) = question_prompts(found.documents, PROMPTS, MARKERS)
    token_bytes = shards.token_bytes()

    def text(ids: np.ndarray) -> bytes:
        return b"".join(token_bytes[index] for index in ids.tolist())

    assert (text(first.context_ids), text(first.continuation_ids)) == (b"Q: 2 + 3?\nA:", b"  5\n")
    assert (text(second.context_ids), text(second.continuation_ids)) == (b"Q: 9?\nA:", b"  9\n")
    assert first.policy_ids.tolist() == [*first.context_ids.tolist(), 320]
    assert first.continuation_bytes == 4
    assert first.key == (0, found.documents[0].document_id, len(first.context_ids))


def test_markers_in_a_question_are_text(tmp_path: Path, shards: ShardFolder) -> None:
    file = lines(tmp_path / "q.jsonl", {"question": "</think>{answer}", "answer": "1"})
    (document,) = asked(file, shards).documents
    assert context_of(document) == "Question: </think>{answer}\nAnswer:"
    assert document.ids.max() < 320


def test_what_cannot_be_asked_is_counted(tmp_path: Path, shards: ShardFolder) -> None:
    file = lines(
        tmp_path / "q.jsonl",
        {"question": "1 + 1?", "answer": "2"},
        {"question": " 1  + 1? ", "answer": "3"},
        {"question": "", "answer": "3"},
        {"question": "two?", "answer": None},
        {"question": "three?", "answer": " "},
        {"question": "four?", "answer": "four"},
        {"question": "five?", "answer": "1\n5"},
        {"question": "half \ud83d?", "answer": "5"},
        {"question": "long? " * 40, "answer": "5"},
        {"question": "pi?", "answer": 3.141592653589793},
    )
    found = asked(file, shards)
    assert len(found) == 1
    assert found.dropped == {
        "asked before": 1,
        "without a question": 1,
        "without an answer": 2,
        "whose answer is no number": 1,
        "whose answer has several lines": 1,
        "with half a character": 1,
        "longer than prompts.context_tokens = 40": 1,
        "answered by more than prompts.horizon_tokens = 6": 1,
    }
    stage = stage_of(file)
    exact = stage.model_copy(update={"reward": stage.reward.model_copy(update={"how": "exact"})})
    assert len(read(file, exact, PROMPTS, shards)) == 2


def test_parquet_asks_what_json_lines_do(tmp_path: Path, shards: ShardFolder) -> None:
    rows = [{"q": f"{n} + 1?", "a": n + 1, "other": [n]} for n in range(5)]
    fields = {"question_field": "q", "answer_field": "a"}
    file = lines(tmp_path / "q.jsonl", *rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    both = [asked(path, shards, **fields) for path in (file, tmp_path / "q.parquet")]
    texts = [[document.text for document in found.documents] for found in both]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 5
    assert both[0].digest != both[1].digest


MISTAKES = {
    "absent": (None, "no such file"),
    "no_rows": (b"\n\n", "none can be asked .it is empty."),
    "none_left": (b'{"question": "", "answer": "1"}', r"none can be asked .1 without a question."),
    "latin1": ('{"question": "\xe9?", "answer": "1"}'.encode("latin1"), "line 1: not UTF-8"),
    "cut_short": (b'{"question": "1?", "answer": "1"}\n{"que', "line 2: not JSON"),
    "a_list": (b"[1]", "line 1: no object"),
    "other_fields": (
        b'{"questions": "1?", "answer": "1"}',
        "no field 'question'; did you mean 'questions'",
    ),
    "nested": (b'{"question": ["1?"], "answer": "1"}', "question is a list; give text"),
    "truth": (b'{"question": "1?", "answer": true}', "answer is a bool; give text"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_file_that_is_none_is_refused_in_one_line(
    tmp_path: Path, shards: ShardFolder, case: str
) -> None:
    data, words = MISTAKES[case]
    file = tmp_path / "q.jsonl"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        asked(file, shards)
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_and_one_of_other_columns_are_refused(
    tmp_path: Path, shards: ShardFolder
) -> None:
    file = tmp_path / "q.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="not parquet"):
        asked(file, shards)
    parquet.write_table(pa.table({"question": ["1?"]}), file)
    with pytest.raises(UserError, match=r"has no field 'answer'; valid: question .it is named by"):
        asked(file, shards)


SETTINGS = {
    "other_format": ({"train": "q.csv"}, "neither .jsonl nor .parquet"),
    "no_group": ({"answer_pattern": "####"}, "put the answer into a group"),
    "no_pattern": ({"answer_pattern": "(("}, "answer_pattern"),
    "no_answer": ({"template": "{question}"}, r"needs \{question\} once"),
    "answer_first": ({"template": "{answer}{question}"}, "after it"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_ask_nothing_are_refused(tmp_path: Path, case: str) -> None:
    questions, words = SETTINGS[case]
    with pytest.raises(UserError, match=words):
        stage_of(tmp_path / "q.jsonl", **questions)


def test_every_question_comes_up_once_an_epoch_and_whole(
    tmp_path: Path, shards: ShardFolder
) -> None:
    file = lines(tmp_path / "q.jsonl", *({"question": f"{n}?", "answer": n} for n in range(7)))
    stream = QuestionStream(asked(file, shards), 3, "sums", range(7))
    trunks = [stream.trunk(position, PROMPTS, 3) for position in range(14)]
    names = [trunk.document for trunk in trunks]
    assert sorted(names[:7]) == sorted(names[7:]) == sorted({*names})
    assert names[:7] != names[7:]
    assert [trunk.epoch for trunk in trunks] == [0] * 7 + [1] * 7
    assert all(trunk.start == 0 and len(trunk.cuts) == 1 for trunk in trunks)


def test_held_out_questions_are_spread_over_the_file_and_shared_ones_counted(
    tmp_path: Path, shards: ShardFolder
) -> None:
    train = lines(
        tmp_path / "train.jsonl", *({"question": f"a{n}?", "answer": n} for n in range(9))
    )
    test = lines(
        tmp_path / "test.jsonl", *({"question": f"A{n}?", "answer": n} for n in range(6, 16))
    )
    found = [asked(path, shards, held_out=5) for path in (train, test)]
    cfg = stage_of(test, held_out=5).questions
    picked = [context_of(document) for document in held_out_questions(found[1], cfg)]
    assert picked == [f"Question: A{n}?\nAnswer:" for n in (6, 8, 10, 12, 14)]
    table = evidence(cfg, *found)
    assert table["held_out_and_trained"] == 2
    assert table["train"]["questions"] == 9
    assert "5 held out of 10; warning: 2 held-out questions are trained on, too" in in_words(table)
    everything = cfg.model_copy(update={"held_out": 0})
    assert len(held_out_questions(found[1], everything)) == 10


@pytest.mark.parametrize("old", [b"rainy", b"other"], ids=["value", "name"])
def test_a_table_that_is_not_utf8_is_refused(
    tmp_path: Path, shards: ShardFolder, old: bytes
) -> None:
    table = pa.table({"question": ["rainy"], "answer": ["1"], "other": ["x"]})
    parquet.write_table(table, tmp_path / "q.parquet", compression="none")
    (tmp_path / "q.parquet").write_bytes(
        (tmp_path / "q.parquet").read_bytes().replace(old, b"\xff" * 5)
    )
    with pytest.raises(UserError, match=r"q\.parquet: not parquet"):
        asked(tmp_path / "q.parquet", shards)


def test_a_row_of_lists_without_end_is_refused(tmp_path: Path, shards: ShardFolder) -> None:
    (tmp_path / "q.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: not JSON"):
        asked(tmp_path / "q.jsonl", shards)
