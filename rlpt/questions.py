"""Files of questions -> documents with one cut each: the question before it, the gold answer behind it.

What cannot be asked is dropped and counted by its reason; what is no such file at all is refused. The ids are those of
the shards' tokenizer.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from rlpt.config import PromptConfig
from rlpt.prompts import Stream, prompts_of, window
from rlpt.reward.answer import How, number
from rlpt.rlvr import ANSWER, QUESTION, QuestionRows, QuestionsConfig, RLVRStage
from rlpt.types import Markers, Prompt, Trunk
from rlpt_data.shards import CUT_KINDS, Document, ShardFolder, Split, digest_file
from rlpt_data.strict import UserError, nearest

Ids = UInt32[np.ndarray, " _"]


class Questions(Split):
    """The questions of one file that can be asked, in its order."""

    def __init__(
        self, path: Path, documents: Sequence[Document], dropped: Counter[str], digest: str
    ) -> None:
        self.name = str(path)
        self.documents = documents
        self.dropped = dropped
        self.digest = digest
        """blake2b of the file."""
        self._ends = [len(documents)]

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    @cached_property
    def asked(self) -> set[str]:
        """The questions, as they are compared with others: no matter the spaces and capitals."""
        return {_folded(context_of(document)) for document in self.documents}


class QuestionStream(Stream):
    """The order of the questions of a stage; a question is read whole."""

    def trunk(self, position: int, cfg: PromptConfig, seed: int) -> Trunk:
        epoch, document = self.at(position)
        return whole(document, epoch)


def whole(document: Document, epoch: int = 0) -> Trunk:
    """A question with its answer, and the cut between them."""
    return window(document, epoch, 0, len(document.ids), document.cuts.tolist())


def context_of(document: Document) -> str:
    """The text before the cut."""
    return document.text.encode()[: int(document.offsets[document.cuts[0]])].decode()


def gold_of(document: Document) -> str:
    """The text behind the cut."""
    return document.text.encode()[int(document.offsets[document.cuts[0]]) :].decode()


def question_stream(
    shards: ShardFolder, prompts: PromptConfig, stage: RLVRStage, seed: int
) -> QuestionStream:
    """The order in which a stage asks its questions."""
    questions = read(stage.questions.train, stage, prompts, shards)
    return QuestionStream(questions, seed, stage.name, range(len(questions)))


def questions_of(
    stage: RLVRStage, prompts: PromptConfig, shards: ShardFolder
) -> tuple[Questions, Questions]:
    """(to train on, to hold out)."""
    train, test = stage.questions.train, stage.questions.test
    return read(train, stage, prompts, shards), read(test, stage, prompts, shards)


def held_out_questions(test: Questions, cfg: QuestionsConfig) -> list[Document]:
    """`held_out` questions of the file, evenly spread over it."""
    count = min(cfg.held_out or len(test), len(test))
    return [test[place * len(test) // count] for place in range(count)]


def question_prompts(
    documents: Sequence[Document], prompts: PromptConfig, markers: Markers
) -> list[Prompt]:
    """One prompt a question."""
    return [
        prompt for document in documents for prompt in prompts_of(whole(document), prompts, markers)
    ]


def evidence(cfg: QuestionsConfig, train: Questions, test: Questions) -> dict[str, Any]:
    """What a run says of its questions, and is held to when it goes on."""
    asked = held_out_questions(test, cfg)
    return {
        "train": {
            "path": train.name,
            "hash": train.digest,
            "questions": len(train),
            "dropped": dict(train.dropped),
        },
        "test": {
            "path": test.name,
            "hash": test.digest,
            "questions": len(test),
            "dropped": dict(test.dropped),
            "held_out": len(asked),
        },
        "held_out_and_trained": sum(_folded(context_of(each)) in train.asked for each in asked),
    }


def in_words(found: dict[str, Any]) -> str:
    """One line of `evidence`."""
    train, test, shared = found["train"], found["test"], found["held_out_and_trained"]
    line = f"{train['questions']:,} questions{_without(train)}, {test['held_out']:,} held out of {test['questions']:,}"
    line += _without(test)
    if shared:
        line += f"; warning: {shared} held-out questions are trained on, too"
    return line


def _without(found: dict[str, Any]) -> str:
    return f" (dropped: {_listed(found['dropped'])})" if found["dropped"] else ""


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))


# ---- files ---------------------------------------------------------------------------------------


def read(path: Path, stage: RLVRStage, prompts: PromptConfig, shards: ShardFolder) -> Questions:
    """The questions of a file. Raises UserError where it is none, or none of it can be asked."""
    pairs, dropped = question_pairs(path, stage.questions, stage.reward.how)
    documents = list(_documents(pairs, stage.questions.template, prompts, shards, dropped))
    if not documents:
        raise none_left(path, dropped)
    return Questions(path, documents, dropped, digest_file(path))


def question_pairs(
    path: Path, cfg: QuestionRows, how: How
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(question, gold answer) of every row that has both, every question once, and how many rows were dropped why.

    Raises UserError where the file is none of questions.
    """
    if not path.is_file():
        raise UserError(f"questions in {path}: no such file; correct the path")
    dropped: Counter[str] = Counter()
    return list(_asked(_rows(path, cfg), cfg.answer_pattern, how, dropped)), dropped


