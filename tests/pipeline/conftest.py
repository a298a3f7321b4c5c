"""Small real shards and policies that the pipeline's tests share."""

import functools
import json
from pathlib import Path

import pytest

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig
from rlpt.policy import load
from rlpt.prompts import Stream, prompt_stream
from rlpt.templates import TEMPLATES
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import parse


def made_shards(out: Path, documents: int = 160) -> Path:
    """Documents of plain English made here, byte-level BPE, all kinds of cuts."""
    source = out.parent / "corpus"
    source.mkdir(parents=True, exist_ok=True)
    subjects, verbs = (
        ("The river", "A teacher", "My neighbour", "The engine"),
        ("carries", "remembers", "repairs", "counts"),
    )
    times = ("night", "noon")
    for n in range(documents):
        lines = [
            f"{subjects[(n + k) % 4]} {verbs[n * k % 4]} {n + k} things by {times[k % 2]}. Number {k * n % 7}."
            for k in range(6 + n % 9)
        ]
        (source / f"{n:03d}.txt").write_text("\n\n".join(lines))
    table = {
        "out": str(out),
        "without_decontamination": True,
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
def chat_shards(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """The shared corpus in a tokenizer that has the special tokens of every template."""
    folder = tmp_path_factory.mktemp("chat")
    table = json.loads((shards_dir / "tokenizer.json").read_text())
    words = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = [special for template in TEMPLATES.values() for special in template.specials]
    table["added_tokens"] = [
        {"id": 320 + n, "content": content, "special": True} | words
        for n, content in enumerate(specials)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    config = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(shards_dir.parent / "corpus")},
        "tokenizer": {"kind": "file", "path": str(folder / "tokenizer.json")},
    }
    prepare(parse(PrepareConfig, config, "test"))
    return ShardFolder.open(folder / "shards")


@pytest.fixture(scope="session")
def world():
    with dist.world() as joined:
        yield joined


TINY = PolicyConfig(fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1))


@pytest.fixture(scope="session")
def plan(shards: ShardFolder) -> load.Blueprint:
    return load.blueprint(TINY, shards, 100)


@pytest.fixture
def policy(plan: load.Blueprint, world: dist.World):
    return load.load(TINY, plan, world, seed=0)


@pytest.fixture
def other_policy(plan: load.Blueprint, world: dist.World):
    return load.load(TINY, plan, world, seed=5)


TEMPLATE = Path(__file__).with_name("tiny_run.toml")


def write_run(folder: Path, shards_dir: Path) -> Path:
    """A configuration file for a run in ``folder / "run"``."""
    text = (
        TEMPLATE.read_text()
        .replace("{run_dir}", str(folder / "run"))
        .replace("{shards}", str(shards_dir))
    )
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


@pytest.fixture
def toml(tmp_path: Path, shards_dir: Path) -> Path:
    return write_run(tmp_path, shards_dir)


@pytest.fixture(scope="session")
def beside(module_at):
    """Modules of this folder, by name."""
    return lambda name: module_at(Path(__file__).with_name(f"{name}.py"))


@pytest.fixture(scope="session")
def paced(beside):
    """The module `paced_supply`: supplies of groups whose engine is a fake."""
    return beside("paced_supply")


@pytest.fixture(scope="session")
def runs(beside):
    """The module `whole_runs`."""
    return beside("whole_runs")


@pytest.fixture(scope="session")
def whole(runs, tmp_path_factory: pytest.TempPathFactory, shards_dir: Path) -> Path:
    """The folder of an uninterrupted run on one rank, its configuration beside it. To be read alone."""
    toml = write_run(tmp_path_factory.mktemp("whole"), shards_dir)
    runs.finished(toml, "--set", "checkpoint.every=2")
    return toml.parent / "run"


@pytest.fixture(scope="module")
def stream(shards: ShardFolder, paced) -> Stream:
    return prompt_stream(shards.split("train"), paced.CFG, paced.SEED, "rl")


@pytest.fixture
def on_ranks(paced, monkeypatch: pytest.MonkeyPatch):
    """Run a body on so many ranks, each a thread; its results in their order."""
    return functools.partial(paced.on_ranks, monkeypatch)
