"""The whole pipeline on a small scale: what a run writes, and what any number of ranks agrees on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlpt import checkpoint, dist
from rlpt.config import RunConfig
from rlpt.evaluate.job import run as evaluate
from rlpt.jobs import EvalJobConfig
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import UserError, load, parse


def test_a_run_writes_what_its_users_rely_on(runs, whole: Path) -> None:
    assert [row["step"] for row in runs.steps_of(whole)] == list(range(1, 21))
    assert {row["stage"] for row in runs.steps_of(whole)} == {"warmup", "rl"}
    summary = json.loads((whole / "summary.json").read_text())
    for name in (
        "gain_heldout_before", "gain_heldout_after", "gain_change", "bits_per_byte_before",
        "bits_per_byte_after", "controls",
        "verdict", "steps", "wall_seconds", "rollout_tokens_per_second", "train_tokens_per_second",
        "next_token_accuracy_no_think_before", "next_token_accuracy_thought_after",
    ):  # fmt: skip
        assert summary[name] is not None, name
    assert summary["steps"] == 20
    after, before = (summary[f"gain_heldout_{end}"]["mean"] for end in ("after", "before"))
    assert summary["gain_change"]["mean"] == pytest.approx(after - before, abs=1e-9)
    assert {path.name for path in whole.iterdir()} >= {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
    }
    assert len(runs.thoughts_of(whole)) >= 10 * 4 * 3


def test_the_next_token_loss_falls(runs, whole: Path) -> None:
    losses = [row["loss/next_token"] for row in runs.steps_of(whole) if row["stage"] == "warmup"]
    assert losses[-1] < losses[0]


def test_on_policy_ratios_are_one(runs, whole: Path) -> None:
    for row in runs.steps_of(whole):
        if row["stage"] == "rl":
            assert row["mismatch/ratio"] == pytest.approx(1.0, abs=1e-5)
            assert row["mismatch/abs_log_ratio"] < 1e-5


@pytest.mark.parametrize(
    ("replicas", "tokens"),
    [(1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 16_384), (2, 1)))],
)
def test_two_ranks_give_the_rollouts_of_one_and_its_losses_and_weights(
    runs, whole: Path, toml: Path, replicas: int, tokens: int
) -> None:
    """Rollouts exactly, losses and weights to 1e-5 relative: one rank reads rewards off the forward that is trained,
    and so do two with the same budget; where every document is a micro-batch, they take two passes.
    """
    words = [f"--set=stage.{n}.micro_batch_tokens={tokens}" for n in (0, 1)]
    words.append(f"--set=policy.replicas={replicas}")
    runs.finished(toml, "--set", "checkpoint.every=2", *words, ranks=2)
    two = toml.parent / "run"
    assert runs.thoughts_of(two) == runs.thoughts_of(whole)
    for mine, theirs in zip(runs.steps_of(two), runs.steps_of(whole), strict=True):
        assert mine.keys() == theirs.keys()
        # What was computed depends on the split: with one micro-batch the continuations are in the trained forward.
        if mine["stage"] == "rl":
            assert (mine["update/one_forward"], theirs["update/one_forward"]) == (tokens > 1, 1.0)
        for name in mine.keys() - {"stage", "tokens/train", "update/one_forward"}:
            # Log-ratios and gains are differences of fp32 log-probabilities: their noise is absolute.
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=2e-6), name
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (two, whole))
    for name in ("gain_heldout_after", "gain_change", "bits_per_byte_after"):
        assert mine[name]["mean"] == pytest.approx(theirs[name]["mean"], abs=1e-5), name
    expected = runs.weights_of(whole, 20)
    for name, tensor in runs.weights_of(two, 20).items():
        assert torch.linalg.vector_norm(tensor - expected[name]) <= 1e-5 * torch.linalg.vector_norm(
            expected[name]
        ), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_losses_of_eager_ones(runs, whole: Path, toml: Path) -> None:
    words = ("--set", "policy.compile=true", "--set", "checkpoint.every=2")
    runs.finished(toml, *words, here=False)
    for mine, theirs in zip(runs.steps_of(toml.parent / "run"), runs.steps_of(whole), strict=True):
        assert mine["loss/next_token"] == pytest.approx(theirs["loss/next_token"], rel=1e-5)


@pytest.mark.slow
def test_a_run_with_replicas_is_exported_and_evaluated_on_one_rank(
    runs, toml: Path, shards_dir: Path
) -> None:
    from rlpt.export import export

    runs.finished(
        toml,
        "--set",
        "policy.replicas=2",
        "--set",
        "stage.0.steps=1",
        "--set",
        "stage.1.steps=1",
        ranks=2,
    )
    run_dir = toml.parent / "run"
    export(run_dir, None, toml.parent / "hf")
    table = {
        "run": f"{run_dir}@last",
        "shards": str(shards_dir),
        "out_dir": str(toml.parent / "eval"),
    }
    table["evaluation"] = {
        "split": "train",
        "prompts": 40,
        "thoughts": 1,
        "bits_per_byte_documents": 4,
    }
    found = evaluate(parse(EvalJobConfig, table, "test"))
    own = read_journal(run_dir / "evaluations.jsonl")[-1]["summary"]
    assert found["gain_heldout"]["mean"] == pytest.approx(own["gain_heldout"]["mean"], abs=1e-6)


def test_a_step_that_blows_up_ends_in_one_line_and_keeps_the_last_checkpoint(
    runs, toml: Path
) -> None:
    words = ["--set", "checkpoint.every=1", "--set", "stage.0.optimizer.lr=1e30"]
    errors = runs.finished(toml, *words, "--set", "guards.nonfinite_in_a_row=0", code=1)
    assert (
        "stage warmup, step 2: skipped, nothing was trained on: rank 0: the gradient of" in errors
    )
    assert "stage warmup, step 2: watch/skipped_in_a_row = 1 exceeds" in errors
    assert "lower optimizer.lr" in errors
    assert "Traceback" not in errors
    assert checkpoint.complete_steps(toml.parent / "run") == [1]


def test_weights_of_another_shape_or_tokenizer_are_refused(
    runs, world: dist.World, whole: Path, toml: Path
) -> None:
    words = ["--set", f"init_from={whole}@20", "--set", "policy.fresh.width=64"]
    assert "has shape" in runs.finished(toml, *words, code=2)
    from rlpt.policy.policy import Policy

    with pytest.raises(UserError, match=r"its tokenizer has hash .*, the shards' has other"):
        checkpoint.load_weights(
            checkpoint.find(f"{whole}@20"), Policy(torch.nn.Module()), "other", world
        )


def test_weights_that_are_not_those_that_were_saved_start_no_run(
    runs, whole: Path, toml: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(whole, tmp_path / "other")
    file = checkpoint.path_of(other, 20) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = runs.finished(toml, "--set", f"init_from={other}@20", code=2)
    assert "step_000020: __0_0.distcp has blake2b" in said


def test_a_refused_run_does_not_claim_its_folder(whole: Path, toml: Path) -> None:
    missing, empty = f"init_from={whole}@3", "data.domains=['x']"
    with pytest.raises(UserError, match="no such checkpoint"):
        run(load(RunConfig, toml, [missing]))
    with pytest.raises(UserError, match="no document in them"):
        run(load(RunConfig, toml, [empty]))
    assert not (toml.parent / "run" / "config.json").exists()
    with pytest.raises(UserError, match="no such checkpoint"):
        run(load(RunConfig, toml, [missing]), dry_run=True)


def test_a_dry_run_resolves_everything_and_writes_nothing(toml: Path) -> None:
    plan = run(load(RunConfig, toml), dry_run=True)
    assert plan["steps"] == 20
    # Embedding 322 x 32 (tied), 4 x 32 x 32 attention, 3 x 32 x 64 MLP, three norms of 32.
    assert plan["policy"]["parameters"] == 322 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert not (toml.parent / "run").exists()


def test_weights_travel_between_runs(runs, whole: Path, toml: Path) -> None:
    """init_from gives the weights alone: the first evaluation is the last one of the run it starts from."""
    text = toml.read_text()
    start, stop = text.index("[[stage]]"), text.index("[[stage]]", text.index("[[stage]]") + 1)
    toml.write_text(text[:start] + text[stop:])
    runs.finished(toml, "--set", f"init_from={whole}@20", "--set", "stage.0.steps=1")
    first = read_journal(toml.parent / "run" / "evaluations.jsonl")[0]["summary"]
    last = read_journal(whole / "evaluations.jsonl")[-1]["summary"]
    assert first["gain_heldout"]["mean"] == last["gain_heldout"]["mean"]
    assert first["bits_per_byte"]["mean"] == last["bits_per_byte"]["mean"]


def test_an_exported_checkpoint_is_the_policy(runs, whole: Path, tmp_path: Path) -> None:
    import transformers

    from rlpt.export import export

    out = export(whole, 20, tmp_path / "hf")
    lm = transformers.AutoModelForCausalLM.from_pretrained(out)
    weights = {
        name.removeprefix("policy.lm."): tensor
        for name, tensor in runs.weights_of(whole, 20).items()
    }
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [320, 321]
    with pytest.raises(UserError, match="is not empty"):
        export(whole, 20, out)
