"""wandb gets every step once, under the names of the run folder, however often the run was killed."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlpt import dist, wandb_log
from rlpt.config import RunConfig
from rlpt.runlog import RunLog, check_folder, open_log, resolved
from rlpt_data.strict import UserError, parse


class FakeRun:
    """What a run on wandb was told."""

    def __init__(self, words: dict[str, Any]) -> None:
        self.id = words["id"] or "made-up"
        self.words = words
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeError(Exception):
    pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Every run that was started, in a module in wandb's place."""
    started: list[FakeRun] = []

    def init(settings: dict, **words: Any) -> FakeRun:
        if words["mode"] == "online":
            raise FakeError("no API key\nconfigured")
        started.append(FakeRun(words))
        return started[-1]

    module = SimpleNamespace(
        init=init,
        Error=FakeError,
        Settings=lambda **words: words,
        Table=lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data],
    )
    monkeypatch.setitem(sys.modules, "wandb", module)  # pyright: ignore[reportArgumentType]
    return started


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    table = {
        "run_dir": str(tmp_path / "run"),
        "data": {"shards": "no_shards"},
        "policy": {"fresh": {}},
        "stage": [{"name": "rl", "kind": "rl", "steps": 10, "documents_per_step": 1}],
        "log": {"wandb_project": "thoughts", "wandb_mode": "offline"},
    }
    return parse(RunConfig, table, "test")


ROWS = [
    {
        "document": "d",
        "context": "The",
        "continuation_tokens": [" riv", "er"],
        "rollouts": [
            {"thought": str(g), "prediction": "", "finish": "closer", "gain": None, "reward": g, "advantage": 0.5}
            for g in range(2)
        ],
    }
]  # fmt: skip


def told(log: RunLog, steps: range) -> None:
    """What a run of some steps tells, with an evaluation after every second one."""
    for step in steps:
        log.metrics(step, "rl", {"reward/mean": step / 8})
        log.rollouts(step, ROWS)
        if step % 2 == 0:
            gain = {"mean": 0.25, "ci_low": None}
            log.evaluation(step, "rl", {"gain_heldout": gain, "verdict": "useful"})
            log.answers(step, "rl", {"rlvr/accuracy": 0.5, "rlvr/accuracy_ci_low": None})


