"""Finalize and abort wait for nothing longer than `timeout_secs` says, and can be called again."""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING

import pytest
import trees
from things import QUICK, X, listing, locked

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What is called, and the error when time is up.
CALLS: dict[str, tuple[Callable[..., object], type[Exception]]] = {
    "finalize": (fp.finalize, fp.IncompleteCheckpointError),
    "finalize_async": (
        lambda path, **how: fp.finalize_async(path, **how).result(),
        fp.IncompleteCheckpointError,
    ),
    "abort": (fp.abort, fp.CheckpointInUseError),
}
SOON = pytest.mark.parametrize("secs", [0, 0.05])


@SOON
@pytest.mark.parametrize("name", CALLS)
def test_lock_of_another_process_is_waited_for_so_long(
    tmp_path: Path, name: str, secs: float
) -> None:
    call, kind = CALLS[name]
    fp.save(tmp_path / "c", {"a": X}, options=QUICK)
    before = listing(tmp_path)
    with locked(tmp_path / "c.partial_save", fcntl.LOCK_SH):
        with pytest.raises(kind, match=rf"After {secs:g} s another process.*c\.partial_save"):
            call(tmp_path / "c", timeout_secs=secs)
        assert listing(tmp_path) == before
    call(tmp_path / "c", timeout_secs=secs)
    assert listing(tmp_path) != before


@SOON
@pytest.mark.parametrize("name", CALLS)
def test_stuck_save_of_this_process_is_waited_for_so_long(
    tmp_path: Path, name: str, secs: float
) -> None:
    call, kind = CALLS[name]
    fp.save(tmp_path / "c", {"a": X}, options=QUICK)
    with locked(tmp_path / "c.partial_save", fcntl.LOCK_EX):
        stuck = fp.save_async(tmp_path / "c", {"b": X}, options=QUICK)
        # Abort waits for a save that has begun; one that has not fails, and it waits for the lock.
        what = "" if name == "abort" else r"saves of this process \(1\)"
        with pytest.raises(kind, match=rf"After {secs:g} s {what}"):
            call(tmp_path / "c", timeout_secs=secs)
    if name == "abort":
        stuck.exception()  # whether it had begun to write is not known
        fp.abort(tmp_path / "c")
        assert listing(tmp_path) == []
    else:
        call(tmp_path / "c")
        trees.assert_same(fp.load(tmp_path / "c"), {"a": X, "b": X})


def test_one_deadline_holds_for_all_that_is_waited_for(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"rows": fp.Slice(X, 0, 6)}, options=QUICK)
    with (
        locked(tmp_path / "c.partial_save", fcntl.LOCK_SH),
        pytest.raises(fp.IncompleteCheckpointError, match=r"After 0\.2 s another process"),
    ):
        fp.finalize(tmp_path / "c", timeout_secs=0.2)  # all of which it waits for rows
    with pytest.raises(fp.IncompleteCheckpointError, match="rows"):
        fp.finalize(tmp_path / "c", timeout_secs=0.05)


def test_waiting_for_another_process_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fp.save(tmp_path / "c", {"a": X}, options=QUICK)
    with (
        locked(tmp_path / "c.partial_save", fcntl.LOCK_SH),
        pytest.raises(fp.IncompleteCheckpointError),
    ):
        fp.finalize(tmp_path / "c", timeout_secs=1.3)
    assert caplog.text.count("Waiting for another process, which saves into") == 1
