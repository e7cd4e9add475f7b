"""The model of a disk: what a power cut may leave of what was written, and what it may not."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

from disk import PAGE, Disk, Tree, read_tree, write_tree
from fileops import CREATED, EMPTIED, Event, Kind
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ROOT = "/root"
DRAWS = 300


def drawn_by(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - of cuts, not of secrets


class Script:
    """Changes, as the library would record them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._inodes = iter(range(10, 1000))

    def add(self, kind: Kind, path: str, other: str = "", **fields: Any) -> int:
        known = {"inode": 0, "offset": 0, "data": b"", "flags": 0, "error": 0}
        full = f"{ROOT}/{path}" if path else ROOT
        target = f"{ROOT}/{other}" if other else ""
        self.events.append(Event(kind, full, target, **{**known, **fields}))
        return self.events[-1].inode

    def mkdir(self, path: str) -> int:
        return self.add(Kind.MKDIR, path, inode=next(self._inodes))

    def create(self, path: str, data: bytes = b"") -> int:
        inode = self.add(Kind.OPEN, path, inode=next(self._inodes), flags=CREATED)
        return self.write(inode, data) if data else inode

    def write(self, inode: int, data: bytes, offset: int = 0) -> int:
        return self.add(Kind.WRITE, "?", inode=inode, data=data, offset=offset)

    def fsync(self, inode: int) -> None:
        self.add(Kind.FSYNC, "?", inode=inode)

    def sync_root(self) -> None:
        self.add(Kind.FSYNC, "")

    def disk(self) -> Disk:
        disk = Disk(ROOT)
        disk.replay(self.events)
        return disk

    def outcomes(self) -> list[Tree]:
        """All that is drawn, each once."""
        disk = self.disk()
        drawn = [disk.after_cut(drawn_by(seed)) for seed in range(DRAWS)]
        return [tree for at, tree in enumerate(drawn) if tree not in drawn[:at]]


def test_nothing_synced_nothing_sure() -> None:
    script = Script()
    script.create("a", b"x")
    assert script.disk().tree() == {"a": b"x"}
    outcomes = script.outcomes()
    assert sorted(map(str, outcomes)) == sorted(
        map(str, [{}, {"a": b""}, {"a": b"\0"}, {"a": b"x"}])
    )
    assert script.disk().after_cut() == {}


def test_fsync_of_a_file_keeps_its_data_and_not_its_name() -> None:
    script = Script()
    script.fsync(script.create("a", b"x"))
    assert sorted(map(str, script.outcomes())) == ["{'a': b'x'}", "{}"]


def test_fsync_of_a_directory_keeps_names_and_no_data() -> None:
    script = Script()
    script.create("a", b"x")
    script.sync_root()
    assert {tree["a"] for tree in script.outcomes()} == {b"", b"\0", b"x"}


def test_what_was_synced_is_all_that_can_be_left() -> None:
    script = Script()
    inner = script.mkdir("d")
    script.fsync(script.create("d/a", b"x"))
    script.fsync(inner)
    script.sync_root()
    assert script.outcomes() == [{"d": {"a": b"x"}}]
    assert script.disk().after_cut() == {"d": {"a": b"x"}}


def test_a_directory_without_its_own_name_synced_may_be_lost_with_all_below() -> None:
    script = Script()
    inner = script.mkdir("d")
    script.fsync(script.create("d/a", b"x"))
    script.fsync(inner)
    assert sorted(map(str, script.outcomes())) == ["{'d': {'a': b'x'}}", "{}"]


def test_a_rename_over_a_name_leaves_the_old_or_the_new() -> None:
    script = Script()
    script.fsync(script.create("a", b"old"))
    script.sync_root()
    script.fsync(script.create("a.tmp", b"new"))
    script.add(Kind.RENAME, "a.tmp", "a")
    assert {tree["a"] for tree in script.outcomes()} == {b"old", b"new"}
    assert {"a": b"old", "a.tmp": b"new"} in script.outcomes()


def test_a_rename_before_its_data_may_leave_an_empty_file() -> None:
    script = Script()
    script.create("a.tmp", b"new")
    script.add(Kind.RENAME, "a.tmp", "a")
    script.sync_root()
    assert {"a": b""} in script.outcomes()


def test_a_rename_between_directories_never_loses_both_names() -> None:
    script = Script()
    inodes = [script.mkdir("d"), script.mkdir("e")]
    script.fsync(script.create("d/a", b"x"))
    for inode in inodes:
        script.fsync(inode)
    script.sync_root()
    script.add(Kind.RENAME, "d/a", "e/a")
    found = sorted(map(str, script.outcomes()))
    both, old, new = (
        {"d": {"a": b"x"}, "e": {"a": b"x"}},
        {"d": {"a": b"x"}, "e": {}},
        {"d": {}, "e": {"a": b"x"}},
    )
    assert found == sorted(map(str, [both, old, new]))


