"""A small corpus, a small policy and real engines, for the tests that need vLLM itself."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlpt import dist
from rlpt.config import RunConfig, longest_branch
from rlpt.policy import load
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.start import open_engine
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import load as load_config
from rlpt_data.strict import parse

CONFIGS = Path(__file__).parents[2] / "configs/proving"
ENGINE = ("engine.kind=vllm", "engine.vllm.kv_cache_gib=0.05", "engine.vllm.threads=1")
STAGE = {"name": "rl", "kind": "rl", "steps": 1, "documents_per_step": 4, "group_size": 4}
TINY = ("policy.fresh.width=64", "policy.fresh.heads=2", "policy.fresh.mlp_width=128")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Every test of this folder needs the engine; none is to fail because loading it is slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the proving ground's pages, fewer of them."""
    out = tmp_path_factory.mktemp("pages") / "shards"
    prepare(
        load_config(PrepareConfig, CONFIGS / "pages.toml", [f"out={out}", "source.documents=3000"])
    )
    return out


@pytest.fixture(scope="session")
def world() -> Iterator[dist.World]:
    with dist.world() as joined:
        yield joined


def overrides(pages: Path, run_dir: Path, *more: str) -> list[str]:
    words = [
        f"data.shards={pages}",
        f"run_dir={run_dir}",
        "evaluation.prompts=40",
        *ENGINE,
        *TINY,
        *more,
    ]
    return [word for override in words for word in ("--set", override)]


@pytest.fixture(scope="session")
def fresh_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The proving ground's second half, from random weights."""
    lines = (CONFIGS / "rl.toml").read_text().splitlines()
    path = tmp_path_factory.mktemp("config") / "rl.toml"
    path.write_text("\n".join(line for line in lines if not line.startswith("init_from")))
    return path


class Command:
    """`rlpt train` in a process of its own, as users run it."""

    def __init__(self, toml: Path, words: Sequence[str], ranks: int = 1) -> None:
        launch = [sys.executable, "-m"]
        if ranks > 1:
            launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        self.words = [*launch, "rlpt.train", str(toml), *words]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(self, log: Path) -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen(self.words, stdout=file, stderr=file, env=self.environment)

    def run(self) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.words, capture_output=True, text=True, env=self.environment, timeout=600
        )


@pytest.fixture(scope="session")
def train(fresh_toml: Path, pages: Path):
    """`train(run_dir, "key=value", ..., ranks=1)`: a command for a run with the real engine."""

    def made(run_dir: Path, *more: str, ranks: int = 1) -> Command:
        return Command(fresh_toml, overrides(pages, run_dir, *more), ranks)

    return made


class Bench:
    """A policy, its engine folder and prompts, without a run."""

    def __init__(self, pages: Path, world: dist.World, folder: Path, **fresh: object) -> None:
        sizes = {"layers": 2, "width": 64, "heads": 2, "mlp_width": 128, "init_std": 0.1} | fresh
        table = {
            "run_dir": str(folder), "data": {"shards": str(pages)}, "policy": {"fresh": sizes},
            "prompts": {"context_tokens": 32, "min_context_tokens": 2, "horizon_tokens": 1, "cut_kinds": ["supplied"]},
            "thought": {"budget_tokens": 16}, "stage": [STAGE],
            "engine": {"kind": "vllm", "vllm": {"kv_cache_gib": 0.05, "threads": 1}},
        }  # fmt: skip
        self.cfg = parse(RunConfig, table, "test")
        self.world = world
        self.shards = ShardFolder.open(pages)
        self.plan = load.blueprint(self.cfg.policy, self.shards, self.cfg.longest_path)
        self.policy = load.load(self.cfg.policy, self.plan, world, seed=0)
        self.markers = self.plan.vocabulary.markers


@pytest.fixture
def bench(pages: Path, world: dist.World, tmp_path: Path):
    def made(**fresh: object) -> Bench:
        return Bench(pages, world, tmp_path, **fresh)

    return made


@pytest.fixture(scope="module")
def shared(pages: Path, world: dist.World, tmp_path_factory: pytest.TempPathFactory):
    """One policy and one engine with room for long thoughts, for all tests that need no other."""
    made = Bench(pages, world, tmp_path_factory.mktemp("shared"), max_positions=2048)
    engine = opened(made, room=1600)
    yield made, engine
    engine.close()


def opened(bench: Bench, room: int = 0) -> Fleet:
    """The engine of a bench, without weights."""
    cfg = bench.cfg
    longest = max(room, longest_branch(cfg.prompts, cfg.thought))
    engine = open_engine(
        *(cfg.engine, cfg.policy, bench.plan, cfg.thought, longest),
        *(str(bench.shards.manifest.tokenizer_hash), cfg.run_dir / "engine", cfg.seed, bench.world),
    )
    assert isinstance(engine, Fleet)
    return engine


@pytest.fixture(name="opened")
def _opened():
    return opened
