"""A model of a file system that keeps through a power cut only what was fsynced.

It is fed the changes that a process made, and draws directory trees that a cut at that moment may
leave. Its rules are the least that POSIX and Linux promise, so less than most file systems keep:

- What was written since a file's last fsync is lost, kept, or kept in part, page by page of 4 KiB;
  a page within the file's size that is neither kept nor was there before reads as zeros. The size
  may be the old one, the new one, or one at a page's edge between them.
- Names made, renamed and removed since their directory's last fsync are each lost or kept, in any
  combination; names in different directories know nothing of each other. A rename within a
  directory is one change. Of two changes to one name the later one wins if both are kept.
- fsync of a file does not keep its name, fsync of a directory does not keep its files' data, nor
  that directory's own name.

A rename from one directory into another may leave both names, never neither.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fileops import CREATED, EMPTIED, Event, Kind

PAGE = 4096
Tree = dict[str, "bytes | Tree"]
"""Name to a file's bytes, or to a directory's tree."""


@dataclass(eq=False, slots=True)
class File:
    """A file.

    Attributes:
      data: What reading it gives now.
      kept: What it held at its last fsync.
    """

    data: bytearray = field(default_factory=bytearray)
    kept: bytes = b""
    _is_synced: bool = True

    def write(self, offset: int, data: bytes) -> None:
        """Puts data somewhere, after zeros where the file does not reach so far."""
        self._is_synced = False
        self.data.extend(bytes(max(offset - len(self.data), 0)))
        self.data[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        """Cuts it, or lengthens it by zeros."""
        self._is_synced = False
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def sync(self) -> None:
        """Keeps what it holds."""
        if not self._is_synced:
            self.kept, self._is_synced = bytes(self.data), True

    def after_cut(self, draw: random.Random | None) -> bytes:
        """Draws what may be left of it; None draws the worst, what was fsynced."""
        if self._is_synced or draw is None:
            return self.kept
        fate = draw.choice(("lost", "kept", "torn", "torn"))
        if fate == "lost":
            return self.kept
        return bytes(self.data) if fate == "kept" else self._torn(draw)

    def _torn(self, draw: random.Random) -> bytes:
        old, new = self.kept, bytes(self.data)
        sizes = [len(old), len(new)]
        edges = range(min(sizes) // PAGE + 1, max(sizes) // PAGE + 1)
        sizes += [PAGE * draw.choice(edges)] if edges else []
        size = draw.choice(sizes)
        share = draw.choice((0.1, 0.5, 0.9))
        pages = []
        for start in range(0, size, PAGE):
            source = new if draw.random() < share else old
            pages.append(source[start : start + PAGE].ljust(PAGE, b"\0"))
        return b"".join(pages)[:size]


@dataclass(eq=False, slots=True)
class Directory:
    """A directory.

    Attributes:
      names: What is in it now.
      kept: What was in it at its last fsync.
      changes: What was done to it since, oldest first.
    """

    names: dict[str, Node] = field(default_factory=dict)
    kept: dict[str, Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        """Does something to the names."""
        change.apply(self.names)
        self.changes.append(change)

    def sync(self) -> None:
        """Keeps the names that are in it."""
        self.kept, self.changes = dict(self.names), []

    def after_cut(self, lost: set[Change], draw: random.Random | None) -> Tree:
        """Draws what may be left of it, and of all below, where some changes are lost."""
        names = dict(self.kept)
        for change in self.changes:
            if change not in lost:
                change.apply(names)
        return {
            name: node.after_cut(draw) if isinstance(node, File) else node.after_cut(lost, draw)
            for name, node in sorted(names.items())
        }

    def tree(self) -> Tree:
        """Everything in it now."""
        return {
            name: node.tree() if isinstance(node, Directory) else bytes(node.data)
            for name, node in sorted(self.names.items())
        }


Node = File | Directory


@dataclass(eq=False, frozen=True, slots=True)
class Change:
    """One change of a directory's names, which a cut keeps whole or loses whole.

    Attributes:
      removed: The name that goes, if any.
      added: The name that comes, if any.
      node: What it names.
      needs: The change elsewhere without which this one is not kept, if any.
    """

    removed: str | None = None
    added: str | None = None
    node: Node | None = None
    needs: Change | None = None

    def apply(self, names: dict[str, Node]) -> None:
        """Does it to some names."""
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.added is not None and self.node is not None:
            names[self.added] = self.node


def _lost(changes: list[Change], draw: random.Random | None) -> list[Change]:
    """Draws which of a directory's changes are lost."""
    if draw is None:
        return changes
    fate = draw.choice(("all", "none", "last", "any", "any"))
    if fate == "last":  # as a journal does it
        return changes[draw.randint(0, len(changes)) :]
    share = {"all": 1.0, "none": 0.0, "any": draw.choice((0.2, 0.5, 0.8))}[fate]
    return [change for change in changes if draw.random() < share]


