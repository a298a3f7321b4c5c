"""The plan of a run: the figures of `rlpt.flops` and `rlpt.memory` for every stage, as a table and as JSON."""

import io
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from rlpt import plan
from rlpt.cli import cli
from rlpt.config import RunConfig
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.strict import UserError, load

# 256 bytes + 2 markers embedded, attention, gated MLP, two norms in the block and a last one.
PARAMETERS = 258 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards, a next-token stage and a stage of reinforcement learning."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "pages").mkdir()
    for n in range(20):
        (folder / "pages" / f"{n}.txt").write_text(f"Page {n}. " * 40)
    pages = f"""
        out = "{folder / "shards"}"
        without_decontamination = true
        source = {{ kind = "folder", path = "{folder / "pages"}" }}
        tokenizer = {{ kind = "byte" }}
        split = {{ dev = 0.3, test = 0.3 }}
    """
    prepare(load(PrepareConfig, written(folder / "data.toml", pages)))
    text = f"""
        run_dir = "{folder / "run"}"
        data = {{ shards = "{folder / "shards"}" }}
        policy.fresh = {{ layers = 1, width = 32, heads = 2, mlp_width = 64 }}
        prompts = {{ context_tokens = 50, horizon_tokens = 4, cuts_per_document = 2 }}
        thought = {{ budget_tokens = 6 }}
        [[stage]]
        name = "text"
        kind = "next_token"
        steps = 3
        documents_per_step = 4
        [[stage]]
        name = "think"
        kind = "rl"
        steps = 5
        documents_per_step = 4
        group_size = 3
        advantage = {{ scale = "batch_std" }}
        objective = {{ next_token_weight = 0.5 }}
    """
    return written(folder / "run.toml", text)


def written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture(autouse=True)
def two_gflops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "matmul_gflops", lambda: 2.0)


def planned(config: Path, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    return plan.plan(load(RunConfig, config, overrides), ranks)


def shown(found: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan.render(found))
    return " ".join(console.export_text().split())


def test_the_plan_counts_parameters_state_and_steps(config: Path) -> None:
    found = planned(config)
    assert (found["parameters"], found["layout"]) == (PARAMETERS, "shared")
    assert found["training_state_gib"] == 16 * PARAMETERS / 2**30
    # The engine has weights of its own.
    assert found["weights_bytes"] == (16 + 4) * PARAMETERS
    costs = found["stages"]["text"]["naive"]
    assert costs["trained_tokens"] == 4 * 256
    assert costs["step_seconds_at_least"] == costs["step_gflops"] / 2.0
    assert costs["stage_seconds_at_least"] == 3 * costs["step_seconds_at_least"]
    assert "shared" not in found["stages"]["text"]


def test_a_stage_of_reinforcement_learning_is_planned_in_both_layouts(config: Path) -> None:
    found = planned(config)
    stage = found["stages"]["think"]
    # Trunks of 54 tokens; two cuts, three branches each, of opener, thought, closer and continuation: 12 tokens.
    naive, shared = stage["naive"], stage["shared"]
    assert (naive["trained_tokens"], shared["trained_tokens"]) == (4 * 7 * 62, 4 * (54 + 6 * 12))
    assert (naive["prefilled_tokens"], shared["prefilled_tokens"]) == (4 * 2 * 51, 4 * (50 + 2))
    assert naive["sampled_tokens"] == shared["sampled_tokens"] == 4 * 6 * 7
    assert naive["peak_bytes"] == naive["activation_bytes"] + naive["head_bytes"]
    text = shown(found)
    assert "think: 5 steps of 4 documents, 2 cuts each, 3 thoughts a cut" in text
    assert "tokens trained 1,736 504 3.44" in text
    assert "naive shared (taken) naive / shared" in text
    assert "training forward training forward" in text
    assert "always fit one micro-batch" in text


def test_the_plan_says_which_form_and_layout_a_run_will_take_and_why(config: Path) -> None:
    found = planned(config, "stage.1.micro_batch_tokens=600", "policy.layout=naive")
    stage = found["stages"]["think"]
    assert (stage["layout"], found["layout_note"].split(":")[0]) == (
        "naive",
        "policy.layout = 'naive'",
    )
    # Four trunks with their branches fit in a micro-batch, two copies of a context do not.
    assert (stage["naive"]["one_forward"], stage["shared"]["one_forward"]) == (False, True)
    assert stage["naive"]["scored_tokens"] == 4 * (6 * 62 + 54)
    assert stage["shared"]["scored_tokens"] == 0
    text = shown(found)
    assert "own pass training forward" in text
    assert "micro_batch_tokens = 600" in text


def test_vllm_reads_a_document_once_in_any_layout_and_keeps_its_own_cache(config: Path) -> None:
    found = planned(config, "engine.kind=vllm", "engine.vllm.kv_cache_gib=2.0")["stages"]["think"]
    assert found["naive"]["prefilled_tokens"] == found["shared"]["prefilled_tokens"] == 4 * (50 + 2)
    assert found["naive"]["cache_bytes"] == 2 * 2**30


def test_ranks_share_the_weights_and_the_time_and_must_share_the_documents(config: Path) -> None:
    one, two = planned(config), planned(config, ranks=2)
    assert two["weights_bytes"] == 8 * PARAMETERS + 4 * PARAMETERS
    for name, stage in two["stages"].items():
        alone = one["stages"][name]["naive"]
        assert stage["naive"]["step_gflops"] == alone["step_gflops"]
        assert stage["naive"]["step_seconds_at_least"] == alone["step_seconds_at_least"] / 2
        assert stage["naive"]["activation_bytes"] == alone["activation_bytes"] / 2
    with pytest.raises(UserError, match=r"--ranks 3: .* documents_per_step = 4 of stage text"):
        planned(config, ranks=3)


def test_the_command_line_prints_the_table_and_the_same_figures_as_json(config: Path) -> None:
    words = ["doctor", "--plan", str(config), "--ranks", "2", "--set", "stage.1.steps=7", "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(json.dumps(planned(config, "stage.1.steps=7", ranks=2)))
    assert "tokens trained" in done.stdout
    refused = CliRunner().invoke(cli, ["doctor", "--ranks", "2"])
    assert refused.exit_code == 2
    assert "belong to --plan" in refused.output
