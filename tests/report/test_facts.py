"""Data, settings and evidence of a run, and several runs side by side: what the files say, and no more."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlpt.report import compared, write
from rlpt.report.evidence import data_cards, evidence
from rlpt.report.results import checks, ends
from rlpt.report.run import labels, read
from rlpt.report.settings import beside_defaults, between, flattened, shown
from rlpt_data.strict import UserError

CONFIG = {
    "run_dir": "runs/x",
    "seed": 3,
    "data": {"shards": "shards"},
    "policy": {"fresh": {"layers": 4, "width": 128}},
    "prompts": {"horizon_tokens": 4},
    "stage": [
        {
            "kind": "next_token",
            "name": "warmup",
            "steps": 10,
            "documents_per_step": 4,
            "window_tokens": 64,
            "optimizer": {"lr": 1e-4},
        }
    ],
}
MANIFEST = {
    "hash": "aa11",
    "tokenizer_hash": "bb22",
    "vocab_size": 4096,
    "split_by": "document",
    "counts": {"train": {"documents": 2079, "tokens": 2950207, "bytes": 10388369}},
    "drops": {"duplicate": 2},
    "config": {"source": {"kind": "jsonl", "path": "x.jsonl", "licence": "CC0-1.0"}},
}


@pytest.fixture
def run(tmp_path, make_run):
    folder = make_run(tmp_path / "runs" / "one")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return read(folder)


def shards(folder, run, trained="aa11", manifest=MANIFEST):
    """Shards beside the run, and a checkpoint that knows their hash."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return replace(run, trained_on={"shards": trained, "tokenizer": "bb22"})


def test_a_data_card_says_what_the_manifest_says(tmp_path, run):
    (card,) = data_cards(shards(tmp_path / "shards", run))
    assert (card.name, card.remark) == ("shards", "")
    facts = dict(card.facts)
    assert facts["source"] == "jsonl x.jsonl, licence CC0-1.0"
    assert facts["left out"] == "2 duplicate"
    assert facts["hash of the shards"] == "aa11"
    assert facts["hash of the tokenizer"] == "bb22"
    assert card.splits == [("train", "2,079", "2,950,207", "10,388,369")]


def test_other_shards_than_those_trained_on_are_called_so(tmp_path, run):
    (card,) = data_cards(shards(tmp_path / "shards", run, trained="cc33"))
    assert card.remark == "now holds shards aa11; the run was trained on cc33"


def test_a_licence_that_is_not_stated_is_not_guessed(tmp_path, run):
    source = {"kind": "jsonl", "path": "x.jsonl"}
    found = shards(tmp_path / "shards", run, manifest=MANIFEST | {"config": {"source": source}})
    assert dict(data_cards(found)[0].facts)["source"] == "jsonl x.jsonl, licence not stated"


@pytest.mark.parametrize(
    ("data", "names", "remark"),
    [
        ({"shards": "gone"}, ["gone"], "not reachable from here"),
        ({"shards": "s3://bucket/x"}, ["s3://bucket/x"], "at a URL, which a report does not read"),
        ({"mixture": [{"name": "a", "shards": "p"}, {"name": "b", "shards": "q"}]}, ["p", "q"],
         "not reachable from here"),
    ],
    ids=["gone", "url", "mixture"],
)  # fmt: skip
def test_shards_that_are_not_here_leave_their_path_and_what_the_checkpoint_knows(
    run, data, names, remark
):
    run = replace(run, config=CONFIG | {"data": data}, trained_on={"shards": "aa11"})
    cards = data_cards(run)
    assert [card.name for card in cards] == names
    assert {card.remark for card in cards} == {remark}
    assert cards[0].facts == [("hash of the shards", "aa11")]


def test_a_damaged_manifest_is_said(tmp_path, run):
    run = shards(tmp_path / "shards", run)
    (tmp_path / "shards" / "manifest.json").write_text("{")
    assert "manifest.json: damaged" in data_cards(run)[0].remark


def test_settings_are_what_differs_from_the_defaults(run):
    found = {setting.key: setting.values for setting in beside_defaults(run)}
    assert found["seed"] == ("0", "3")
    assert found["prompts.horizon_tokens"] == ("8", "4")
    assert found["policy.fresh.width"] == ("256", "128")
    assert found["stage.0.steps"] == ("", "10")
    assert found["stage.0.optimizer.lr"] == ("0.0003", "0.0001")
    # A default that is spelled out is no setting, nor is the folder.
    assert "policy.fresh.layers" not in found
    assert "run_dir" not in found


def test_a_configuration_of_another_version_is_not_judged(run):
    assert beside_defaults(replace(run, config=CONFIG | {"clip": 3})) is None


def test_runs_differ_in_the_keys_whose_values_differ(run):
    other = CONFIG | {"run_dir": "y", "seed": 4, "stage": [{**CONFIG["stage"][0], "name": "w"}]}
    found = between([run, replace(run, config=other)])
    assert [(setting.key, setting.values) for setting in found] == [
        ("seed", ("3", "4")),
        ("stage.0.name", ("warmup", "w")),
    ]


def test_lists_of_tables_are_counted_and_plain_lists_are_values():
    assert flattened({"a": [{"b": 1}, {"b": 2}], "c": [1, 2], "d": {}}) == {
        "a.0.b": 1, "a.1.b": 2, "c": [1, 2], "d": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "true"), (1e-4, "0.0001"), ((), "none"), (["a", 1], "a, 1"), ({"kind": "x"}, "kind = x")],
    ids=["none", "true", "float", "nothing", "list", "table"],
)  # fmt: skip
def test_values_read_as_a_person_writes_them(value, text):
    assert shown(value) == text


