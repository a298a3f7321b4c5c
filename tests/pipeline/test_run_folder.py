"""A run folder that is not sound is the user's mistake, said in one line."""

from pathlib import Path

import pytest

from rlpt import dist, runlog
from rlpt.config import RunConfig
from rlpt.export import export
from rlpt_data.strict import UserError, load


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_damaged_configuration_of_a_run_is_named(toml: Path, content: bytes) -> None:
    cfg = load(RunConfig, toml)
    cfg.run_dir.mkdir()
    runlog.append_json(cfg.run_dir / "metrics.jsonl", {"step": 1})
    path = cfg.run_dir / "config.json"
    runlog.write_json(path, runlog.resolved(cfg))
    runlog.check_folder(cfg)
    path.write_bytes(content)
    for refused in (
        lambda: runlog.check_folder(cfg),
        lambda: export(cfg.run_dir, None, toml.parent / "out"),
    ):
        with pytest.raises(UserError, match=r"config\.json: damaged: .*; restore it"):
            refused()


def test_dumps_of_later_steps_go_also_beyond_a_million(toml: Path, world: dist.World) -> None:
    cfg = load(RunConfig, toml)
    log = runlog.RunLog(cfg, world)
    (cfg.run_dir / "rollouts").mkdir(parents=True)
    for step in (999_999, 1_000_000, 1_000_001):
        log.rollouts(step, [])
    log.truncate({}, 1_000_000)
    left = sorted(path.name for path in (cfg.run_dir / "rollouts").iterdir())
    assert left == ["step_1000000.jsonl.zst", "step_999999.jsonl.zst"]
