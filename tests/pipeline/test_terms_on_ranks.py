"""Terms whose statistics are of the whole step give two ranks the weights of one."""

from pathlib import Path

import pytest
import torch

SHORT = (
    "stage.0.steps=4",
    "stage.1.steps=4",
    "stage.1.optimizer={lr=3e-3, eps=1e-4}",
    "evaluation.prompts=16",
    "checkpoint.every=3",
)
TERMS = {
    "masks_and_sums": (
        "stage.1.reward={kind='likelihood', baseline='frozen', shapes=[{kind='relu', threshold=-0.2}]}",
        "stage.1.advantage={scale='batch_std', min_std=1e-3}",
        "stage.1.objective={mask='m2', m2_limit=1e-6, gold_weight=0.2, next_token_weight=0.1}",
        "stage.1.kl={reference='ema', weight=0.1, estimator='k3'}",
    ),
    "critic": (
        "stage.1.reward={kind='likelihood', baseline='none'}",
        "stage.1.advantage={baseline='none'}",
        "stage.1.objective={mask='clip', aggregate='token', critic={gae_lambda=0.9}}",
        "stage.1.kl={reference='frozen', weight=0.1, estimator='k1', placement='reward'}",
        "stage.1.reference_every=2",
    ),
    "twins": (
        "stage.1.reward={kind='likelihood'}",
        "stage.1.advantage={baseline='none'}",
        "stage.1.objective={mask='clip', aggregate='token', critic={heads=2, centre=true}}",
        "stage.1.micro_batch_tokens=200",
    ),
}


def words(*changes: str) -> list[str]:
    return [word for change in (*SHORT, *changes) for word in ("--set", change)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_two_ranks_train_the_weights_of_one(
    name: str, runs, toml: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """On saved groups, which other weights than those that are trained have sampled: ratios differ from 1."""
    runs.finished(toml, *words("rollout.save_groups=true", "stage.1.optimizer.lr=6e-3"))
    found = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks_{ranks}"
        own = (f"run_dir={folder}", "rollout.source=saved", f"rollout.saved={toml.parent / 'run'}")
        runs.finished(toml, *words(*TERMS[name], *own), ranks=ranks)
        found.append((runs.steps_of(folder), runs.weights_of(folder, 8)))
    (ours, one), (theirs, two) = found
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - {"stage", "tokens/train", "update/one_forward"}:
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), key
    if name == "masks_and_sums":
        assert any(row.get("mismatch/masked", 0.0) > 0 for row in ours)
    for key, tensor in one.items():
        error = torch.linalg.vector_norm(two[key] - tensor)
        assert error <= 1e-5 * torch.linalg.vector_norm(tensor), key
