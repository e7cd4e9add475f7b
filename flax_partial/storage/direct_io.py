"""Writes one new file, front to back, around the page cache where that can be done.

A checkpoint is written once and not read soon. Through the page cache every byte of it is copied,
its pages are allocated, and fsync then waits for the same bytes again: of 1 GiB on a local disk,
that took 0.7 to 1.0 s, and 0.45 s without (O_DIRECT), which also leaves the processor to training.

Where the system has no O_DIRECT, as macOS has none, the page cache takes it all.

The kernel takes only whole blocks, from memory that is aligned like the file. Arrays are not, so
the file is laid out after them: a large run of bytes begins at an offset that lies in its block as
its address does. Its whole blocks are written from where they are; its ends, and whatever is small,
are gathered in a buffer of ours. Nothing large is copied.
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from flax_partial.storage import system

BLOCK_BYTES = 4096  # the largest alignment that today's file systems and disks need
_DIRECT_BYTES = 1 << 20  # a smaller file takes no longer through the page cache
_RUN_BYTES = 64 * 1024  # a smaller run is copied: a gap before it would cost as much
_BUFFER_BYTES = 1 << 20
_AT_ONCE_BYTES = 64 << 20
_AT_ONCE_RUNS = 1000  # the kernel takes 1,024
# What writes answer where the file system, or the memory, does not do this after all.
_NOT_DIRECT = frozenset((errno.EINVAL, errno.EFAULT, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))

Bytes = np.ndarray
"""One axis of uint8, contiguous."""


class NewFile:
    """A file that is written from its beginning to its end; use it as a context.

    What is appended must not change until the file is finished.
    """

    def __init__(
        self,
        path: Path,
        *,
        expected_bytes: int,
        durable: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Creates the file.

        Args:
          path: Where; nothing is there.
          expected_bytes: About how large it becomes.
          durable: Whether `finish` has it on the disk.
          check: Called before each piece of at most 64 MiB is written; what it raises is raised by
            the call that writes.

        Raises:
          OSError: It cannot be created.
        """
        self._path = path
        self._descriptor, self._is_direct = _create(
            path, is_direct=durable and expected_bytes >= _DIRECT_BYTES
        )
        self._durable = durable
        self._check = check
        self._end = 0
        self._pending: list[memoryview] = []
        self._pending_bytes = 0
        self._buffer = _Buffer(min(_BUFFER_BYTES, _whole_blocks(expected_bytes) + BLOCK_BYTES))
        self._fell_back = False

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file, finished or not."""
        os.close(self._descriptor)

    def append(self, data: Bytes) -> int:
        """Appends bytes; returns the offset at which they are.

        Raises:
          OSError: Writing failed.
        """
        view = data.data
        if self._is_direct and data.size >= _RUN_BYTES:
            address = data.__array_interface__["data"][0]
            self._gather(memoryview(bytes((address - self._end) % BLOCK_BYTES)))
            return self._append_run(view)
        offset = self._end
        if self._is_direct:
            self._gather(view)
        else:
            self._end += data.size
            self._put(view)
        return offset

    def finish(self) -> None:
        """Writes what is left; durable, if it was to be.

        Raises:
          OSError: Writing failed.
        """
        if self._is_direct:
            self._gather(memoryview(bytes(-self._end % BLOCK_BYTES)))
            self._put(self._buffer.take())
        self._flush()
        if self._durable:
            system.sync(self._descriptor)

    def _append_run(self, view: memoryview) -> int:
        """Appends bytes that lie in their blocks as the file's end does: the whole blocks as is."""
        offset = self._end
        head = -offset % BLOCK_BYTES
        middle = head + (len(view) - head) // BLOCK_BYTES * BLOCK_BYTES
        self._gather(view[:head])
        self._put(self._buffer.take())
        self._end += middle - head
        self._put(view[head:middle])
        self._gather(view[middle:])
        return offset

    def _gather(self, view: memoryview) -> None:
        """Copies bytes into the buffer, to be written with their neighbours."""
        self._end += len(view)
        while view:
            view = view[self._buffer.fill(view) :]
            if self._buffer.is_full:
                self._put(self._buffer.take())
                self._flush()

    def _put(self, view: memoryview) -> None:
        while view:
            room = _AT_ONCE_BYTES - self._pending_bytes
            piece, view = view[:room], view[room:]
            self._pending.append(piece)
            self._pending_bytes += len(piece)
            if self._pending_bytes >= _AT_ONCE_BYTES or len(self._pending) >= _AT_ONCE_RUNS:
                self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        while pending:
            self._check()
            try:
                written = system.write(self._descriptor, pending)
            except OSError as error:
                if not self._is_direct or self._fell_back or error.errno not in _NOT_DIRECT:
                    raise
                self._fall_back()
            else:
                pending = _after(pending, written)
        self._buffer.is_free = True

    def _fall_back(self) -> None:
        """Goes on through the page cache, which takes blocks, or pieces of them, from anywhere.

        The file is opened anew: a server of FUSE, such as mergerfs, keeps the flags that it was
        opened with.
        """
        cached = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.lseek(cached, os.lseek(self._descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(cached, self._descriptor, inheritable=False)
        finally:
            os.close(cached)
        self._fell_back = True


class _Buffer:
    """Block-aligned memory in which small runs are gathered; used again once it was written."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory: memoryview | None = None
        self._first = self._next = 0
        self.is_free = True  # whether nothing of it waits to be written

    @property
    def is_full(self) -> bool:
        return self._next == self._size

    def fill(self, view: memoryview) -> int:
        """Copies as much as there is room for; returns how much that was."""
        if self._memory is None:
            self._memory = memoryview(mmap.mmap(-1, self._size))
        if self.is_free and self._first == self._next:
            self._first = self._next = 0
        taken = min(len(view), self._size - self._next)
        self._memory[self._next : self._next + taken] = view[:taken]
        self._next += taken
        return taken

    def take(self) -> memoryview:
        """Returns what was gathered since the last time: whole blocks."""
        if self._memory is None:
            return memoryview(b"")
        taken = self._memory[self._first : self._next]
        self._first = self._next
        self.is_free = False
        return taken


def _create(path: Path, *, is_direct: bool) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if is_direct and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        # Some file systems create the file before they refuse.
        path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666), False


def _after(pending: list[memoryview], written: int) -> list[memoryview]:
    """What of `pending` is left when so many bytes of it are written."""
    for number, view in enumerate(pending):
        if written < len(view):
            return [view[written:], *pending[number + 1 :]]
        written -= len(view)
    return []


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
