"""Open directories, and files, that can be locked by `flock`.

The kernel drops the lock of a process that dies. Sessions and checkpoints are locked by their own
directories: there is no lock file. That a run lives is told by a file, which says whose lock it is.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

_MOST_BYTES = 4096  # of what the text of a lock may be


class DirectoryLock:
    """An open directory that can be locked; while it is open, its inode is not used again.

    Attributes:
      identity: Device and inode of the directory.
    """

    mark = ""  # what the names of a session's parts have to hold
    _descriptor = -1

    def __init__(self, descriptor: int) -> None:
        self._process = os.getpid()
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)

    def acquire(self, kind: int) -> None:
        """Waits for the `flock`, shared or exclusive; with `LOCK_NB`, raises BlockingIOError."""
        fcntl.flock(self._descriptor, kind)

    def release(self) -> None:
        """Gives the lock back; the directory stays open."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the lock back and closes the directory; a second call does nothing."""
        if self._process == os.getpid():  # closing would do, unless a forked child has it open, too
            with contextlib.suppress(OSError):  # of a file system without locks
                self.release()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self, _is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._descriptor >= 0 and not _is_ending():  # left by an interrupt, or by a fork
            self.close()


def open_directory(directory: Path, *, follow: bool = False) -> DirectoryLock | None:
    """Opens a directory, through a symbolic link only if asked to; None where there is none.

    Raises:
      NotADirectoryError: Something else is there.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return DirectoryLock(os.open(directory, flags if follow else flags | os.O_NOFOLLOW))
    except FileNotFoundError:
        return None
    except OSError as error:
        # Of a link that is not followed, Linux says ENOTDIR, and macOS ELOOP.
        if error.errno == errno.ELOOP and not follow and os.path.islink(directory):
            code = errno.ENOTDIR
            raise NotADirectoryError(code, os.strerror(code), str(directory)) from None
        raise


class FileLock(DirectoryLock):
    """An open file that can be locked in the same way; its text says who holds the lock."""

    def read(self) -> str:
        """Returns the text."""
        return os.pread(self._descriptor, _MOST_BYTES, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        """Replaces the text."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def open_file(path: Path) -> FileLock | None:
    """Opens a file to look at its lock; None where there is none.

    Raises:
      OSError: It cannot be opened.
    """
    try:
        return FileLock(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return None


def make_file(path: Path) -> FileLock:
    """Opens a file to lock it and to write to it; makes it if need be.

    Raises:
      OSError: It cannot be made, or opened.
    """
    return FileLock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
