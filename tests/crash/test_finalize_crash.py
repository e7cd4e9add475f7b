"""Killed at any change to the disk, a call has happened or not; called again, it completes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import points
import pytest
import trees
from things import QUICK
from workload import OVER

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

    from nursery import Nursery

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
    """A directory with a session that has everything that finalize treats in its own way."""
    path = tmp_path / "original" / "c"
    fp.save(path, FIRST, options=QUICK, custom_metadata={"a": {"b": 1}})
    replaced = {"large": FINAL["large"], "text": "ö"}
    fp.save(path, replaced, replace=True, options=QUICK)
    for row in (2, 0):
        rows = FINAL["rows"][row : row + 2]
        fp.save(path, {"rows": fp.Slice(rows, row, 4)}, options=QUICK, custom_metadata={"c": row})
    fp.save(path, {"int4": FINAL["int4"]}, options=QUICK)
    torn = tmp_path / "original" / "c.partial_save" / "state" / "part.0.p0.torn"
    torn.mkdir()
    (torn / "data").write_bytes(b"half")
    return path.parent


def finalize_again(path: Path) -> bool:
    """Completes what was killed; returns whether it was complete already."""
    if path.exists():
        with pytest.raises(fp.CheckpointExistsError):
            fp.finalize(path)
        return True
    fp.finalize(path)
    return False


def assert_only(path: Path, state: Any) -> None:
    """A whole checkpoint, and no session, nor anything else of it."""
    trees.assert_whole(path, state)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_finalize_killed_anywhere_and_called_again_completes(
    nursery: Nursery, session: Path
) -> None:
    complete = []
    for base, _ in points.deaths(nursery, session, "finalize"):
        complete.append(finalize_again(base / "c"))
        assert_only(base / "c", FINAL)
        assert fp.metadata(base / "c").custom_metadata == {"a": {"b": 1}, "c": 0}
    assert complete == sorted(complete)  # one moment commits, and nothing undoes it
    assert complete.count(False) >= 12
    assert complete.count(True) > 1


def test_finalize_killed_again_and_again_completes(nursery: Nursery, session: Path) -> None:
    kills = itertools.count()
    while points.dies(nursery, session, "finalize", next(kills)) and not (session / "c").exists():
        pass
    assert_only(session / "c", FINAL)


def test_save_killed_anywhere_has_happened_whole_or_not_at_all(
    nursery: Nursery, session: Path
) -> None:
    happened = []
    for base, _ in points.deaths(nursery, session, "save"):
        found = fp.status(base / "c")
        happened.append("added.x" in found.leaves)
        assert found.custom_metadata.get("second", False) == happened[-1]
        fp.finalize(base / "c")
        assert_only(base / "c", {**FINAL, **OVER} if happened[-1] else FINAL)
    assert happened == sorted(happened)
    assert happened.count(False) >= 4
    assert happened.count(True) > 1


def test_first_save_killed_anywhere_leaves_a_place_to_save_into(
    nursery: Nursery, tmp_path: Path
) -> None:
    kills = 0
    for base, was_killed in points.deaths(nursery, tmp_path, "save"):
        kills += was_killed
        fp.save(base / "c", OVER, replace=True)
        fp.finalize(base / "c")
        assert_only(base / "c", OVER)
    assert kills > 5


def test_abort_killed_anywhere_leaves_a_whole_session_or_none(
    nursery: Nursery, session: Path
) -> None:
    gone = []
    for base, _ in points.deaths(nursery, session, "abort"):
        try:
            fp.finalize(base / "c")
        except fp.NoSessionError:
            gone.append(True)
            assert not (base / "c").exists()
            fp.save(base / "c", {"new": 1})
            fp.finalize(base / "c")
            trees.assert_same(fp.load(base / "c"), {"new": 1})
        else:
            gone.append(False)
            trees.assert_same(fp.load(base / "c"), FINAL)
    assert gone == sorted(gone)
    assert gone[0] is False
    assert gone[-1] is True
