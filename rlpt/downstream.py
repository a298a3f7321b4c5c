"""Tasks of lm-evaluation-harness over an exported folder, from local files: questions, and last words as in LAMBADA.

The files become tables of prompt and gold answer under `out_dir/tasks`; the harness (its only door is here) reads
those, runs the model by transformers or vLLM, and nothing is downloaded. Right or wrong, and the intervals, are rlpt's
own. A thought is generated between opener and closer and cut off before the answer is read; where it never closes, the
harness takes all of it for the answer.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rlpt.console import say
from rlpt.policy.given import model_config
from rlpt.questions import none_left, question_pairs, texts_of
from rlpt.reward.answer import ANSWERS, How
from rlpt.rlvr import QuestionFile, QuestionRows
from rlpt.runlog import write_json
from rlpt.stages import Count, Positive
from rlpt.statistics import ratio_intervals
from rlpt_data.strict import Strict, UserError

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Row = dict[str, str]
"""A line of a task's table: `prompt`, `gold`."""


class QuestionTask(QuestionRows):
    """Answers, generated greedily."""

    kind: Literal["questions"]
    name: Name
    path: QuestionFile
    how: How = "numeric"
    """As in the reward `answer`."""
    shots: Count = 0
    """Answered questions in front of every question, the first of `examples`."""
    examples: QuestionFile | None = None
    answer_tokens: Positive = 32
    thought_tokens: Count = 0
    """With a thought of up to so many tokens between opener and closer; 0: none."""

    @model_validator(mode="after")
    def _shots_come_from_somewhere(self) -> "QuestionTask":
        if bool(self.shots) != (self.examples is not None):
            raise ValueError("shots and examples go together; set both or neither")
        return self

    def rows(self, markers: tuple[str, str]) -> list[Row]:
        pairs, dropped = question_pairs(self.path, self, self.how)
        if not pairs:
            raise none_left(self.path, dropped)
        say(f"{self.name}: {len(pairs)} questions, {sum(dropped.values())} rows dropped")
        before, opened = self._examples(), markers[0] if self.thought_tokens else ""
        texts = (texts_of(self.template, *pair) for pair in pairs)
        return [{"prompt": before + asked + opened, "gold": gold.strip()} for asked, gold in texts]

    def _examples(self) -> str:
        if self.examples is None:
            return ""
        pairs, _ = question_pairs(self.examples, self, self.how)
        if len(pairs) < self.shots:
            raise UserError(
                f"{self.examples}: {len(pairs)} questions, shots = {self.shots}; lower it"
            )
        return "".join(
            "".join(texts_of(self.template, *pair)) + "\n\n" for pair in pairs[: self.shots]
        )

    def table(self, markers: tuple[str, str]) -> dict[str, Any]:
        """What of the harness's task is this kind's."""
        length = self.thought_tokens + self.answer_tokens
        words = {"do_sample": False, "temperature": 0.0, "max_gen_toks": length}
        # A thought may have empty lines, and ends with a closer as an answer does.
        stops = [] if self.thought_tokens else ["\n\n", markers[1]]
        return {"output_type": "generate_until", "generation_kwargs": {"until": stops, **words}}

    def right(self, gold: str, found: Any) -> float:
        return ANSWERS[self.how](str(found), gold)


