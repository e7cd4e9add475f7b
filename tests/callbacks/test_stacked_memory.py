"""What a saved step takes of the host's memory, measured from outside, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import stacked_memory

if TYPE_CHECKING:
    from pathlib import Path

# Memory that is freed goes back at once: what is measured is what is held.
_HONEST = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def test_memory_is_bounded_by_the_budget_where_rows_are_saved(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, stacked_memory.__file__, tmp_path],
        check=True,
        env=os.environ | _HONEST,
        capture_output=True,
        text=True,
        timeout=500,
    )
    state, rows, cells, whole = map(int, done.stdout.split())
    assert whole > state / 2  # copies show in what is measured
    # In flight of each row: what was cut out, its copy, and what tensorstore makes of it.
    assert max(rows, cells) < 5 * stacked_memory.BUDGET / 1e6 < state / 3
