"""Every config in the repository is one the commands accept."""

import re
import tomllib
from pathlib import Path

import pytest

from rlpt.compare import CompareConfig
from rlpt.config import RunConfig
from rlpt.downstream import DownstreamConfig
from rlpt.jobs import EvalJobConfig
from rlpt_data.contamination import IndexConfig
from rlpt_data.prepare import PrepareConfig
from rlpt_data.strict import UserError, load

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


Model = RunConfig | PrepareConfig | EvalJobConfig | IndexConfig | CompareConfig | DownstreamConfig


def model_of(path: Path) -> type[Model]:
    table = tomllib.loads(path.read_text())
    if "stage" in table:
        return RunConfig
    if "tasks" in table:
        return DownstreamConfig
    if "arms" in table:
        return CompareConfig
    if "sets" in table:
        return IndexConfig
    return PrepareConfig if table.keys() & {"source", "sources"} else EvalJobConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_parses_and_a_misspelt_key_in_it_does_not(path: Path) -> None:
    load(model_of(path), path)
    with pytest.raises(UserError, match=r"unknown key 'sed'.*(did you mean|valid:)"):
        load(model_of(path), path, ["sed=1"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_run_writes_stays_under_runs(path: Path) -> None:
    config = load(model_of(path), path)
    for key in ("run_dir", "out", "out_dir"):
        written = getattr(config, key, None)
        assert written is None or written.parts[0] == "runs", f"{key} = {written}"


def test_every_folder_the_readme_names_holds_configs_of_its_command() -> None:
    models = {
        "data": PrepareConfig,
        "train": RunConfig,
        "eval": EvalJobConfig,
        "methods": RunConfig,
        "downstream": DownstreamConfig,
    }
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "configs/README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == ["data", "downstream", "eval", "methods", "proving", "rlvr", "train"]
    for folder in rows:
        found = {model_of(path) for path in CONFIGS if path.parent.name == folder}
        assert found, f"configs/{folder} is empty"
        found.discard(IndexConfig)
        assert found == {models.get(folder)} or folder in ("proving", "rlvr")


def test_the_evaluation_job_is_about_the_quickstart() -> None:
    run = load(RunConfig, ROOT / "configs/train/quickstart.toml")
    job = load(EvalJobConfig, ROOT / "configs/eval/continuation.toml")
    assert job.run == f"{run.run_dir}@last"
    assert job.shards == run.data.shards
    assert job.evaluation.split == "test"
    assert (job.prompts, job.thought) == (None, None)


def test_data_configs_do_not_write_over_one_another() -> None:
    paths = [path for path in CONFIGS if model_of(path) is PrepareConfig]
    outs = [load(PrepareConfig, path).out for path in paths]
    assert len(set(outs)) == len(outs)
