"""An interrupted call has happened whole, or not at all, and the next waits for nothing of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import interrupts
import pytest
from isolated import Isolated
from things import MOST_SECS, X, listing, until

import flax_partial as fp
from flax_partial.saving import snapshot
from flax_partial.sessions import registry, workers
from flax_partial.storage import session_dir

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


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_second_interrupt_while_a_save_is_undone_leaves_nothing_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "detach", interrupt)
    monkeypatch.setattr(registry.Session, "release", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fp.save_async(tmp_path / "c", {"a": X})
    monkeypatch.undo()
    fp.save(tmp_path / "c", {"a": X})


def test_second_interrupt_while_a_queued_save_is_undone_leaves_nothing_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, commit = threading.Event(), session_dir.commit_part

    def commit_at_gate(*part: Any, **how: Any) -> None:
        assert gate.wait(MOST_SECS)
        commit(*part, **how)

    monkeypatch.setattr(session_dir, "commit_part", commit_at_gate)
    for name in "01":  # both workers
        fp.save_async(tmp_path / name, {"a": X})
    with monkeypatch.context() as twice:
        twice.setattr(workers.Task, "wait", interrupt)
        twice.setattr(registry.Session, "release", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fp.save(tmp_path / "c", {"a": X})
    gate.set()
    until(lambda: not workers.saving.unfinished)
    fp.save(tmp_path / "c", {"a": X})


def test_interrupted_finalize_async_does_not_finalize_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.save(tmp_path / "c", {"a": X})
    workers.release_idle()
    until(lambda: not workers.finalizing._threads)  # noqa: SLF001
    monkeypatch.setattr(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fp.finalize_async(tmp_path / "c")
    monkeypatch.undo()
    fp.abort(tmp_path / "c")  # it is done by the worker that would have finalized
    assert not listing(tmp_path)
