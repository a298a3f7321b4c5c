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
shards = "{folder}/shards"
[policy]
fresh = {{ layers = 1, width = 32, heads = 2 }}
[[stage]]
kind = "next_token"
name = "warm"
steps = 1
documents_per_step = 4
window_tokens = 64
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


ENGINE = "engine={kind='vllm',vllm={placement='separate',addresses=['ADDRESS']}}"
ADDRESS = "a password or a key in the address"
JUDGE = "stage.0.reward={kind='judge',model='m',address='ADDRESS'}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        pytest.param(f"data.shards=https://u:{MARKER}@h/shards", ADDRESS, marks=pytest.mark.slow),
        pytest.param(f"data.shards=https://h/shards?key={MARKER}", ADDRESS, marks=pytest.mark.slow),
        (ENGINE.replace("ADDRESS", f"http://user:{MARKER}@host:8700"), "a name or a password"),
        (ENGINE.replace("ADDRESS", f"http://{MARKER}@host:8700"), "a name or a password"),
        (JUDGE.replace("ADDRESS", f"http://user:{MARKER}@host/v1"), "unknown key 'reward'"),
        (f"stage.0.api_token={MARKER}", "--set stage.0.api_token: unknown key"),
        (f"log.wandb_api_key={MARKER}", "--set log.wandb_api_key: unknown key"),
        (f"password={MARKER}", "--set password: unknown key"),
    ],
    ids=("shards", "query", "engine", "user", "judge", "token", "key", "password"),
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(
    override: str, line: str, toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(toml), "--set", override, "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = "".join(capsys.readouterr())
    assert ended.value.code == 2
    assert MARKER not in said
    assert line in said
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
