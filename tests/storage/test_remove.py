"""Removing a finalized checkpoint: at once, never under a reader, never by half."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminal import on_terminal
from things import QUICK, X, listing, stored, unchanged

import flax_partial as fp


def write(path: Path) -> Path:
    return stored(path, {"a": X, "b": np.ones((4, 4))}).path


def test_removed_checkpoint_is_gone_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "1")
    write(tmp_path / "2")
    beside = [line for line in listing(tmp_path) if line.startswith("2")]
    fp.remove(tmp_path / "1")
    assert listing(tmp_path) == beside
    assert fp.steps(tmp_path) == [2]
    write(tmp_path / "1")  # the path can be used again
    assert fp.verify(tmp_path / "1").ok


@pytest.mark.parametrize("letter", ["a", "層"])
def test_longest_name_that_can_be_saved_can_be_removed(tmp_path: Path, letter: str) -> None:
    name = letter * ((255 - len(".partial_save")) // len(letter.encode()))
    fp.save(tmp_path / name, {"a": X}, options=QUICK)
    fp.abort(tmp_path / name)
    fp.remove(write(tmp_path / name))
    assert not listing(tmp_path)


def test_what_is_no_checkpoint_is_not_removed(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    (tmp_path / "2").mkdir()
    write(tmp_path / "3")
    (tmp_path / "4").symlink_to("3")
    with unchanged(tmp_path):
        for name in ("1", "2", "5", "1.partial_save", "3.partial_save"):
            with pytest.raises(fp.NoSessionError, match=f"no finalized checkpoint at .*/{name}"):
                fp.remove(tmp_path / name)
        with pytest.raises(NotADirectoryError):
            fp.remove(tmp_path / "4")


@pytest.mark.parametrize("how", [{}, {"target": {"b": np.ones((4, 4))}, "partial": True}])
def test_checkpoint_that_is_being_loaded_stays_until_it_is(how: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "1")
    reads, may_end = threading.Event(), threading.Event()

    def look(_done: int, _total: int) -> None:
        reads.set()
        assert may_end.wait(250)

    with ThreadPoolExecutor(1) as reader:
        loaded = reader.submit(fp.load, path, progress=look, **how)
        assert reads.wait(250)
        with pytest.raises(fp.CheckpointInUseError, match="being read, and was not removed"):
            fp.remove(path)
        assert fp.steps(tmp_path) == [1]
        may_end.set()
    np.testing.assert_array_equal(loaded.result()["b"], np.ones((4, 4)))
    fp.remove(path)
    assert listing(tmp_path) == []


def test_checkpoint_that_another_process_reads_stays_until_that_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "1")
    with on_terminal("export", path, tmp_path / "out", slow_secs=60) as terminal:
        terminal.wait_for("\x1b[?25l")  # it hides the cursor: it is about to write what it reads
        with pytest.raises(BlockingIOError):
            fp.remove(path)
        assert fp.verify(path).ok
    fp.remove(path)  # the reader was killed, and holds nothing up
    assert fp.steps(tmp_path) == []


def test_load_says_how_far_it_is(tmp_path: Path) -> None:
    state = {str(i): np.full((40, 2**20), i, np.uint8) for i in range(4)} | {"s": "text"}
    stored(tmp_path / "1", state)
    told: list[tuple[int, int]] = []
    loaded = fp.load(tmp_path / "1", progress=lambda done, total: told.append((done, total)))
    size = 40 << 20
    assert told == [(done * size, 4 * size) for done in range(5)]
    assert all(np.array_equal(loaded[name], state[name]) for name in state)