def test_what_was_removed_may_come_back_and_be_all_there() -> None:
    script = Script()
    inner = script.mkdir("d")
    script.fsync(script.create("d/a", b"x"))
    script.fsync(inner)
    script.sync_root()
    script.add(Kind.UNLINK, "d/a")
    script.add(Kind.RMDIR, "d")
    assert sorted(map(str, script.outcomes())) == ["{'d': {'a': b'x'}}", "{'d': {}}", "{}"]


def test_names_of_one_directory_survive_in_any_combination() -> None:
    script = Script()
    for name in "abc":
        script.fsync(script.create(name))
    assert len(script.outcomes()) == 8


def test_a_write_is_torn_at_pages_only() -> None:
    script = Script()
    new = b"".join(bytes([65 + page]) * PAGE for page in range(4)) + b"tail"
    script.fsync(script.create("a", b"-" * len(new)))
    script.sync_root()
    script.write(script.events[0].inode, new)
    outcomes = [tree["a"] for tree in script.outcomes()]
    assert len(outcomes) > 10
    for data in outcomes:
        assert isinstance(data, bytes)
        assert len(data) == len(new)
        for start in range(0, len(new), PAGE):
            page = data[start : start + PAGE]
            assert page in {new[start : start + PAGE], b"-" * len(page)}


def test_a_file_that_grew_may_have_any_size_between_and_holes() -> None:
    script = Script()
    inode = script.create("a")
    script.fsync(inode)
    script.sync_root()
    script.write(inode, b"x" * (3 * PAGE + 10))
    outcomes = [tree["a"] for tree in script.outcomes()]
    assert {len(data) for data in outcomes} == {0, PAGE, 2 * PAGE, 3 * PAGE, 3 * PAGE + 10}
    assert b"\0" * PAGE + b"x" * PAGE in outcomes


def test_emptying_a_file_may_be_lost() -> None:
    script = Script()
    inode = script.create("a", b"old")
    script.fsync(inode)
    script.sync_root()
    script.add(Kind.OPEN, "a", inode=inode, flags=EMPTIED)
    script.write(inode, b"n")
    assert {b"old", b"n"} <= {tree["a"] for tree in script.outcomes()}


def test_what_failed_changed_nothing() -> None:
    script = Script()
    script.add(Kind.MKDIR, "d", error=5)
    assert script.disk().tree() == {}


def test_the_number_of_a_file_that_is_gone_may_be_given_again() -> None:
    script = Script()
    first = script.create("a", b"x")
    script.add(Kind.UNLINK, "a")
    script.add(Kind.OPEN, "b", inode=first, flags=CREATED)
    script.write(first, b"y")
    assert script.disk().tree() == {"b": b"y"}


ACTIONS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 3)), max_size=25)


@given(ACTIONS, st.integers(0, 1000))
def test_after_any_changes_and_a_full_sync_everything_is_left(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[int, int, int]], seed: int
) -> None:
    """Real files are changed beside the model: it says what is there, and keeps what is synced."""
    base = tmp_path_factory.mktemp("real")
    disk = Disk(str(base))
    for action in actions:
        for event in _do(base, *action):
            disk.apply(event)
    wanted = read_tree(base)
    assert disk.tree() == wanted
    for path in [base, *base.rglob("*")]:
        disk.apply(_event(Kind.FSYNC, path))
    assert disk.after_cut() == wanted
    assert disk.after_cut(drawn_by(seed)) == wanted


def _event(kind: Kind, path: Path, other: Path | None = None, **fields: Any) -> Event:
    known = {"inode": path.stat().st_ino if path.exists() else 0, "offset": 0, "data": b""}
    known |= {"flags": 0, "error": 0}
    return Event(kind, str(path), str(other or ""), **{**known, **fields})


def _do(  # noqa: PLR0911 - a table of changes
    base: Path, action: int, one: int, two: int
) -> list[Event]:
    """Makes a change if it can be made; returns what the library would record."""
    names = [base / "a", base / "b", base / "d" / "a", base / "d" / "b"]
    path, other = names[one], names[two]
    if action == 0 and not (base / "d").exists():
        (base / "d").mkdir()
        return [_event(Kind.MKDIR, base / "d")]
    if action in {1, 2} and path.parent.exists() and not path.exists():
        path.write_bytes(b"12345")
        created = _event(Kind.OPEN, path, flags=CREATED)
        return [created, _event(Kind.WRITE, path, data=b"12345")]
    if action in {3, 4} and path.exists():
        with path.open("r+b") as file:
            file.seek(one * 3)
            file.write(b"xyz")
        return [_event(Kind.WRITE, path, offset=one * 3, data=b"xyz")]
    if action == 5 and path.exists():
        os.truncate(path, two * 4)
        return [_event(Kind.TRUNCATE, path, offset=two * 4)]
    if action in {6, 7} and path.exists() and other.parent.exists() and path != other:
        path.rename(other)
        return [_event(Kind.RENAME, path, other)]
    if action == 8 and path.exists():
        path.unlink()
        return [_event(Kind.UNLINK, path)]
    return []


def test_a_tree_is_written_as_it_is_read(tmp_path: Path) -> None:
    tree: Tree = {"a": b"x", "d": {"e": {}, "f": b""}}
    write_tree(tree, tmp_path)
    assert read_tree(tmp_path) == tree