class LastWordTask(Strict):
    """Is the last word of a passage the likeliest (greedily, token by token)? LAMBADA, Paperno et al. 2016, made of any
    text: its own passages were chosen for words that need the whole passage, these are not."""

    kind: Literal["last_word"]
    name: Name
    path: Path
    """Text, cut into passages of `passage_words`; or .jsonl, whose rows are passages."""
    text_field: str = "text"
    passage_words: Annotated[int, Field(ge=2)] = 60
    passages: Positive = 1000
    """Most passages, evenly spread over the file."""

    def rows(self, markers: tuple[str, str]) -> list[Row]:
        every = [row for text in self._passages() if (row := last_word(text)) is not None]
        if not every:
            raise UserError(
                f"{self.path}: no passage ends in a word; give longer text, or lower passage_words"
            )
        count = min(self.passages, len(every))
        return [every[place * len(every) // count] for place in range(count)]

    def _passages(self) -> Iterator[str]:
        try:
            text = self.path.read_text(encoding="utf-8")
            if self.path.suffix != ".jsonl":
                return passages(text, self.passage_words)
            return iter(
                [json.loads(line)[self.text_field] for line in text.split("\n") if line.strip()]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"task {self.name}: {self.path}: cannot be read: {error}; give UTF-8 text, or .jsonl with a field "
                f"{self.text_field!r}"
            ) from error

    def table(self, markers: tuple[str, str]) -> dict[str, Any]:
        return {"output_type": "loglikelihood"}

    def right(self, gold: str, found: Any) -> float:
        return float(found[1])


Task = Annotated[QuestionTask | LastWordTask, Field(discriminator="kind")]


class DownstreamConfig(Strict):
    """What `rlpt downstream` reads."""

    model: Path
    """A folder written by `rlpt export`, or any causal LM of transformers."""
    out_dir: Path
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: Positive = 8
    limit: Positive | None = None
    """Only the first so many rows of every task; None: all."""
    opener: str = "<think>"
    closer: str = "</think>"

    @model_validator(mode="after")
    def _names(self) -> "DownstreamConfig":
        names = [task.name for task in self.tasks]
        if len({*names}) < len(names):
            raise ValueError(f"tasks must differ in name; got {', '.join(names)}")
        return self


def last_word(text: str) -> Row | None:
    """A passage before its last word, and that word behind a space; None where it has no two words, or a bracket or
    quotation mark in front of the last one.

    Punctuation behind the last word is left out, as in LAMBADA.
    """
    found = re.search(r"^(.*\S)\s+(\w[\w'\u2019-]*)\W*$", text, re.DOTALL)
    return {"prompt": found[1], "gold": f" {found[2]}"} if found else None


def passages(text: str, words: int) -> Iterator[str]:
    """A text in pieces of so many words, spaces as they are; what is left at the end is none."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    for first in range(0, len(spans) - words + 1, words):
        yield text[spans[first][0] : spans[first + words - 1][1]]


def run(cfg: DownstreamConfig) -> dict[str, Any]:
    """All tasks -> downstream.json, a table of every row's fate beside it. Raises UserError."""
    model_config(cfg.model, "model")
    closer = _closer(cfg)
    rows = {task.name: task.rows((cfg.opener, cfg.closer)) for task in cfg.tasks}
    for name, table in rows.items():
        _write_lines(cfg.out_dir / "tasks" / f"{name}.jsonl", table)
    found = _evaluated(cfg, closer)
    for task in cfg.tasks:
        _write_lines(cfg.out_dir / f"{task.name}.jsonl", samples(task, found["samples"][task.name]))
    result = {
        "model": str(cfg.model),
        "backend": cfg.backend,
        "lm_eval": found["lm_eval"],
        "tasks": {task.name: figures(task, found["samples"][task.name]) for task in cfg.tasks},
    }
    write_json(cfg.out_dir / "downstream.json", result)
    return result


def samples(
    task: QuestionTask | LastWordTask, found: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """prompt, gold, what the model said (of a last word: [log-probability, whether it is the likeliest]), right."""
    rows = []
    for sample in found:
        doc, said = sample["doc"], sample["filtered_resps"][0]
        rows.append({**doc, "said": said, "right": task.right(doc["gold"], said)})
    return rows


def figures(
    task: QuestionTask | LastWordTask, found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Accuracy with its interval over rows; of last words the perplexity of a word, too."""
    rows = samples(task, found)
    right_N, ones = np.array([row["right"] for row in rows]), np.ones(len(rows))
    units = np.arange(len(rows))
    interval = ratio_intervals({"accuracy": (right_N, ones)}, units, draws=2000, seed=0)["accuracy"]
    table: dict[str, Any] = {"accuracy": interval.as_dict(), "rows": len(rows)}
    if isinstance(task, LastWordTask):
        table["perplexity"] = float(np.exp(-np.mean([row["said"][0] for row in rows])))
    return table


def harness_task(
    task: QuestionTask | LastWordTask, path: Path, markers: tuple[str, str]
) -> dict[str, Any]:
    """A task in the words of the harness."""

    def scored(doc: Mapping[str, str], results: Sequence[Any]) -> dict[str, float]:
        return {"acc": task.right(doc["gold"], results[0])}

    return task.table(markers) | {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        # Names of columns: as templates they would lose a last line break.
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "process_results": scored,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _closer(cfg: DownstreamConfig) -> int | None:
    """The id of the closer where a task thinks. Raises UserError where the model has no such token."""
    if not any(isinstance(task, QuestionTask) and task.thought_tokens for task in cfg.tasks):
        return None
    path = cfg.model / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: absent, and a thought needs its markers; set thought_tokens = 0")
    table = json.loads(path.read_text())
    ids = {token["content"]: token["id"] for token in table.get("added_tokens") or []}
    for name, text in (("opener", cfg.opener), ("closer", cfg.closer)):
        if text not in ids:
            raise UserError(
                f"{name} = {text!r}: {cfg.model} has no such token; set thought_tokens = 0"
            )
    return ids[cfg.closer]


def ended_tokenizer(cfg: DownstreamConfig) -> Path:
    """The model's tokenizer, or where that names no end of text, which the harness wants, a copy that names the opener:
    no policy of rlpt writes one."""
    path = cfg.model / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    if settings.get("eos_token"):
        return cfg.model
    folder = cfg.out_dir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(cfg.model / "tokenizer.json", folder)
    write_json(folder / "tokenizer_config.json", settings | {"eos_token": cfg.opener})
    return folder


def _evaluated(cfg: DownstreamConfig, closer: int | None) -> dict[str, Any]:
    """What the harness says: its version, and samples by task."""
    harness = _harness(cfg.out_dir / "cache")
    paths = {task.name: cfg.out_dir / "tasks" / f"{task.name}.jsonl" for task in cfg.tasks}
    tokenizer = str(ended_tokenizer(cfg))
    words: dict[str, Any] = {
        "pretrained": str(cfg.model),
        "dtype": cfg.dtype,
        "tokenizer": tokenizer,
    }
    # Named though it is the default: no file of a model is ever run.
    words["trust_remote_code"] = False
    if closer is not None:
        words["think_end_token"] = str(closer) if cfg.backend == "transformers" else cfg.closer
    found = harness.simple_evaluate(
        model={"transformers": "hf", "vllm": "vllm"}[cfg.backend],
        model_args=words,
        tasks=[
            harness_task(task, paths[task.name], (cfg.opener, cfg.closer)) for task in cfg.tasks
        ],
        batch_size=cfg.batch_size,
        device=None if cfg.backend == "vllm" else "cuda" if torch.cuda.is_available() else "cpu",
        limit=cfg.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {"lm_eval": harness.__version__, "samples": found["samples"]}


def _harness(cache: Path) -> Any:
    # Read when the libraries below it are first imported.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
    }
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "rlpt downstream needs lm-evaluation-harness; run `pip install 'rlpt[downstream]'`"
        ) from error
    return lm_eval


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