def test_evidence_has_the_bytes_the_page_was_drawn_from(run):
    found = dict(evidence(run))
    data = (run.path / "metrics.jsonl").read_bytes()
    assert found["blake2b of metrics.jsonl"] == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert found["wall time"] == "2 min 05 s"
    assert found["checks before the first step"] == "not in this run's environment.json"


def test_evidence_tells_what_was_checked_before_the_first_step(run):
    layout = {"largest": 1.1e-6, "bar": 5e-4}
    engine = {"tokens": 1234, "mean": 0.0, "rms": 2e-4, "largest": 9e-4, "dtype": "float32"}
    checks = {"layout": layout, "engine": engine}
    found = dict(evidence(replace(run, environment={"checks": checks, "device": "cpu"})))
    assert found["shared layout against one by one"] == "1.1e-06 nats at most (bar 5e-04)"
    assert found["engine against trainer"] == (
        "9.0e-04 nats at most over 1,234 tokens, rms 2.0e-04 (float32)"
    )


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/rlp/s0"], ["s0"]),
        (["a/rlp/s0", "a/rpt/s0"], ["rlp", "rpt"]),
        (["a/rlp/s0", "a/rlp/s1"], ["s0", "s1"]),
        (["a/rlp/s0", "b/rpt/s1"], ["a/rlp/s0", "b/rpt/s1"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
    ],
    ids=["alone", "methods", "seeds", "all", "nested"],
)
def test_runs_are_called_by_what_tells_them_apart(paths, names):
    assert labels([Path(path) for path in paths]) == names


def test_a_comparison_states_every_runs_own_figures(tmp_path, make_run):
    whole = read(make_run(tmp_path / "whole"), "whole")
    bare = replace(whole, name="bare", summary={}, evaluations=[])
    first, second = compared.table([whole, bare])
    cells = dict(zip(compared.COLUMNS, first["cells"], strict=True))
    minus = "\N{MINUS SIGN}"
    assert first["label"] == "harmful"
    assert cells["gain"] == f"{minus}0.100 [{minus}0.120, {minus}0.080]"
    assert cells["change"] == "+0.400 [+0.380, +0.420]"
    assert cells["thought length"] == "1.5"
    assert second["label"] == "not evaluated"
    assert set(second["cells"]) == {"\N{EN DASH}"}
    rows = compared.controls([whole, bare])
    assert rows[0][1][0] == "+0.100 [+0.080, +0.120]"
    assert rows[0][2] == ["null passed", "wrong target FAILED", "leak not measured"]
    assert rows[1][2] == ["null not measured", "wrong target not measured", "leak not measured"]
    assert compared.controls([bare, bare]) == []


def test_held_out_questions_stand_beside_the_gain(tmp_path, make_run):
    run = read(make_run(tmp_path / "run"), "run")
    shares = {"accuracy": 0.25, "accuracy_ci_low": 0.2, "accuracy_ci_high": 0.3}
    before = {f"rlvr/{name}": share for name, share in shares.items()}
    after = {"rlvr/accuracy": 0.5, "rlvr/accuracy_ci_low": None, "rlvr/accuracy_ci_high": None}
    change = {"mean": 0.25, "ci_low": 0.2, "ci_high": 0.3}
    found = {"before": before, "after": after, "accuracy_change": change}
    asked = replace(run, summary=run.summary | {"rlvr": found})
    assert [row for row in ends(asked) if row not in ends(run)] == [
        (
            "Held-out questions right, after a thought",
            "0.250 [0.200, 0.300]",
            "0.500 (no interval)",
            "+0.250 [+0.200, +0.300]",
        )
    ]
    cells = [
        dict(zip(compared.COLUMNS, row["cells"], strict=True))["questions right"]
        for row in compared.table([asked, run])
    ]
    assert cells == ["0.500 (no interval)", "\N{EN DASH}"]
    assert "questions right" in compared.measured(compared.table([asked, run]))[0]
    columns, (row, _) = compared.measured(compared.table([run, run]))
    assert "questions right" not in columns
    assert dict(zip(columns, row["cells"], strict=True))["thought length"] == "1.5"


def test_a_leak_is_among_the_checks():
    leak = {"passes": False, "prompts": 8, "requests_changed": 3, "thoughts_changed": 2}
    assert checks({"leak": leak | {"unrepeatable": 0}}) == [
        (
            "leak test: other text after the cut",
            False,
            "3 of 8 requests and the thoughts of 2 changed; none may",
        )
    ]


@pytest.mark.usefixtures("undrawn")
def test_several_runs_make_one_page_in_the_folder_that_holds_them(tmp_path, make_run):
    runs = [make_run(tmp_path / name / "seed_0") for name in ("rlp", "rpt")]
    (runs[1] / "evaluations.jsonl").unlink()
    path = write(runs)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    assert "2 runs, side by side" in page
    assert "rpt: evaluations.jsonl: absent" in page
    assert "rlp: evaluations.jsonl: absent" not in page
    assert write(runs, tmp_path / "page.html") == tmp_path / "page.html"


def test_a_place_that_would_overwrite_another_report_is_refused(tmp_path, make_run):
    outer = make_run(tmp_path / "outer")
    inner = make_run(outer / "inner")
    with pytest.raises(UserError, match="is a run itself, with a report of its own; add --out"):
        write([outer, inner])
    with pytest.raises(UserError, match="given twice"):
        write([outer, outer])
    with pytest.raises(UserError, match="there is no folder"):
        write([outer], tmp_path / "nowhere" / "x.html")
