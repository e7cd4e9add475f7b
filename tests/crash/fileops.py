"""The library `fileops.c`: building it, arming it from within a process, and reading its log."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_SOURCE = Path(__file__).with_name("fileops.c")
_RECORD = struct.Struct("=IIiIIIQQQ")
CREATED, EMPTIED, _FORCED = 1, 2, 4
FOR_GOOD = 1 << 40


class NoCompilerError(Exception):
    """This machine has no C compiler."""


# What changed, by the numbers of `fileops.c`.
_KINDS = "MARK OPEN WRITE TRUNCATE RENAME LINK SYMLINK UNLINK MKDIR RMDIR FSYNC"
Kind = IntEnum("Kind", _KINDS, start=0)
# What to do at the n-th change; of writes alone for TEAR and SHORTEN.
Action = IntEnum("Action", "COUNT KILL TEAR FAIL SHORTEN", start=0)


@dataclass(frozen=True, slots=True)
class Event:
    """One change, as the disk saw it.

    Attributes:
      kind: What changed; MARK is none, but what the process said about itself, in `path`.
      path: The file; of a symbolic link, its text.
      other: The new name of RENAME, LINK, SYMLINK.
      inode: The file's number, which may be given to another file once it is gone.
      offset: Of WRITE, where in the file; of TRUNCATE, its new size.
      data: What was written, where the log keeps it.
      flags: Of OPEN that happened, CREATED or EMPTIED.
      error: The error number that it failed with; 0 where it happened.
    """

    kind: Kind
    path: str
    other: str
    inode: int
    offset: int
    data: bytes
    flags: int
    error: int

    @property
    def was_forced(self) -> bool:
        """Whether it was made to fail."""
        return bool(self.error and self.flags == _FORCED)

    def __str__(self) -> str:
        """Tells it in a few words."""
        tail = "/".join(self.path.split("/")[-2:])
        failed = f" failing with {errno.errorcode[self.error]}" if self.error else ""
        return f"{self.kind.name.lower()} {tail}{failed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What befalls a process: `action` at change number `at`, counted from 0, and those after.

    Attributes:
      action: What to do.
      at: Number of the first change that it is done to.
      times: To how many of them.
      error: The error number of FAIL.
    """

    action: Action = Action.COUNT
    at: int = 0
    times: int = FOR_GOOD
    error: int = 0

    def __str__(self) -> str:
        """Tells it in a few words."""
        if self.action is Action.COUNT:
            return "no harm"
        what = f" with {errno.errorcode[self.error]}" if self.error else ""
        often = {1: "", FOR_GOOD: " for good"}.get(self.times, f" {self.times} times")
        return f"{self.action.name.lower()}{what} at change {self.at}{often}"


def build(directory: Path) -> Path:
    """Compiles the library into a directory.

    Raises:
      NoCompilerError: There is nothing to compile it with.
    """
    names = filter(None, (os.environ.get("CC"), "gcc", "cc", "clang"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise NoCompilerError("no C compiler (gcc, cc, clang): crash points cannot be counted")
    library = directory / "libfileops.so"
    flags = ("-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread")
    subprocess.run([compiler, *flags, "-o", library, _SOURCE, "-ldl"], check=True)
    return library


class Watch:
    """The preloaded library, from within the process that it watches."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)

    def arm(self, directory: Path, log: Path, *, with_data: bool) -> None:
        """Counts changes below a directory, an absolute path without links, from now on."""
        self._library.fileops_arm(os.fsencode(directory), os.fsencode(log), int(with_data))

    def plan(self, plan: Plan) -> None:
        """Counts from 0 again, for another plan."""
        at, times = ctypes.c_long(plan.at), ctypes.c_long(plan.times)
        self._library.fileops_plan(int(plan.action), at, times, plan.error)

    def mark(self, text: str) -> None:
        """Writes a text into the log, between the changes before and after it."""
        self._library.fileops_mark(text.encode())


def read_log(path: Path) -> list[Event]:
    """Returns the events of a log, oldest first."""
    data = path.read_bytes()
    events, at = [], 0
    while at < len(data):
        kind, flags, error, *sizes, inode, offset, data_size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        pieces = []
        for size in (sizes[0], sizes[1], data_size):
            pieces.append(data[at : at + size])
            at += size
        first, second = (piece.decode("utf-8", "surrogateescape") for piece in pieces[:2])
        event = Event(Kind(kind), first, second, inode, offset, pieces[2], flags, error)
        events.append(event)
    return events
