"""Killed at any point, a call has happened or it has not; called again, it completes.

Each test walks through every event of a call (see `engine_worker`), and kills a real process there.
"""

from __future__ import annotations

import itertools
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trees
from engine_worker import run_and_die
from things import QUICK

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LARGE = np.arange(300_000, dtype=np.float32)  # is referred to; what is small is copied
FIRST: dict[str, Any] = {"large": LARGE, "small": np.arange(3), "text": "ä", "none": None}
FINAL = {
    "large": LARGE[::-1],
    "small": np.arange(3),
    "text": "ö",
    "none": None,
    "rows": np.arange(8).reshape(4, 2),
    "int4": trees.random_bits("int4", (301,), 1),
}


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session with everything that finalize treats in its own way; made anew for each kill."""
    path = tmp_path / "original"
    fp.save(path, FIRST, options=QUICK, custom_metadata={"a": {"b": 1}})
    replaced = {"large": FINAL["large"], "text": "ö"}
    fp.save(path, replaced, replace=True, options=QUICK)
    for row in (2, 0):
        rows = FINAL["rows"][row : row + 2]
        fp.save(path, {"rows": fp.Slice(rows, row, 4)}, options=QUICK, custom_metadata={"c": row})
    fp.save(path, {"int4": FINAL["int4"]}, options=QUICK)
    torn = tmp_path / "original.partial_save" / "state" / "part.0.p0.torn"
    torn.mkdir()
    (torn / "data").write_bytes(b"half")
    return path


def copies(session: Path) -> Iterator[tuple[int, Path]]:
    for event in itertools.count():
        path = session.with_name(f"c{event}")
        shutil.copytree(f"{session}.partial_save", f"{path}.partial_save")
        yield event, path
        shutil.rmtree(path, ignore_errors=True)


def finalize_again(path: Path) -> bool:
    """Completes what was killed; returns whether it was complete already."""
    if path.exists():
        with pytest.raises(fp.CheckpointExistsError):
            fp.finalize(path)
        return True
    fp.finalize(path)
    return False


def assert_only(path: Path) -> None:
    """No session, and nothing else of it, is left."""
    left = {entry.name for entry in path.parent.iterdir() if path.name in entry.name}
    assert left == {path.name}


def test_finalize_killed_anywhere_and_called_again_completes(session: Path) -> None:
    complete = []
    for event, path in copies(session):
        was_killed = run_and_die("finalize", str(path), None, event)
        complete.append(finalize_again(path))
        trees.assert_same(fp.load(path), FINAL)
        assert fp.metadata(path).custom_metadata == {"a": {"b": 1}, "c": 0}
        report = fp.verify(path)
        assert report.ok, report.bad
        assert_only(path)
        if not was_killed:
            break
    assert complete == sorted(complete)  # one moment commits, and nothing undoes it
    assert complete.count(False) >= 12
    assert complete.count(True) > 1


def test_finalize_killed_again_and_again_completes(session: Path) -> None:
    for event in itertools.count():
        was_killed = run_and_die("finalize", str(session), None, event)
        if not was_killed or session.exists():
            break
    trees.assert_same(fp.load(session), FINAL)
    assert fp.verify(session).ok
    assert_only(session)


def test_save_killed_anywhere_has_happened_whole_or_not_at_all(session: Path) -> None:
    second = {"large": LARGE + 1, "text": "new", "rows": np.zeros((2, 2)), "added": {"x": 1}}
    happened = []
    for event, path in copies(session):
        was_killed = run_and_die("save", str(path), second, event)
        found = fp.status(path)
        happened.append("added.x" in found.leaves)
        assert found.custom_metadata.get("second", False) == happened[-1]
        fp.finalize(path)
        trees.assert_same(fp.load(path), {**FINAL, **second} if happened[-1] else FINAL)
        assert fp.verify(path).ok
        assert_only(path)
        if not was_killed:
            break
    assert happened == sorted(happened)
    assert happened.count(False) >= 4
    assert happened.count(True) > 1


def test_first_save_killed_anywhere_leaves_a_place_to_save_into(tmp_path: Path) -> None:
    state = {"a": np.arange(5)}
    for event in itertools.count():
        path = tmp_path / f"c{event}"
        was_killed = run_and_die("save", str(path), state, event)
        fp.save(path, state, replace=True)
        fp.finalize(path)
        trees.assert_same(fp.load(path), state)
        assert_only(path)
        if not was_killed:
            break
    assert event > 5


def test_abort_killed_anywhere_leaves_a_whole_session_or_none(session: Path) -> None:
    gone = []
    for event, path in copies(session):
        was_killed = run_and_die("abort", str(path), None, event)
        try:
            fp.finalize(path)
        except fp.NoSessionError:
            gone.append(True)
            assert not path.exists()
            fp.save(path, {"new": 1})
            fp.finalize(path)
            trees.assert_same(fp.load(path), {"new": 1})
        else:
            gone.append(False)
            trees.assert_same(fp.load(path), FINAL)
        if not was_killed:
            break
    assert gone == sorted(gone)
    assert gone[0] is False
    assert gone[-1] is True