def test_a_run_that_goes_on_tells_every_step_once(
    cfg: RunConfig, world: dist.World, fake: list[FakeRun]
) -> None:
    kept: dict[str, int] = {}

    def killed() -> None:
        with open_log(cfg, world) as log:
            log.start({})
            told(log, range(1, 4))
            kept.update(log.sizes())
            told(log, range(4, 8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    # Twice: the second kill comes before the first one's place is reached.
    for until in (6, 10):
        with open_log(cfg, world) as log:
            log.truncate(kept, 3)
            log.start({})
            told(log, range(4, until))
    rows = [row for run in fake for row in run.rows]
    steps = [row["step"] for row in rows if "reward/mean" in row]
    assert steps == list(range(1, 10))
    assert [row["reward/mean"] for row in rows if "reward/mean" in row] == [s / 8 for s in steps]
    assert [row["step"] for row in rows if "rollouts" in row] == steps
    evaluated = [row for row in rows if "evaluation/gain_heldout.mean" in row]
    assert evaluated == [
        {"step": step, "evaluation/gain_heldout.mean": 0.25} for step in (2, 4, 6, 8)
    ]
    assert [row for row in rows if "rlvr/accuracy" in row] == [
        {"step": step, "rlvr/accuracy": 0.5} for step in (2, 4, 6, 8)
    ]
    assert [run.words["id"] for run in fake] == [None, "made-up", "made-up"]
    assert [run.exit_code for run in fake] == [1, 0, 0]
    assert all(run.words["resume"] == "allow" and run.axes == {"*": "step"} for run in fake)


def test_rollouts_are_a_table(cfg: RunConfig, world: dist.World, fake: list[FakeRun]) -> None:
    with open_log(cfg, world) as log:
        log.start({})
        log.rollouts(1, ROWS)
        long = {"reasons": ["a"], "per_domain": {"x": {"n": 1}}}
        log.summary({"verdict": "useful", "gain": {"mean": 1.0}, **long})
    (row,) = fake[0].rows
    assert row["step"] == 1
    assert [line["reward"] for line in row["rollouts"]] == [0, 1]
    assert row["rollouts"][0]["continuation"] == " river"
    assert fake[0].summary == {"verdict": "useful", "gain.mean": 1.0}
    assert json.loads((cfg.run_dir / "summary.json").read_text())["reasons"] == ["a"]


def test_wandb_gets_no_password(cfg: RunConfig, world: dist.World, fake: list[FakeRun]) -> None:
    secret = cfg.model_copy(update={"init_from": "s3://user:word@host/a@b@last"})
    with open_log(secret, world) as log:
        log.start({})
    assert fake[0].words["config"]["init_from"] == "s3://host/a@b@last"
    assert fake[0].words["config"]["stage"][0]["steps"] == 10


def test_another_place_for_the_log_is_no_other_run(cfg: RunConfig, world: dist.World) -> None:
    cfg.run_dir.mkdir()
    (cfg.run_dir / "config.json").write_text(json.dumps(resolved(cfg)))
    (cfg.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    check_folder(cfg.model_copy(update={"log": cfg.log.model_copy(update={"wandb_mode": "disabled"})}))  # fmt: skip


def test_what_wandb_refuses_is_one_line(cfg: RunConfig, world: dist.World, fake: list) -> None:
    online = cfg.model_copy(update={"log": cfg.log.model_copy(update={"wandb_mode": "online"})})
    with (
        pytest.raises(
            UserError, match=r"'online': no API key configured; log in with `wandb login`"
        ),
        open_log(online, world) as log,
    ):
        log.start({})
    (cfg.run_dir / wandb_log.FILE).write_text("[]")
    with pytest.raises(UserError, match=r"wandb.json: damaged"), open_log(cfg, world) as log:
        log.start({})


def test_without_wandb_the_remedy_is_named(
    cfg: RunConfig, world: dist.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'rlpt\[wandb\]'"), open_log(cfg, world) as log:  # fmt: skip
        log.start({})
    off = cfg.model_copy(update={"log": cfg.log.model_copy(update={"wandb_mode": "disabled"})})
    with open_log(off, world) as log:
        log.start({})
        log.metrics(1, "rl", {"reward/mean": 0.0})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_wandb_keeps_no_step_of_a_killed_run_twice(toml: Path, runs) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed: pip install 'rlpt[wandb]'")
    words = ["log.wandb_project=thoughts", "log.wandb_mode=offline", "checkpoint.every=4"]
    words = [word for each in words for word in ("--set", each)]
    run_dir = toml.parent / "run"
    process = runs.started(toml, *words)
    journal = run_dir / "metrics.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 15:
        assert process.poll() is None, process.communicate()[1].decode()
    process.kill()
    process.communicate()
    runs.finished(toml, *words)
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.stem for path in files}) == 1
    first, second = (logged(path) for path in files)
    # Of the first session all but what wandb had in hand when it was killed; of the second what no journal had.
    assert first == list(range(1, len(first) + 1))
    assert second == list(range(second[0], 21))
    assert 15 < second[0] <= 21
    assert len(first) >= 8


def logged(path: Path) -> list[int]:
    """The steps with metrics in a file of the real wandb."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {
            ".".join(item.nested_key) or item.key: item.value_json for item in record.history.item
        }
        if "time/step" in items:
            steps.append(int(json.loads(items["step"])))
    return steps


def records(file: bytes) -> Iterator[bytes]:
    """Records of a log as LevelDB writes one: blocks of 32 KiB, fragments behind 7 bytes of checksum, length and kind
    (1 whole, 2 first, 3 middle, 4 last), after 7 bytes that say what file it is."""
    place, whole = 7, b""
    while place + 7 <= len(file):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(file[place + 4 : place + 6], "little"), file[place + 6]
        whole += file[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""
