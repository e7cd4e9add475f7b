"""The model of a disk: what a power cut may leave of what was written, and what it may not."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from disk import PAGE, Disk, Tree, read_tree, write_tree
from fileops import CREATED, EMPTIED, Event, Kind
from hypothesis import given
from hypothesis import strategies as st

ROOT = "/root"
DRAWS = 300


def drawn_by(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - of cuts, not of secrets


def event(kind: Kind, path: str, other: str = "", **fields: Any) -> Event:
    """A change, as the library would record it."""
    known = {"inode": 0, "offset": 0, "data": b"", "flags": 0, "error": 0}
    return Event(kind, path, other, **{**known, **fields})


class Script:
    """Changes, each told in words: what is done, to what, and with what."""

    def __init__(self, changes: str = "") -> None:
        self.disk = Disk(ROOT)
        self._inodes = {ROOT: 1}
        for change in filter(None, changes.split("; ")):
            self.do(*change.split())

    def do(self, what: str, name: str, text: str = "") -> None:
        path = ROOT if name == "." else f"{ROOT}/{name}"
        inode = self._inodes.setdefault(path, len(self._inodes) + 1)
        match what:
            case "create":
                self.add(Kind.OPEN, path, inode=inode, flags=CREATED)
            case "empty":
                self.add(Kind.OPEN, path, inode=inode, flags=EMPTIED)
            case "rename":
                self.add(Kind.RENAME, path, f"{ROOT}/{text}")
            case _:
                data = {"data": text.encode()} if text else {}
                self.add(Kind[what.upper()], path, inode=inode, **data)
        if text and what == "create":
            self.do("write", name, text)

    def add(self, kind: Kind, path: str, other: str = "", **fields: Any) -> None:
        self.disk.apply(event(kind, path, other, **fields))

    def outcomes(self) -> list[Tree]:
        """All that is drawn, each once; the worst first."""
        drawn = [self.disk.after_cut()]
        drawn += [self.disk.after_cut(drawn_by(seed)) for seed in range(DRAWS)]
        return [tree for at, tree in enumerate(drawn) if tree not in drawn[:at]]


SYNCED = "mkdir d; create d/a x; fsync d/a; fsync d"
WHOLE: Tree = {"d": {"a": b"x"}}
# Name -> what is done; all that a cut may leave, first what it leaves where nothing else is kept.
CUTS: dict[str, tuple[str, list[Tree]]] = {
    "nothing synced, nothing sure": ("create a x", [{}, {"a": b""}, {"a": b"\0"}, {"a": b"x"}]),
    "fsync of a file keeps its data and not its name": ("create a x; fsync a", [{}, {"a": b"x"}]),
    "fsync of a directory keeps names and no data": (
        "create a x; fsync .",
        [{"a": b""}, {"a": b"\0"}, {"a": b"x"}],
    ),
    "what was synced is all that can be left": (f"{SYNCED}; fsync .", [WHOLE]),
    "a directory without its own name synced may be lost with all below": (SYNCED, [{}, WHOLE]),
    "a rename over a name leaves the old or the new": (
        "create a old; fsync a; fsync .; create b new; fsync b; rename b a",
        [{"a": b"old"}, {"a": b"old", "b": b"new"}, {"a": b"new"}],
    ),
    "a rename before its data may leave an empty file": (
        "create b new; rename b a; fsync .",
        [{"a": b""}, {"a": b"\0\0\0"}, {"a": b"new"}],
    ),
    "a rename between directories never loses both names": (
        f"{SYNCED}; mkdir e; fsync e; fsync .; rename d/a e/a",
        [{**WHOLE, "e": {}}, {**WHOLE, "e": {"a": b"x"}}, {"d": {}, "e": {"a": b"x"}}],
    ),
    "what was removed may come back and be all there": (
        f"{SYNCED}; fsync .; unlink d/a; rmdir d",
        [WHOLE, {"d": {}}, {}],
    ),
    "names of one directory survive in any combination": (
        "create a; fsync a; create b; fsync b",
        [{}, {"a": b""}, {"b": b""}, {"a": b"", "b": b""}],
    ),
    "emptying a file may be lost": (
        "create a old; fsync a; fsync .; empty a; write a n",
        [{"a": data} for data in (b"old", b"n", b"o", b"n\0\0")],
    ),
}


@pytest.mark.parametrize(("changes", "left"), CUTS.values(), ids=CUTS)
def test_a_cut_leaves(changes: str, left: list[Tree]) -> None:
    found = Script(changes).outcomes()
    assert found[0] == left[0]
    assert sorted(map(str, found)) == sorted(map(str, left))


def drawn_data(changes: str, then: bytes) -> list[bytes]:
    """What is drawn of the file `a` once something is written over it."""
    script = Script(changes)
    script.add(Kind.WRITE, "?", inode=2, data=then)
    return [data for tree in script.outcomes() if isinstance(data := tree["a"], bytes)]


def test_a_write_is_torn_at_pages_only() -> None:
    new = b"".join(bytes([65 + page]) * PAGE for page in range(4)) + b"tail"
    outcomes = drawn_data(f"create a {'-' * len(new)}; fsync a; fsync .", then=new)
    assert len(outcomes) > 10
    for data in outcomes:
        assert len(data) == len(new)
        for start in range(0, len(new), PAGE):
            page = data[start : start + PAGE]
            assert page in {new[start : start + PAGE], b"-" * len(page)}


def test_a_file_that_grew_may_have_any_size_between_and_holes() -> None:
    outcomes = drawn_data("create a; fsync a; fsync .", then=b"x" * (3 * PAGE + 10))
    assert {len(data) for data in outcomes} == {0, PAGE, 2 * PAGE, 3 * PAGE, 3 * PAGE + 10}
    assert b"\0" * PAGE + b"x" * PAGE in outcomes


def test_what_failed_changed_nothing() -> None:
    script = Script()
    script.add(Kind.MKDIR, f"{ROOT}/d", error=5)
    assert script.disk.tree() == {}


def test_the_number_of_a_file_that_is_gone_may_be_given_again() -> None:
    script = Script("create a x; unlink a")
    script.add(Kind.OPEN, f"{ROOT}/b", inode=2, flags=CREATED)
    script.add(Kind.WRITE, "?", inode=2, data=b"y")
    assert script.disk.tree() == {"b": b"y"}


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


def _event(kind: Kind, path: Path, other: Path | str = "", **fields: Any) -> Event:
    inode = path.stat().st_ino if path.exists() else 0
    return event(kind, str(path), str(other), inode=inode, **fields)


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
