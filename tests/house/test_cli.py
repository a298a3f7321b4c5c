"""The command line: quick to answer, one line for a mistake, the promised exit codes."""

import errno
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

# Loaded before `stand_in` puts something else in the place of rlpt.report.
import rlpt.report.run  # noqa: F401
from rlpt import cli, exits
from rlpt.runlog import append_json
from rlpt_data.strict import UserError

HEAVY = {"torch", "numpy", "transformers", "pydantic", "pyarrow", "rich", "matplotlib"}


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Replace a module that a command imports in its body."""
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--sett", "a=1"]])
def test_help_and_typos_are_answered_without_loading_anything_heavy(words: list[str]) -> None:
    program = (
        "import sys; from rlpt import cli\n"
        f"try: cli.main({words!r})\n"
        "except SystemExit: pass\n"
        "print(*(name.split('.')[0] for name in sys.modules), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(run.stderr.split())


def test_a_mistake_in_a_config_is_answered_before_torch_loads() -> None:
    program = (
        "import sys; from rlpt import cli\n"
        "try: cli.main(['train', 'configs/train/no_such.toml'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["2", "False"]
    assert "no_such.toml" in run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x.toml"], "'train'"),
        (["train", "x.toml", "--sett", "a=1"], "--set"),
        (["train"], "CONFIG"),
        (["train", "x.toml", "--resume", "maybe"], "'auto', 'never'"),
        (["prove", "--seeds", "one"], "0,1,2"),
        (["export", "runs/x"], "--out"),
        (["data", "prepare", "no_such_folder/x.toml"], "no_such_folder/x.toml"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy_and_exit_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert said in output.err


def test_user_errors_exit_2_faults_1_interrupts_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_with(error: BaseException) -> int:
        def write(runs: list[Path], out: Path | None) -> Path:
            raise error

        stand_in(monkeypatch, "rlpt.report", write=write)
        return exit_code("report", str(tmp_path))

    assert fail_with(UserError("runs/x: not a run folder; name one")) == 2
    assert capsys.readouterr().err == "runs/x: not a run folder; name one\n"
    assert fail_with(ZeroDivisionError("1/0")) == 1
    fault = capsys.readouterr().err
    assert "Traceback" in fault
    assert fault.rstrip().endswith("`rlpt doctor`.")
    assert fail_with(FloatingPointError("step 3: gradient norm is nan; lower lr")) == 1
    assert capsys.readouterr().err == "step 3: gradient norm is nan; lower lr\n"
    assert fail_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_json_is_the_last_line_of_success_and_of_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 3, "verdict": "harmless"}')
    stand_in(monkeypatch, "rlpt.report", write=lambda runs, out: runs[0] / "report.html")
    assert exit_code("report", str(tmp_path), "--json") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["report"] == str(tmp_path / "report.html")
    assert last["summary"] == {"steps": 3, "verdict": "harmless"}

    assert exit_code("train", "no_such.toml", "--json") == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["exit_code"] == 2
    assert "no_such.toml" in last["error"]


def test_prove_prepares_the_pages_and_hands_over_seeds_and_overrides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def run(seeds: list[int], overrides: list[str]) -> dict[str, Any]:
        calls.append((seeds, overrides))
        return {"passed": False}

    monkeypatch.setattr("rlpt_data.prepare.prepare", lambda cfg: calls.append(cfg.source.documents))
    stand_in(monkeypatch, "rlpt.prove", run=run)
    words = [
        "prove",
        "--seeds",
        "0,1,2",
        "--set",
        "pages.source.documents=50",
        "--set",
        "rl.seed=1",
    ]
    assert exit_code(*words) == 1, "a missed bar fails the command"
    assert calls == [50, ([0, 1, 2], ["rl.seed=1"])]
    assert exit_code(*words, "--report-only") == 0


def test_a_reader_that_stops_reading_is_no_fault() -> None:
    program = (
        "import sys; from rlpt.exits import guarded\n"
        "sys.exit(guarded(lambda: [print('line') for _ in range(100000)] and 0))"
    )
    head = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (head.returncode, head.stdout, head.stderr) == (0, "line\n", "")


def test_a_rank_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def body() -> int:
        raise UserError("shards/x: truncated; prepare it again")

    assert exits.guarded(body) == 2
    assert capsys.readouterr().err == "[rank 1] shards/x: truncated; prepare it again\n"


@pytest.mark.parametrize(
    ("module", "code", "command"),
    [
        ("matplotlib.pyplot", 2, '-e ".[report]"'),
        ("vllm", 2, '-e ".[vllm]"'),
        ("torch.distributed", 2, '-e "."'),
        ("rlpt.no_such_module", 1, "`rlpt doctor`"),
    ],
)
def test_a_missing_package_names_the_command_that_installs_it(
    module: str, code: int, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert exits.guarded(body) == code
    error = capsys.readouterr().err.rstrip()
    assert command in error.splitlines()[-1]
    assert ("\n" in error) is (code == 1)


def test_only_the_main_rank_prints_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.conclude({"steps": 3}, as_json=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    cli.conclude({"steps": 3}, as_json=True)
    assert capsys.readouterr().out == 'steps  3\n{"steps": 3}\n'


def test_data_commands_prepare_inspect_and_verify_and_find_a_truncated_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pages").mkdir()
    for n in range(60):
        text = f"Page {n} has its own words. " * 8 + f"It ends with number {n * 7}.\n"
        (tmp_path / "pages" / f"{n}.txt").write_text(text)
    config, out = tmp_path / "pages.toml", tmp_path / "shards"
    config.write_text(
        f'out = "{out}"\nwithout_decontamination = true\n[source]\nkind = "folder"\npath = "{tmp_path / "pages"}"\n'
        '[tokenizer]\nkind = "byte"\n[split]\ndev = 0.2\ntest = 0.2\n'
    )

    def last_line(*words: str) -> dict[str, Any]:
        assert exit_code("data", *words, "--json") == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    prepared = last_line("prepare", str(config))
    assert sum(count["documents"] for count in prepared["counts"].values()) == 60
    assert last_line("verify", str(out))["hash"] == prepared["hash"]
    last_line("inspect", str(out))

    shard = out / "train" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert exit_code("data", "verify", str(out)) == 2
    assert "train/00000.arrow" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["verify"], ["export-pairs", "--out", "x.parquet"], ["annotate", "--model", "m"]],
    ids=lambda words: words[0],
)
def test_commands_that_need_shards_here_say_so_of_a_url(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("data", *words, "s3://bucket/web") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("s3://bucket/web: this command needs the shards on this machine")


def test_a_mistake_is_one_line_whatever_a_file_put_into_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body() -> None:
        raise UserError("a\n  b\u2028c \x1b[31m \ud800 " + "z" * 5000)

    assert exits.guarded(body) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("a b c \\x1b[31m \\ud800 zzz")
    assert line.endswith("z...")
    assert len(line) < 2100


def test_a_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    path = tmp_path / "metrics.jsonl"
    assert exits.guarded(lambda: append_json(path, {"step": 1})) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: No space left on device; finished work is kept")
    assert said.count("\n") == 1
