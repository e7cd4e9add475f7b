"""Open directories that can be locked by `flock`.

There is no lock file, and the kernel drops the lock of a process that dies.
"""

import errno
import fcntl
import os
from pathlib import Path


class DirectoryLock:
    """An open directory that can be locked; while it is open, its inode is not used again.

    Attributes:
      identity: Device and inode of the directory.
    """

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
            self.release()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._descriptor >= 0:  # left by an interrupt, or by a fork
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
