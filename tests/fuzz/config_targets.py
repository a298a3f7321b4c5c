"""Configurations, as files of TOML and as words behind --set."""

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzzing import Target
from mutations import any_value, changed, either, flipped

from rlpt.compare import CompareConfig
from rlpt.config import RunConfig
from rlpt.downstream import DownstreamConfig
from rlpt.jobs import EvalJobConfig
from rlpt_data.contamination import IndexConfig
from rlpt_data.prepare import PrepareConfig
from rlpt_data.strict import Strict, load, parse

ROOT = Path(__file__).parents[2]
_JOBS: tuple[tuple[type[Strict], str], ...] = (
    (EvalJobConfig, "eval/ladder.toml"),
    (EvalJobConfig, "eval/budget_sweep.toml"),
    (CompareConfig, "proving/methods.toml"),
    (DownstreamConfig, "downstream/quickstart.toml"),
    (IndexConfig, "data/evaluation_sets.toml"),
    (PrepareConfig, "data/mixture.toml"),
    (PrepareConfig, "data/web.toml"),
)


def targets(scratch: Path) -> Iterator[Target]:
    runs = [_text(name) for name in ("train/quickstart.toml", "train/digitalgov_rl.toml")]
    file = scratch / "config.toml"
    yield Target("config: run", _reader(file, RunConfig), runs, either(flipped, _tables))
    yield Target("config: --set", _override, [*map(str.encode, _OVERRIDES)], _words)
    jobs = [bytes([n]) + _text(name) for n, (_, name) in enumerate(_JOBS)]
    read = [_reader(file, model) for model, _ in _JOBS]
    yield Target("config: jobs", lambda data: read[data[0]](data[1:]), jobs, _job)


def _text(name: str) -> bytes:
    """Without comments and empty lines: what is in them changes nothing."""
    text = (ROOT / "configs" / name).read_text()
    return re.sub(r"(?m)^\s*(#.*)?\n", "", text).encode()


def _reader(file: Path, model: type[Strict]) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        file.write_bytes(data)
        return load(model, file)

    return read


_BASE = tomllib.loads(_text("train/quickstart.toml").decode())
_OVERRIDES = (
    *("seed=1", "run_dir=runs/x", "stage.1.steps=5", "stage.0.optimizer.lr=1e-3"),
    *("thought.budget_tokens=4", 'stage.1.reward={ kind = "likelihood" }', "log.rollouts_every=0"),
    *(
        "stage.1.advantage.scale=none",
        "policy.fresh.layers=1",
        "evaluation.controls=['empty', 'null']",
    ),
)


def _override(data: bytes) -> object:
    # A shell hands over what is no UTF-8 as halves of characters.
    return parse(RunConfig, _BASE, "run.toml", [data.decode("utf-8", "surrogateescape")])


def _words(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return flipped(rng, samples)
    key = rng.choice(list(_dotted(_BASE)))
    return f"{key}={_toml(any_value(rng))}".encode("utf-8", "surrogatepass")


def _dotted(table: Any, prefix: str = "") -> Iterator[str]:
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        yield f"{prefix}{key}"
        if isinstance(value, dict | list):
            yield from _dotted(value, f"{prefix}{key}.")


def _tables(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    table = changed(rng, tomllib.loads(rng.choice(samples).decode()))
    if not isinstance(table, dict):
        table = {"seed": table}
    lines = (f"{json.dumps(str(key))} = {_toml(value)}\n" for key, value in table.items())
    return "".join(lines).encode("utf-8", "surrogatepass")


def _job(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    sample = rng.choice(samples)
    return sample[:1] + either(flipped, _tables)(rng, [sample[1:]])


def _toml(value: Any, depth: int = 0) -> str:
    """A value as TOML; what TOML has not (null, a deeper level) as a word that it refuses."""
    if depth > 150:
        return "0"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(k))} = {_toml(v, depth + 1)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v, depth + 1) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii="\ud800" in value)
    if isinstance(value, float):
        return repr(value)
    return str(value).lower()
