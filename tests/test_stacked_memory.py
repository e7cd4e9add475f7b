"""What a saved step takes of the host's memory, measured from outside, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import stacked_memory

if TYPE_CHECKING:
    from pathlib import Path

# Memory that is freed goes back at once: what is measured is what is held.
_HONEST = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


@pytest.mark.parametrize("how", ["rows", "whole"])
def test_memory_is_bounded_by_the_budget_only_when_rows_are_saved(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, stacked_memory.__file__, tmp_path / "run", how],
        check=True,
        env=os.environ | _HONEST,
        capture_output=True,
        text=True,
        timeout=150,
    )
    state, grown = map(int, done.stdout.split())
    if how == "whole":
        assert grown > state
    else:
        # In flight: a row on its device, its copy, and what tensorstore makes of it.
        assert grown < 5 * stacked_memory.BUDGET / 1e6 < state / 3