def none_left(path: Path, dropped: Mapping[str, int]) -> UserError:
    return UserError(
        f"questions in {path}: none can be asked ({_listed(dropped) or 'it is empty'}); give another file, or change "
        "what drops them"
    )


def _rows(path: Path, cfg: QuestionRows) -> Iterator[tuple[str, str]]:
    """(question, what the answer field holds) of every row, as text."""
    rows = _parquet(path, cfg) if path.suffix == ".parquet" else _json_lines(path)
    for where, row in rows:
        yield tuple(_field(row, name, where) for name in (cfg.question_field, cfg.answer_field))  # pyright: ignore[reportReturnType]


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8: {error}; convert the file") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}; correct the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: no object with fields; correct the line")
        yield where, row


def _parquet(path: Path, cfg: QuestionRows) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    wanted = [cfg.question_field, cfg.answer_field]
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            rows = file.read(wanted).to_pylist() if {*wanted} <= {*known} else []
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not parquet: {error}; write the file again") from error
    for name in wanted:
        if name not in known:
            raise _no_field(str(path), name, known)
    for n, row in enumerate(rows, 1):
        yield f"{path}, row {n}", row


def _field(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise _no_field(where, name, row)
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(Decimal(repr(value)), "f")
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is a {type(value).__name__}; give text or a number there")
    return value.strip()


def _no_field(where: str, name: str, known: Any) -> UserError:
    return UserError(
        f"{where}: has no field {name!r}; {nearest(name, map(str, known))} (it is named by question_field and "
        "answer_field)"
    )


# ---- rows -> documents ---------------------------------------------------------------------------


def _asked(
    rows: Iterator[tuple[str, str]], pattern: str | None, how: How, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(question, gold answer) of the rows that have both; every question once."""
    seen: set[str] = set()
    for question, field in rows:
        answer = _answer(field, pattern)
        reason = _unfit(question, field, answer, how)
        if reason is None and _folded(question) in seen:
            reason = "asked before"
        if reason is not None:
            dropped[reason] += 1
            continue
        seen.add(_folded(question))
        yield question, answer


def _answer(field: str, pattern: str | None) -> str:
    if pattern is None:
        return field
    found = [match[1] for match in re.finditer(pattern, field)]
    return (found[-1] or "").strip() if found else ""


def _unfit(question: str, field: str, answer: str, how: How) -> str | None:
    """Why a row cannot be asked."""
    if not question:
        return "without a question"
    if not field:
        return "without an answer"
    if not answer:
        return "whose answer matches no answer_pattern"
    if how == "numeric" and number(answer) is None:
        return "whose answer is no number"
    if "\n" in answer:
        return "whose answer has several lines"
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in question + answer):
        return "with half a character"
    return None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _documents(
    pairs: Sequence[tuple[str, str]],
    template: str,
    prompts: PromptConfig,
    shards: ShardFolder,
    dropped: Counter[str],
) -> Iterator[Document]:
    token_bytes = shards.token_bytes()
    texts = [texts_of(template, *pair) for pair in pairs]
    encoded = shards.encode_all([text for both in texts for text in both])
    for n, (context, gold) in enumerate(texts):
        before, after = encoded[2 * n], encoded[2 * n + 1]
        if len(before) > prompts.context_tokens:
            dropped[f"longer than prompts.context_tokens = {prompts.context_tokens}"] += 1
        elif len(after) > prompts.horizon_tokens:
            dropped[f"answered by more than prompts.horizon_tokens = {prompts.horizon_tokens}"] += 1
        elif (document := _document(context + gold, before, after, token_bytes)) is None:
            dropped["that the tokenizer changes"] += 1
        else:
            yield document


def texts_of(template: str, question: str, answer: str) -> tuple[str, str]:
    """The text before the cut, and behind it; spaces in front of the answer are behind it."""
    head, rest = template.split(QUESTION)
    middle, tail = rest.split(ANSWER)
    before = head + question + middle
    context = before.rstrip()
    return context, before[len(context) :] + answer + tail


def _document(text: str, before: Ids, after: Ids, token_bytes: Sequence[bytes]) -> Document | None:
    """None where the ids do not stand for the text, byte for byte."""
    ids = np.concatenate([before, after])
    pieces = [token_bytes[index] for index in ids.tolist()]
    if b"".join(pieces) != text.encode():
        return None
    return Document(
        document_id=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        url=None,
        domain="",
        text=text,
        ids=ids,
        offsets=np.cumsum([0, *map(len, pieces)], dtype=np.uint32),
        cuts=np.array([len(before)], np.uint32),
        cut_kinds=np.array([CUT_KINDS.index("supplied")], np.uint8),
    )