class Disk:
    """The file system below one directory, which is there and empty in the beginning."""

    def __init__(self, root: str) -> None:
        self._root = PurePosixPath(root)
        self._top = Directory()
        self._by_inode: dict[int, Node] = {}
        self._directories = [self._top]  # removed ones too: a cut may bring them back

    def replay(self, events: Iterable[Event]) -> None:
        """Does what a process did."""
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Does one thing that a process did; what failed, and marks, change nothing."""
        if event.error or event.kind is Kind.MARK:
            return
        match event.kind:
            case Kind.OPEN:
                self._open(event)
            case Kind.WRITE:
                self._file(event).write(event.offset, event.data)
            case Kind.TRUNCATE:
                self._file(event).truncate(event.offset)
            case Kind.MKDIR:
                self._make(event, Directory())
            case Kind.RENAME:
                self._rename(event)
            case Kind.LINK:
                self._link(event)
            case Kind.UNLINK | Kind.RMDIR:
                directory, name = self._place(event.path)
                directory.change(Change(removed=name))
            case Kind.FSYNC:
                self._node(event).sync()
            case _:
                raise NotImplementedError(f"{event} is of no kind that is recorded")

    def tree(self) -> Tree:
        """Everything on it now."""
        return self._top.tree()

    def after_cut(self, draw: random.Random | None = None) -> Tree:
        """Draws what may be left if the power goes now; by default only what was fsynced."""
        lost: set[Change] = set()
        for directory in self._directories:
            lost.update(_lost(directory.changes, draw))
        for directory in self._directories:
            lost.update(change for change in directory.changes if change.needs in lost)
        return self._top.after_cut(lost, draw)

    def _place(self, path: str) -> tuple[Directory, str]:
        *parents, name = PurePosixPath(path).relative_to(self._root).parts
        directory = self._top
        for parent in parents:
            inner = directory.names[parent]
            assert isinstance(inner, Directory), path
            directory = inner
        return directory, name

    def _node(self, event: Event) -> Node:
        """What a descriptor is open on, whatever its name is by now."""
        if event.path == str(self._root):
            return self._top
        return self._by_inode[event.inode]

    def _open(self, event: Event) -> None:
        if event.flags == CREATED:
            self._make(event, File())
        elif event.flags == EMPTIED:
            self._file(event).truncate(0)

    def _make(self, event: Event, node: Node) -> None:
        directory, name = self._place(event.path)
        self._by_inode[event.inode] = node
        if isinstance(node, Directory):
            self._directories.append(node)
        directory.change(Change(added=name, node=node))

    def _file(self, event: Event) -> File:
        file = self._node(event)
        assert isinstance(file, File), event
        return file

    def _rename(self, event: Event) -> None:
        (source, name), (target, other) = self._place(event.path), self._place(event.other)
        node = source.names[name]
        if source is target:
            source.change(Change(removed=name, added=other, node=node))
            return
        arrival = Change(added=other, node=node)
        target.change(arrival)
        source.change(Change(removed=name, needs=arrival))

    def _link(self, event: Event) -> None:
        (source, name), (target, other) = self._place(event.path), self._place(event.other)
        target.change(Change(added=other, node=source.names[name]))


def write_tree(tree: Tree, directory: Path) -> None:
    """Makes a tree's files below a directory, which is there and empty."""
    for name, node in tree.items():
        path = directory / name
        if isinstance(node, dict):
            path.mkdir()
            write_tree(node, path)
        else:
            path.write_bytes(node)


def read_tree(directory: Path) -> Tree:
    """Everything below a directory."""
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes()
        for path in sorted(directory.iterdir())
    }
