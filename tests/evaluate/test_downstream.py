"""Downstream tasks: the tables that the harness reads, and what is made of its answers."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from rlpt.downstream import (
    DownstreamConfig,
    LastWordTask,
    QuestionTask,
    figures,
    harness_task,
    last_word,
    passages,
    run,
    samples,
)
from rlpt_data.strict import UserError, parse

MARKERS = ("<think>", "</think>")


def question_task(path: Path, **words: object) -> QuestionTask:
    return parse(
        QuestionTask, {"kind": "questions", "name": "sums", "path": str(path)} | words, "t"
    )


def last_word_task(path: Path, **words: object) -> LastWordTask:
    return parse(
        LastWordTask, {"kind": "last_word", "name": "words", "path": str(path)} | words, "t"
    )


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "sums.jsonl"


WORDS = {
    "He said: the end.": ("He said: the", " end"),
    "a\n b ": ("a", " b"),
    "over there it's)": ("over there", " it's"),
    "the well-known!": ("the", " well-known"),
    "over there (it's)": None,
    "end": None,
    "the - ...": None,
    "": None,
}


@pytest.mark.parametrize("text", WORDS, ids=ascii)
def test_a_passage_is_split_before_its_last_word(text: str) -> None:
    expected = WORDS[text]
    assert last_word(text) == (expected and {"prompt": expected[0], "gold": expected[1]})


def test_passages_are_whole_and_keep_their_spaces() -> None:
    assert list(passages(" a b\n c  d e ", 2)) == ["a b", "c  d"]


def test_last_words_come_evenly_from_text_and_from_rows(tmp_path: Path) -> None:
    text, rows = tmp_path / "t.txt", tmp_path / "t.jsonl"
    text.write_text(" ".join(f"a{n} b{n}" for n in range(10)))
    found = last_word_task(text, passage_words=2, passages=5).rows(MARKERS)
    assert found == [{"prompt": f"a{n}", "gold": f" b{n}"} for n in (0, 2, 4, 6, 8)]
    rows.write_text('{"text": "so it ends"}\n{"text": "no"}\n')
    assert last_word_task(rows).rows(MARKERS) == [{"prompt": "so it", "gold": " ends"}]
    for mistake in ('{"other": 1}', "[", "1"):
        rows.write_text(mistake)
        with pytest.raises(UserError, match=r"t.jsonl: cannot be read"):
            last_word_task(rows).rows(MARKERS)
    text.write_text("one two")
    with pytest.raises(UserError, match="no passage ends in a word"):
        last_word_task(text).rows(MARKERS)


def test_questions_are_asked_with_examples_and_opener(sums: Path, tmp_path: Path) -> None:
    words = {"answer_pattern": "#### (.+)", "template": "Q: {question}\nA: {answer}"}
    plain = question_task(sums, **words)
    assert plain.rows(MARKERS)[1] == {"prompt": "Q: 1 + 1?\nA:", "gold": "2"}
    assert plain.table(MARKERS)["generation_kwargs"]["max_gen_toks"] == 32
    assert plain.table(MARKERS)["generation_kwargs"]["until"] == ["\n\n", "</think>"]
    more = {"shots": 2, "examples": str(sums), "thought_tokens": 100}
    thinking = question_task(sums, **words, **more)
    shown = "Q: 0 + 1?\nA: 1\n\nQ: 1 + 1?\nA: 2\n\n"
    assert thinking.rows(MARKERS)[4]["prompt"] == f"{shown}Q: 4 + 1?\nA:<think>"
    assert thinking.table(MARKERS)["generation_kwargs"]["max_gen_toks"] == 132
    assert thinking.table(MARKERS)["generation_kwargs"]["until"] == []
    with pytest.raises(UserError, match="5 questions, shots = 6"):
        question_task(sums, **words, **(more | {"shots": 6})).rows(MARKERS)
    with pytest.raises(UserError, match="shots and examples go together"):
        question_task(sums, shots=1)


def test_figures_are_ours_over_the_harness_samples(sums: Path, tmp_path: Path) -> None:
    task = question_task(sums, answer_pattern="#### (.+)")
    found = [
        {"doc": {"prompt": "", "gold": str(n)}, "filtered_resps": [f" {n % 3} or so\n9"]}
        for n in range(40)
    ]
    assert [row["right"] for row in samples(task, found)] == [1.0] * 3 + [0.0] * 37
    assert figures(task, found)["accuracy"]["mean"] == pytest.approx(3 / 40)
    words = last_word_task(tmp_path / "t.txt")
    scored = [
        {"doc": {"prompt": "a", "gold": " b"}, "filtered_resps": [(-float(n), n == 1)]}
        for n in (1, 2)
    ]
    table = figures(words, scored)
    assert table["perplexity"] == pytest.approx(math.exp(1.5))
    assert table["accuracy"]["mean"] == 0.5
    assert "fewer than" in table["accuracy"]["reason"]


def test_a_task_of_the_harness_reads_our_table(sums: Path) -> None:
    task = question_task(sums, answer_pattern="#### (.+)")
    table = harness_task(task, sums, MARKERS)
    assert table["dataset_kwargs"] == {"data_files": {"test": str(sums)}}
    assert table["process_results"]({"gold": "5"}, [" 2 + 3 = 5.0"]) == {"acc": 1.0}


def config(model: Path, out: Path, *tasks: dict) -> DownstreamConfig:
    table = {"model": str(model), "out_dir": str(out), "tasks": list(tasks), "limit": 6}
    return parse(DownstreamConfig, table, "test")


def test_mistakes_are_named_before_a_model_is_loaded(sums: Path, tmp_path: Path) -> None:
    task = {"kind": "questions", "name": "sums", "path": str(sums), "answer_pattern": "#### (.+)"}
    with pytest.raises(UserError, match=r"no config.json there; .*`rlpt export`"):
        run(config(tmp_path, tmp_path / "out", task))
    with pytest.raises(UserError, match="tasks must differ in name"):
        config(tmp_path, tmp_path / "out", task, task)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"tokenizer\.json: absent, .* set thought_tokens = 0"):
        run(config(tmp_path, tmp_path / "out", task | {"thought_tokens": 4}))
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<think>", "id": 7}]}')
    with pytest.raises(UserError, match=r"closer = '</think>': .* has no such token"):
        run(config(tmp_path, tmp_path / "out", task | {"thought_tokens": 4}))
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(UserError, match=r"pip install 'rlpt\[downstream\]'"):
            run(config(tmp_path, tmp_path / "out", task))


STORIES = Path(__file__).parents[3] / "shared" / "corpus" / "stories260k" / "hf"


@pytest.mark.slow
def test_the_harness_scores_last_words_as_transformers_does(sums: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'rlpt[downstream]'")
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    import torch
    import transformers

    rows = ["Once upon a time, there was a little girl", "Tom and Lily like to play in the park."]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    words = {"kind": "last_word", "name": "words", "path": str(tmp_path / "t.jsonl")}
    questions = {"kind": "questions", "name": "sums", "path": str(sums), "answer_tokens": 4}
    made = run(
        config(STORIES, tmp_path / "out", words, questions | {"answer_pattern": "#### (.+)"})
    )
    assert made["tasks"]["sums"]["rows"] == 5
    lm = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    nats = 0.0
    for row in map(last_word, rows):
        assert row is not None
        context = tokenizer.encode(row["prompt"])
        ids = tokenizer.encode(row["prompt"] + row["gold"])
        assert ids[: len(context)] == context
        with torch.no_grad():
            logp = torch.log_softmax(lm(torch.tensor([ids])).logits[0].double(), dim=-1)
        nats -= sum(float(logp[t - 1, ids[t]]) for t in range(len(context), len(ids)))
    assert made["tasks"]["words"]["perplexity"] == pytest.approx(math.exp(nats / 2), rel=1e-4)
