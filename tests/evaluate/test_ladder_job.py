"""Ladders of checkpoints, sweeps of the thinking budget and several seeds: the table against its files, by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from rlpt.compute import cumulative_costs
from rlpt.evaluate.job import run
from rlpt.evaluate.plot import draw, thinking_lines, training_lines
from rlpt.evaluate.rungs import climbed
from rlpt.evaluate.shown import render
from rlpt.export import export
from rlpt.statistics import ratio_intervals
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

STEPS = (1, 2)


@pytest.fixture(scope="module")
def run_dir(jobs, shards_dir, tmp_path_factory) -> Path:
    return jobs.saved_run(tmp_path_factory.mktemp("run") / "run", shards_dir, steps=STEPS)


@pytest.fixture(scope="module")
def swept(jobs, shards_dir, run_dir, tmp_path_factory) -> Path:
    """Two checkpoints at two budgets."""
    out = tmp_path_factory.mktemp("ladder") / "out"
    asked = {"sweep": {"budget_tokens": [0, 3]}, "evaluation": jobs.SMALL, "figure": "none"}
    run(jobs.job_of(run_dir, shards_dir, out, run=f"{run_dir}@all", **asked))
    return out


@pytest.fixture(scope="module")
def table(swept) -> dict:
    return json.loads((swept / "ladder.json").read_text())


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out / "prompts.parquet").to_pylist()


def gain_of(row: dict) -> float:
    return row["logp_own"] - row["logp_no_think"]


def gain(rows: list[dict]) -> float:
    return sum(map(gain_of, rows)) / sum(row["num_tokens"] for row in rows)


def test_every_checkpoint_is_a_rung_at_every_budget(table):
    names = [(row["name"], row["step"], row["budget_tokens"]) for row in table["rungs"]]
    assert names == [
        ("step_1-budget_0", 1, 0),
        ("step_1-budget_3", 1, 3),
        ("step_2-budget_0", 2, 0),
        ("step_2-budget_3", 2, 3),
    ]
    assert table["against"] == "step_1-budget_0"
    assert "change" not in table["rungs"][0]


def test_the_table_has_the_figures_of_the_files(table, swept):
    for row in table["rungs"]:
        rows = rows_of(swept / row["name"])
        assert row["gain_heldout"]["mean"] == pytest.approx(gain(rows), abs=1e-12)
        lengths = [len(each["thought_ids"]) for each in rows]
        closers = sum(each["finish"] == "closer" for each in rows)
        assert row["thinking"]["tokens"] == sum(lengths) + closers
        assert max(lengths) <= row["budget_tokens"]


def test_an_empty_thought_gains_what_the_empty_control_does(table, swept):
    empty, thought = table["rungs"][0], table["rungs"][1]
    assert {row["finish"] for row in rows_of(swept / empty["name"])} == {"budget"}
    assert empty["controls"]["empty"]["own_minus_control"]["mean"] == 0.0
    assert empty["thinking"]["tokens"] == 0
    assert thought["controls"]["empty"]["own_minus_control"]["mean"] != 0.0
    assert thought["gain_heldout"]["mean"] != empty["gain_heldout"]["mean"]


def test_changes_are_paired_prompt_by_prompt(table, swept):
    first, last = (rows_of(swept / row["name"]) for row in (table["rungs"][0], table["rungs"][3]))
    keys = ("epoch", "document", "cut", "sample")
    assert [[row[key] for key in keys] for row in first] == [
        [row[key] for key in keys] for row in last
    ]
    change = table["rungs"][3]["change"]["gain"]
    assert change["mean"] == pytest.approx(gain(last) - gain(first), abs=1e-12)
    moved = [gain_of(new) - gain_of(old) for old, new in zip(first, last, strict=True)]
    tokens, documents = ([row[key] for row in last] for key in ("num_tokens", "document"))
    pairs = {"gain": (np.array(moved), np.array(tokens, dtype=np.float64))}
    by_hand = ratio_intervals(pairs, np.array(documents), draws=40, seed=0)["gain"]
    assert [change["ci_low"], change["ci_high"]] == pytest.approx([by_hand.ci_low, by_hand.ci_high])


def test_training_compute_is_that_of_the_run_at_the_checkpoint(table, run_dir, shards_dir):
    spent = cumulative_costs(run_dir)
    assert [row["training"]["tokens"] for row in table["rungs"]] == [100.0, 100.0, 200.0, 200.0]
    assert [row["training"]["seconds"] for row in table["rungs"]] == [0.5, 0.5, 1.0, 1.0]
    one, two = spent[1].flops, spent[2].flops
    assert one is not None
    assert table["rungs"][2]["training"]["flops"] == two == 2 * one > 0


def test_a_rung_of_a_ladder_is_what_it_is_alone(jobs, shards_dir, run_dir, swept, tmp_path):
    """Rungs of one run share policy and engine: the weights of the one before must be gone from both."""
    asked = {"sweep": {"budget_tokens": [3]}, "evaluation": jobs.SMALL}
    alone = jobs.job_of(run_dir, shards_dir, tmp_path, run=f"{run_dir}@2", **asked)
    run(alone)
    for name in ("eval.json", "prompts.parquet"):
        assert (tmp_path / name).read_bytes() == (swept / "step_2-budget_3" / name).read_bytes()


def test_a_person_reads_every_rung_and_what_is_left_out(table):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(table | {"missing": ["a@7: no such checkpoint"]}))
    shown = console.export_text()
    for row in table["rungs"]:
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(row["name"]))
        assert f"{row['gain_heldout']['mean']:+.3f} [" in line
        assert row["verdict"] in line
    assert "left out: a@7: no such checkpoint" in shown


def test_the_figure_has_a_line_for_every_budget_and_for_every_policy(table):
    training, thinking = training_lines(table), thinking_lines(table)
    assert [line.label for line in training] == ["0 tokens to think", "3 tokens to think"]
    assert training[1].flops == [row["training"]["flops"] for row in table["rungs"][1::2]]
    assert [line.label for line in thinking] == ["step_1", "step_2"]
    assert thinking[0].flops[0] < thinking[0].flops[1]


@pytest.mark.slow
def test_the_figure_is_the_same_bytes_for_the_same_table(table, tmp_path):
    paths = [tmp_path / f"{number}.svg" for number in range(2)]
    for path in paths:
        assert draw(table, path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_seeds_are_other_evaluations_pooled_and_compared(jobs, shards_dir, run_dir, tmp_path):
    both = [{"run": f"{run_dir}@{step}", "name": f"s{step}"} for step in STEPS]
    small = jobs.SMALL | {"thoughts": 1}
    seeds = (0, 5, 6)
    table = run(
        jobs.job_of(
            *(run_dir, shards_dir, tmp_path),
            **{"run": None, "ladder": both, "seeds": seeds, "evaluation": small, "figure": "none"},
        )
    )
    rows = {
        name: [rows_of(tmp_path / name / f"seed_{seed}") for seed in seeds] for name in ("s1", "s2")
    }
    # Other prompts or cuts, and other thoughts.
    assert len({tuple(row["continuation"] for row in each) for each in rows["s1"]}) == 3
    first, second = table["rungs"]
    gains = [gain(each) for each in rows["s1"]]
    everything = [row for each in rows["s1"] for row in each]
    assert first["gain_heldout"]["mean"] == pytest.approx(gain(everything), abs=1e-12)
    over = first["over_seeds"]["gain"]
    # Student's t with two degrees of freedom: 4.302653.
    half = 4.302653 * np.std(gains, ddof=1) / np.sqrt(3)
    assert [over["ci_low"], over["ci_high"]] == pytest.approx(
        [np.mean(gains) - half, np.mean(gains) + half], abs=1e-6
    )
    moved = [gain(two) - gain(one) for one, two in zip(rows["s1"], rows["s2"], strict=True)]
    assert second["change"]["over_seeds"]["gain"]["mean"] == pytest.approx(
        np.mean(moved), abs=1e-12
    )


@pytest.mark.slow
def test_an_exported_folder_and_a_model_of_the_hub_are_their_checkpoint(
    jobs, shards_dir, run_dir, tmp_path, monkeypatch
):
    folder = export(run_dir, 2, tmp_path / "exported")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    rungs = [{"run": f"{run_dir}@2"}, {"policy": {"path": str(folder)}}, {"hub": "some/model"}]
    known = {"prompts": {"context_tokens": 9, "min_context_tokens": 5, "horizon_tokens": 2}}
    known |= {"thought": {"budget_tokens": 2}, "figure": "none"}
    small = jobs.SMALL | {"thoughts": 1}
    config = jobs.job_of(
        *(run_dir, shards_dir, tmp_path / "out"),
        **(known | {"run": None, "ladder": rungs, "evaluation": small}),
    )
    table = run(config)
    assert [row["name"] for row in table["rungs"]] == ["run-step_2", "exported", "some--model"]
    for row in table["rungs"][1:]:
        assert row["change"]["gain"]["mean"] == 0.0
        assert row["training"] == {"unknown": "it is no checkpoint of a run"}


# ---- refusals, before any model is loaded --------------------------------------------------------


@pytest.fixture
def refused(jobs, shards_dir, run_dir, tmp_path, monkeypatch):
    """Says why a job is refused; a model that is loaded for it is a fault."""

    def reason(**changed) -> str:
        config = jobs.job_of(run_dir, shards_dir, tmp_path / "out", **changed)
        with monkeypatch.context() as patch:
            patch.setattr("rlpt.policy.load.load", None)
            with pytest.raises(UserError) as error:
                run(config)
        return str(error.value)

    return reason


def test_all_missing_checkpoints_are_named_at_once(refused, run_dir):
    rungs = [{"run": f"{run_dir}@{step}"} for step in (1, 7, 8)]
    said = refused(run=None, ladder=rungs)
    assert "2 rungs have no checkpoint" in said
    assert "step_000007: no such checkpoint" in said
    assert "step_000008: no such checkpoint; complete ones: 1, 2" in said
    assert "skip_missing" in said


def test_missing_rungs_are_left_out_where_that_is_asked_for(jobs, shards_dir, run_dir, tmp_path):
    rungs = [{"run": f"{run_dir}@{step}"} for step in (1, 7)]
    config = jobs.job_of(run_dir, shards_dir, tmp_path, run=None, ladder=rungs, skip_missing=True)
    ladder = climbed(config, ShardFolder.open(shards_dir))
    assert [rung.step for rung in ladder.rungs] == [1]
    assert len(ladder.missing) == 1
    assert "step_000007" in ladder.missing[0]


def test_nothing_but_missing_rungs_is_refused(refused, run_dir):
    said = refused(run=f"{run_dir}@7", skip_missing=True)
    assert "step_000007: no such checkpoint" in said


def test_shards_of_another_tokenizer_are_refused_with_both_hashes(
    jobs, refused, run_dir, shards_dir, tmp_path
):
    other = jobs.shards(tmp_path / "other", vocab_size=290)
    said = refused(shards=str(other))
    for folder in (shards_dir, other):
        assert str(ShardFolder.open(folder).manifest.tokenizer_hash) in said


def test_runs_that_ask_other_things_need_a_job_that_says_what(jobs, refused, run_dir, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "step_000001").symlink_to(run_dir / "checkpoints" / "step_000001")
    config = json.loads((run_dir / "config.json").read_text())
    config["thought"]["budget_tokens"] = 5
    (other / "config.json").write_text(json.dumps(config))
    rungs = [{"run": f"{run_dir}@1"}, {"run": f"{other}@1"}]
    said = refused(run=None, ladder=rungs)
    assert "differ in their [thought]" in said
    assert "refused" not in said


def test_a_hub_that_cannot_be_reached_is_one_line(refused, monkeypatch):
    def offline(*_, **__):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("Cannot find it on disk.\nMore lines.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    said = refused(run=None, hub="some/model")
    assert said.startswith(
        "hub = 'some/model': not to be had (LocalEntryNotFoundError: Cannot find"
    )
    assert "\n" not in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"run": None}, "give exactly one of run"),
        ({"ladder": [{"run": "a@1"}]}, "give exactly one of run"),
        ({"run": None, "ladder": [{"name": "a"}]}, "give exactly one of run"),
        ({"seeds": [1, 1]}, "name every seed once"),
        ({"sweep": {"budget_tokens": [4, 4]}}, "name every budget once"),
        ({"sweep": {"budget_tokens": []}}, "budget_tokens"),
        ({"run": None, "ladder": [{"name": "a/b", "run": "a@1"}]}, "name"),
    ],
    ids=["nothing", "two", "rung", "seeds", "budgets", "no_budget", "name"],
)
def test_impossible_jobs_are_refused(jobs, run_dir, shards_dir, tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        jobs.job_of(run_dir, shards_dir, tmp_path, **changed)


def test_names_and_references_of_rungs_must_hold(refused, run_dir):
    twice = [{"run": f"{run_dir}@{step}", "name": "a"} for step in STEPS]
    assert "'a' names several" in refused(run=None, ladder=twice)
    assert "against = 'b': no such rung; there are step_1" in refused(
        run=f"{run_dir}@1", against="b"
    )


def test_two_policies_of_one_origin_are_two_policies(jobs, shards_dir, tmp_path):
    """Fresh weights have no path that would tell them apart; nor have two ways of reading one folder."""
    rungs = {"a": jobs.FRESH, "b": jobs.FRESH | {"width": 32}}
    ladder = [{"name": name, "policy": {"fresh": fresh}} for name, fresh in rungs.items()]
    asked = {"policy": None, "ladder": ladder, "evaluation": jobs.SMALL, "figure": "none"}
    run(jobs.job(shards_dir, tmp_path / "both", **asked))
    for name, fresh in rungs.items():
        alone = tmp_path / name
        run(jobs.job(shards_dir, alone, policy={"fresh": fresh}, evaluation=jobs.SMALL))
        for file in ("eval.json", "prompts.parquet"):
            assert (tmp_path / "both" / name / file).read_bytes() == (alone / file).read_bytes()
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "b")


def test_a_warning_of_an_evaluation_stands_under_the_table(table):
    warned = [row | {"warnings": []} for row in table["rungs"]]
    warned[1]["warnings"] = ["warning: the text after the cut leaks"]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(table | {"rungs": warned, "missing": ["[prompts]: of [/a]"]}))
    text = console.export_text()
    assert f"{warned[1]['name']}: warning: the text after the cut leaks" in text
    assert "left out: [prompts]: of [/a]" in text


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_a_policy_that_says_nan_is_refused(jobs, shards_dir, run_dir, tmp_path, layout):
    export(run_dir, 1, tmp_path / "policy")
    (path,) = (tmp_path / "policy").glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    policy = {"path": str(tmp_path / "policy"), "layout": layout}
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"NaN: the .*weights are damaged"):
        run(jobs.job(shards_dir, out, policy=policy, evaluation=jobs.SMALL))
    assert not (out / "eval.json").exists()
