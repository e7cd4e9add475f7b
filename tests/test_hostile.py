"""Names, trees, paths and objects that mean harm: refused by name, or stored like any other.

Nothing is ever written outside of the session, and loading runs nothing that a checkpoint holds.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trees
from things import X, listing

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

# --- sessions and checkpoints that somebody else has made -----------------------------------------


def test_session_whose_state_is_elsewhere_is_refused(tmp_path: Path) -> None:
    """What finalize derives would be cleared and written there: in another checkpoint, perhaps."""
    fp.save(tmp_path / "other", {"a": X})
    fp.finalize(tmp_path / "other")
    (tmp_path / "c.partial_save").mkdir()
    (tmp_path / "c.partial_save" / "state").symlink_to(tmp_path / "other" / "state")
    before = listing(tmp_path / "other")
    for call in (fp.finalize, lambda path: fp.save(path, {"c": X}), fp.abort):
        with pytest.raises(fp.CheckpointExistsError, match="symbolic link"):
            call(tmp_path / "c")
    assert listing(tmp_path / "other") == before
    assert fp.verify(tmp_path / "other").ok


@pytest.mark.parametrize("what", ["pipe", "directory", "device"])
@pytest.mark.timeout(30)
def test_table_that_is_no_file_is_damage(tmp_path: Path, what: str) -> None:
    """Reading a pipe would wait for ever, and some devices never end."""

    def replace(table: Path) -> None:
        table.unlink()
        match what:
            case "pipe":
                os.mkfifo(table)
            case "directory":
                table.mkdir()
            case "device":
                table.symlink_to("/dev/zero")

    report = fp.save(tmp_path / "c", {"a": X})
    fp.finalize(tmp_path / "c")
    replace(tmp_path / "c" / "state" / report.part / "part.json")
    replace(tmp_path / "c" / "state" / "_METADATA")
    trees.assert_same(fp.load(tmp_path / "c"), {"a": X})  # it needs neither
    assert {f"state/{report.part}", "state/_METADATA"} <= set(fp.verify(tmp_path / "c").bad)
    replace(tmp_path / "c" / "state" / "contents.json")
    with pytest.raises(fp.CorruptCheckpointError, match=r"contents\.json"):
        fp.load(tmp_path / "c")
    report = fp.save(tmp_path / "d", {"a": X})
    replace(tmp_path / "d.partial_save" / "state" / report.part / "part.json")
    assert fp.status(tmp_path / "d").damaged == (report.part,)
    with pytest.raises(fp.CorruptCheckpointError, match=report.part):
        fp.finalize(tmp_path / "d")
