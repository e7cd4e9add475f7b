"""Reading data files on several threads: how it ends where it is interrupted."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from things import MOST_SECS, stored

import flax_partial as fp
from flax_partial.loading import data_reader
from flax_partial.storage.local_place import LocalDataFiles

if TYPE_CHECKING:
    from pathlib import Path


def test_interrupted_load_begins_to_read_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_ending, begun = threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def read(_reading: Any, segment: Any, _file: Any) -> None:
        begun.append(segment)
        if segment.first == 0:
            raise KeyboardInterrupt  # in the caller, who waits for this one first
        assert is_ending.wait(MOST_SECS)

    def end(pool: ThreadPoolExecutor, wait: bool = True, **how: Any) -> None:  # noqa: FBT001, FBT002
        shutdown(pool, wait=False, **how)
        is_ending.set()
        shutdown(pool, wait)

    stored(tmp_path / "c", {"a": np.ones(32 << 17)})
    monkeypatch.setattr(LocalDataFiles, "most_bytes", 1 << 20)  # of a task
    monkeypatch.setattr(LocalDataFiles, "least_bytes", 1 << 20)
    monkeypatch.setattr(LocalDataFiles, "most_readers", 2)
    monkeypatch.setattr(data_reader._Reading, "_read_in_order", read)  # noqa: SLF001
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", end)
    with pytest.raises(KeyboardInterrupt):
        fp.load(tmp_path / "c")
    assert len(begun) <= 1 + 2  # of 32 tasks
