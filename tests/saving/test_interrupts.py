"""An interrupted call has happened whole, or not at all, and the next waits for nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import interrupts
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from isolated import Isolated

STEP = 13  # of the points of each call; `interrupts.py` tries all of them


@pytest.mark.parametrize("name", interrupts.CALLS)
def test_call_interrupted_anywhere_leaves_nothing_locked_or_lost(
    tmp_path: Path, name: str, apart: Isolated
) -> None:
    outcome = apart.call(interrupts.sweep, name, tmp_path, 1, STEP)
    assert outcome.error is None, str(outcome.error)
    points, faults = outcome.value
    assert points >= 3
    assert not faults


def test_signals_at_random_moments_leave_nothing_locked_or_lost(
    tmp_path: Path, apart: Isolated
) -> None:
    for seed in range(60):
        outcome = apart.call(interrupts.signalled, tmp_path, seed)
        assert outcome.error is None, str(outcome.error)
        assert not outcome.value
