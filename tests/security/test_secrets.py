"""A secret is in the environment and in a header of the one request that needs it: in no file, no line, no argument."""

from pathlib import Path

import pytest

from rlpt.cli import main
from rlpt.exits import guarded
from rlpt_data.strict import UserError

MARKER = "s3cret-marker"
RUN = """
run_dir = "{folder}/run"
[data]
path = "{folder}/shards"
[policy]
fresh = {{ layers = 1, width = 32, heads = 2 }}
[[stage]]
kind = "next_token"
name = "warm"
steps = 1
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


@pytest.mark.parametrize(
    "override",
    [
        f"data.path=https://user:{MARKER}@host/shards",
        f"data.path=s3://{MARKER}@bucket/shards",
        f"engine.vllm.addresses=['http://user:{MARKER}@host:8700']",
        f"engine.vllm.addresses=['ftp://user:{MARKER}@host']",
        f"stage.0.reward={{kind='judge', model='m', address='http://user:{MARKER}@host/v1'}}",
        f"stage.0.api_token={MARKER}",
        f"log.wandb_api_key={MARKER}",
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(
    override: str, toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(toml), "--set", override, "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = "".join(capsys.readouterr())
    assert ended.value.code == 2
    assert MARKER not in said
    assert len(said.splitlines()) == 2, "one line, and the same as JSON"
    assert not (toml.parent / "run").exists()


def test_an_error_quotes_no_password_whoever_raises_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"https://me:{MARKER}@host/a: cannot be read; see 'http://{MARKER}@b', mail a@b.org"
    shown = "https://***@host/a: cannot be read; see 'http://***@b', mail a@b.org"
    assert str(UserError(text)) == shown
    assert guarded(Raises(UserError(text))) == 2
    assert guarded(Raises(RuntimeError(text))) == 1
    said = capsys.readouterr().err
    assert said.count(shown) == 2
    assert "Traceback" in said
    assert MARKER not in said


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self) -> None:
        raise self.error
