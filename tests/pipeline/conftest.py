"""Small real shards and policies that the pipeline's tests share."""

from pathlib import Path

import pytest

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig, RunConfig
from rlpt.policy import load
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import parse


def made_shards(out: Path, documents: int = 160) -> Path:
    """Documents of plain English made here, byte-level BPE, all kinds of cuts."""
    source = out.parent / "corpus"
    source.mkdir(parents=True, exist_ok=True)
    subjects, verbs = ("The river", "A teacher", "My neighbour", "The engine"), ("carries", "remembers", "repairs", "counts")
    for n in range(documents):
        lines = [
            f"{subjects[(n + k) % 4]} {verbs[(n * k) % 4]} {n + k} things before {'noon' if k % 2 else 'night'}. It is number {k * n % 7}."
            for k in range(6 + n % 9)
        ]
        (source / f"{n:03d}.txt").write_text("\n\n".join(lines))
    table = {
        "out": str(out),
        "source": {"kind": "folder", "path": str(source)},
        "tokenizer": {"kind": "bpe", "vocab_size": 320},
    }
    prepare(parse(PrepareConfig, table, "test"))
    return out


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_shards(tmp_path_factory.mktemp("shards") / "made")


@pytest.fixture(scope="session")
def shards(shards_dir: Path) -> ShardFolder:
    return ShardFolder.open(shards_dir)


@pytest.fixture(scope="session")
def world():
    with dist.world() as joined:
        yield joined


TINY = PolicyConfig(fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1))


@pytest.fixture(scope="session")
def plan(shards: ShardFolder) -> load.Blueprint:
    return load.blueprint(TINY, shards)


@pytest.fixture
def policy(plan: load.Blueprint, world: dist.World):
    return load.load(TINY, plan, world, seed=0)


def run_table(run_dir: Path, shards_dir: Path, **changes: object) -> dict:
    """A complete two-stage run that takes seconds."""
    table: dict = {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards_dir)},
        "policy": {"fresh": {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "init_std": 0.1}},
        "prompts": {"context_tokens": 32, "min_context_tokens": 8, "horizon_tokens": 4},
        "thought": {"budget_tokens": 5},
        "evaluation": {"prompts": 40, "thoughts": 1, "bits_per_byte_documents": 4, "bootstrap": 50},
        "stage": [
            {"name": "warmup", "kind": "next_token", "steps": 6, "documents_per_step": 8, "window_tokens": 32,
             "mix": {"plain": 0.6, "copied": 0.3, "empty": 0.1}},
            {"name": "rl", "kind": "rl", "steps": 6, "documents_per_step": 4, "group_size": 3},
        ],
        "log": {"rollouts_every": 2},
    }  # fmt: skip
    return table | changes


def run_config(run_dir: Path, shards_dir: Path, **changes: object) -> RunConfig:
    return parse(RunConfig, run_table(run_dir, shards_dir, **changes), "test")
