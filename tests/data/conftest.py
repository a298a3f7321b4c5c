"""Real corpora and small shards for the tests of this folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlpt_data.prepare import PrepareConfig
from rlpt_data.strict import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real corpora; skips where it is absent."""
    path = Path(os.environ.get("RLPT_CORPUS", ROOT / "../shared/corpus"))
    if not path.is_dir():
        pytest.skip(f"no real corpora in {path}")
    return path


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """A configuration from TOML text, for the folder ``shards`` of this test."""

    def make(toml: str, *overrides: str) -> PrepareConfig:
        path = tmp_path / "prepare.toml"
        head = f'out = "{tmp_path}/shards"\nwithout_decontamination = true\n'
        path.write_text(head + toml)
        return load(PrepareConfig, path, overrides)

    return make
