"""The doctor finds what is missing, says how to mend it, and never raises."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from rlpt import doctor


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
