"""An interrupted call has happened whole, or not at all, and the next waits for nothing of it."""

from __future__ import annotations

from pathlib import Path

import interrupts
import pytest
from isolated import Isolated

STEP = 13  # of the points of each call; `interrupts.py` tries all of them


@pytest.mark.parametrize("name", interrupts.CALLS)
def test_call_interrupted_anywhere_leaves_nothing_locked_or_lost(
    tmp_path: Path, name: str, apart: Isolated
) -> None:
    points, faults = apart.value(interrupts.sweep, name, tmp_path, 1, STEP)
    assert points >= 3
    assert not faults


def test_signals_at_random_moments_leave_nothing_locked_or_lost(
    tmp_path: Path, apart: Isolated
) -> None:
    for seed in range(60):
        assert not apart.value(interrupts.signalled, tmp_path, seed)
