"""What takes long says how many, how fast and how long still; in a log file it says nothing."""

import io

import pytest
from rich.console import Console

from rlpt_data import progress


def drawn(monkeypatch: pytest.MonkeyPatch, terminal: bool, total: int | None) -> tuple[list, str]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, color_system=None)
    monkeypatch.setattr(progress, "STDERR", console)
    times = iter(range(100))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(times)))
    found = list(progress.shown(["a", "bb", "ccc"], "count", total, unit="letters", size=len))
    return found, screen.getvalue()


def test_a_terminal_sees_how_many_and_how_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    found, screen = drawn(monkeypatch, True, 3)
    assert found == ["a", "bb", "ccc"]
    assert "3/3" in screen
    # 6 letters after 3 ticks of a second.
    assert "2 letters/s" in screen


def test_an_unknown_number_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found, screen = drawn(monkeypatch, True, None)
    assert found == ["a", "bb", "ccc"]
    assert "3/?" in screen


def test_a_log_file_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, False, 3) == (["a", "bb", "ccc"], "")
