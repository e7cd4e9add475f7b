"""Many checkpoints in one process leave nothing behind in it, nor on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
from isolated import Isolated


@pytest.mark.parametrize("checkpoints", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_grows(tmp_path: Path, checkpoints: int, apart: Isolated) -> None:
    """A share of `soak.py`, in a process in which nothing else has been done."""
    samples = apart.value(soak.soak, tmp_path, checkpoints, 0)
    assert len(samples) > 40
    assert not soak.growth(samples)


@pytest.mark.parametrize("name", ["memory_bytes", "objects", "threads", "descriptors", "entries"])
def test_what_grows_is_noticed(name: str) -> None:
    start: dict[str, Any] = dict.fromkeys(soak.Sample.__annotations__, 100)
    samples = [replace(soak.Sample(**start), **{name: 100 + step * 200_000}) for step in range(90)]
    assert [fault.split()[0] for fault in soak.growth(samples)] == [name]
