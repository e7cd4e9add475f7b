"""Resident memory of this process, by the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Metrics

_RESET_PEAK = "5"


def measured(work: Callable[[], Metrics]) -> Metrics:
    """Returns what `work` measured, and `memory`, unless it is among that.

    It is by how many bytes the resident memory rose above its start, at its peak; or not a number.
    """
    start: float = resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:  # some containers do not allow it
        start = math.nan
    metrics = work()
    metrics.setdefault("memory", max(_status_bytes("VmHWM") - start, 0))
    return metrics


def resident_bytes() -> int:
    """Returns the resident memory, in bytes, of what is in use."""
    # Freed memory that the allocator keeps would be used again without showing.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(f"{name}:")).split()[1]
    return int(kilobytes) * 1024
