"""The doctor finds what is missing, says how to mend it, and never raises."""

import io
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from rlpt import doctor
from rlpt.config import RunConfig
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.strict import load


@pytest.mark.parametrize(
    ("requirement", "ok", "found"),
    [
        ("numpy>=2.0", True, ""),
        ("numpy<1.0", False, "outside <1.0"),
        ("no-such-package>=3", False, "not installed; needs >=3"),
    ],
)
def test_a_package_is_ok_inside_its_window_only(requirement: str, ok: bool, found: str) -> None:
    check = doctor.package_check(Requirement(requirement))
    assert check.ok is ok
    assert found in check.found
    assert ok or check.fix == f'pip install -c constraints.txt "{requirement}"'


def test_this_machine_can_run_rlpt_and_every_missing_check_has_a_fix(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path)
    assert found["ok"]
    names = [check["name"] for check in found["checks"]]
    for name in ("python", "torch", "transformers", "triton", "extra vllm", "gpu", "disk"):
        assert name in names
    assert all(check["fix"] for check in found["checks"] if not check["ok"])


def test_torch_that_does_not_load_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes the import raise.
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.examine()
    assert not found["ok"]
    (check,) = [check for check in found["checks"] if check["name"] == "torch loads"]
    assert check["required"]
    assert "ModuleNotFoundError" in check["found"]


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    check = doctor._writable(missing)
    assert not check.ok
    assert check.required
    assert str(missing) in check.found


def test_too_little_memory_and_disk_are_findings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_gib = 2**30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=one_gib))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=one_gib))
    memory, disk = doctor._memory(), doctor._disk(tmp_path)
    assert (memory.ok, disk.ok) == (False, False)
    assert disk.found == "1.0 GiB free"
    assert "4 GiB" in memory.fix


def test_the_table_shows_the_fix_of_what_is_missing_and_only_that() -> None:
    checks = [
        {"name": "a", "ok": True, "required": True, "found": "1.0", "fix": "install a"},
        {"name": "b", "ok": False, "required": True, "found": "gone", "fix": "install [b]"},
        {"name": "c", "ok": False, "required": False, "found": "gone", "fix": "install c"},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(doctor.render({"ok": False, "checks": checks}))
    text = console.export_text()
    assert "install a" not in text
    assert "MISSING" in text
    assert "install [b]" in text
    assert "absent" in text
    assert "cannot run" in text


def test_the_measured_throughput_times_the_seconds_is_the_work_done() -> None:
    # A product of 256 x 256 is 2 * 256^3 operations; no machine does fewer than 0.1 GFLOP/s.
    assert 0.1 < doctor.matmul_gflops(size=256, seconds=0.05) < 1e7


def test_the_plan_counts_parameters_state_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pages").mkdir()
    for n in range(20):
        (tmp_path / "pages" / f"{n}.txt").write_text(f"Page {n}. " * 40)
    shards = tmp_path / "shards"
    prepare(
        load(
            PrepareConfig,
            written(
                tmp_path / "data.toml",
                f"""
        out = "{shards}"
        source = {{ kind = "folder", path = "{tmp_path / "pages"}" }}
        tokenizer = {{ kind = "byte" }}
        split = {{ dev = 0.3, test = 0.3 }}
    """,
            ),
        )
    )
    run = written(
        tmp_path / "run.toml",
        f"""
        run_dir = "{tmp_path / "run"}"
        data = {{ shards = "{shards}" }}
        policy.fresh = {{ layers = 1, width = 32, heads = 2, mlp_width = 64 }}
        stage = [{{ name = "a", kind = "next_token", steps = 3, documents_per_step = 2 }}]
    """,
    )
    monkeypatch.setattr(doctor, "matmul_gflops", lambda: 2.0)
    found = doctor.plan(load(RunConfig, run))
    # 256 bytes + 2 markers embedded, attention, gated MLP, two norms in the block and a last one.
    parameters = 258 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert found["parameters"] == parameters
    assert found["training_state_gib"] == 16 * parameters / 2**30
    cost = found["stages"]["a"]
    assert cost["trained_tokens"] == 2 * 256
    assert cost["step_seconds_at_least"] == cost["step_gflops"] / 2.0


def written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path
