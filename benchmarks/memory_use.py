"""Resident memory of this process, by the kernel's own high-water mark."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_RESET_PEAK = "5"


@dataclass
class Growth:
    """By how many bytes the resident memory rose above its start, at its peak; or not a number."""

    bytes: float = math.nan


@contextlib.contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measures by how much resident memory rises inside the block, at its peak."""
    growth = Growth()
    start = resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:  # some containers do not allow it
        yield growth
        return
    yield growth
    growth.bytes = max(0, _status_bytes("VmHWM") - start)


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
