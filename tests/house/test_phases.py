"""A process knows what it is doing, also after an error."""

import pytest

from rlpt.phases import CLOCK, phase


def test_phases_nest_and_an_error_leaves_them() -> None:
    outside, entered = CLOCK.phase, CLOCK.entered
    seen = []

    def fails() -> None:
        seen.append(CLOCK.phase)
        with phase("score"):
            seen.append(CLOCK.phase)
        seen.append(CLOCK.phase)
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        phase("update")(fails)()
    assert seen == ["update", "score", "update"]
    assert CLOCK.phase == outside
    assert CLOCK.entered == entered + 4


def test_a_decorated_call_is_a_phase_each_time() -> None:
    seen = phase("save")(lambda: CLOCK.phase)
    assert [seen(), seen()] == ["save", "save"]
