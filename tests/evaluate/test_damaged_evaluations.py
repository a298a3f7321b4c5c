"""What an evaluation left on disk and is no longer what was written: refused in one line, never half believed."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlpt.evaluate import answers, files
from rlpt.evaluate.answers import Answered
from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.plain import plain, restored
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.records import First, Greedy, Prediction, Record
from rlpt.rows import unzipped, zipped
from rlpt_data.strict import UserError

RECORD = Record(
    epoch=0, document="ab", domain="", cut=3, sample=0, num_bytes=4,
    continuation_ids=np.array([1, 2]), logp={"own": np.array([-1.0, -np.inf], np.float32)},
    firsts={"own": First(1, -0.5)}, thought_ids=np.array([5]), finish="closer", named_prefix=0,
    thought_nats=1.5, thought_actions=2, prediction=Prediction((1, 2), 1, 1.0),
    greedy=Greedy((5,), None),
)  # fmt: skip
WINDOW = WindowRecord("ab", "", 0, 3.5, 4, 9)
WHOLE = Evaluation([RECORD], [WINDOW], {"verdict": "x"}, Resampling("document", 50, 0))
ANSWER = Answered("ab", "2?", "2", ["t"], ["2"], [True], ["3"], [False], [1], [True])


def table_of(path: Path) -> dict[str, Any]:
    files.save(path, WHOLE)
    return json.loads(unzipped(path.read_bytes()))


def test_an_evaluation_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert table_of(tmp_path / "e") == table_of(tmp_path / "e")
    back = files.load(tmp_path / "e")
    assert plain(back.records) == plain([RECORD])
    assert (back.windows, back.summary, back.resampling) == (
        [WINDOW],
        {"verdict": "x"},
        WHOLE.resampling,
    )


def test_an_evaluation_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, sizes = os.fsync, []

    def noted(descriptor: int) -> None:
        assert not (tmp_path / "e").exists()
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.save(tmp_path / "e", WHOLE)
    assert sizes == [(tmp_path / "e").stat().st_size]


def test_an_evaluation_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/e: is gone"):
        files.load(tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("document", 5), ("epoch", "0"), ("epoch", True), ("num_bytes", 1.5), ("finish", "end"),
        ("thought_nats", "x"), ("continuation_ids", [1, 2]), ("opener_mass", "x"),
        ("continuation_ids", {"is": "float32", "values": [1.0]}),
        ("continuation_ids", {"is": "int64", "values": [[1], [2]]}),
        ("logp", {"own": []}), ("logp", {"is": "mapping", "items": {"own": 3}}),
        ("firsts", {"is": "mapping", "items": {"own": {"is": "First", "fields": {"token": "x"}}}}),
        ("prediction", {"is": "Prediction", "fields": {"ids": 3, "first": 1, "match": 1.0}}),
        ("more", 1),
    ],
)  # fmt: skip
def test_a_record_with_a_field_of_another_type_is_damage(
    tmp_path: Path, name: str, value: Any
) -> None:
    table = table_of(tmp_path / "e")
    table["records"]["items"][0]["fields"][name] = value
    (tmp_path / "e").write_bytes(zipped(json.dumps(table).encode()))
    with pytest.raises(UserError, match="e: damaged: "):
        files.load(tmp_path / "e")


@pytest.mark.parametrize(
    "change",
    [
        {"records": 5}, {"windows": {"is": "list", "items": [5]}}, {"summary": []}, {"more": 1},
        {"resampling": {}}, {"resampling": {"unit": "word", "draws": 1, "seed": 0}}, {"resampling": 5},
        {"records": {"is": "tuple", "items": []}},
    ],
    ids=str,
)  # fmt: skip
def test_an_evaluation_of_other_parts_is_damage(tmp_path: Path, change: dict) -> None:
    table = table_of(tmp_path / "e") | change
    (tmp_path / "e").write_bytes(zipped(json.dumps(table).encode()))
    with pytest.raises(UserError, match="e: damaged: "):
        files.load(tmp_path / "e")


@pytest.mark.parametrize(
    "table",
    [
        {}, {"is": 5}, {"is": "Path", "fields": {}}, {"is": "First", "fields": {}},
        {"is": "First", "fields": []}, {"is": "object", "values": [1]}, {"is": "S9", "values": ["x"]},
        {"is": "int64", "values": [2**70]}, {"is": "float32", "values": ["x"]},
        {"is": "int64", "values": [[1], [2, 3]]}, {"is": "list", "items": 5}, {"is": "list"},
        {"is": "mapping", "items": []}, {"is": "list", "items": [], "more": 1}, {"is": [], "fields": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_table_that_nothing_wrote_makes_nothing(table: dict) -> None:
    with pytest.raises(
        ValueError, match=r"nothing wrote|other fields|no array of|could not convert|inhomogeneous"
    ):
        restored(table)


@pytest.mark.parametrize(
    "change", [{"right": [1]}, {"thoughts": "t"}, {"question": 3}, {"more": 1}], ids=str
)
def test_answers_of_other_types_are_damage(tmp_path: Path, change: dict) -> None:
    answers.save(tmp_path / "a", [ANSWER])
    assert answers.load(tmp_path / "a") == [ANSWER]
    (tmp_path / "a").write_bytes(zipped(json.dumps(asdict(ANSWER) | change).encode()))
    with pytest.raises(UserError, match="a: damaged: "):
        answers.load(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a: damaged: "):
        answers.load(tmp_path / "a")
