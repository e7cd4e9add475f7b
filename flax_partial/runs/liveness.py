"""Whether a training run lives: others may look at its directory, and leave alone what it writes.

A run locks `<directory>/timeline/running.json` for as long as it lives, and says there who it is.
Others probe that lock, and wait for nothing. The locks of sessions are others, and only held while
something is written: a session that nobody writes to can still be finalized or aborted.

Who recovers what an ended run has left locks the directory itself meanwhile, and so does a run that
begins: none can begin while another process drops what it takes for left behind.

Where the file system knows no locks, every run is taken for ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

from flax_partial.errors import CheckpointInUseError
from flax_partial.runs.timeline import FOLDER
from flax_partial.storage import locks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_FILE = "running.json"
_PAUSE_SECS = 0.05
_INSTANT_SECS = 0.15  # for as long at most who probes a lock holds it
_PATIENCE_SECS = 1.0  # after which a wait is logged
# What a file system says that knows no `flock`, or none of a file that is open for reading only.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class Life:
    """That a run of this process lives in a directory; until it is ended, or the process is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: locks.FileLock | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it has begun, and not ended."""
        return self._lock is not None

    def begin(self) -> None:
        """Begins it, if it has not begun.

        Raises:
          CheckpointInUseError: Another run lives there.
          OSError: The directory cannot be made, or written to.
        """
        if self._lock is not None:
            return
        folder = self._directory / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            logger.warning("Others cannot see that a run trains in %s: %s", self._directory, error)
            return
        lock = locks.make_file(folder / _FILE)
        if not _wait(lock, _INSTANT_SECS, "for who looks whether a run lives"):
            who = _described(lock)
            lock.close()
            raise CheckpointInUseError(
                errno.EWOULDBLOCK,
                f"Another run trains in this directory ({who}), which the steps of two would mix "
                "in. Callbacks of one process that save into one directory share a FinalizeHook "
                "(finalizer=); another job takes a directory of its own, or waits for that one to "
                "end",
                str(self._directory),
            )
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        lock.write(json.dumps(about))
        self._lock = lock
        _held.add(lock)

    def end(self) -> None:
        """Ends it; a second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()


def living(directory: Path) -> str | None:
    """Returns which run lives in a directory, of this process or another; None if none is known to.

    It waits for nothing. What cannot be read, or locked, is not known.
    """
    try:
        lock = locks.open_file(directory / FOLDER / _FILE)
    except OSError:
        return None
    if lock is None:
        return None
    try:
        return None if _try(lock, fcntl.LOCK_SH) else _described(lock)
    finally:
        lock.close()


def wait_until_idle(session: Path, timeout_secs: float) -> bool:
    """Waits until no process writes to a session; returns whether that came in time.

    Args:
      session: Its directory.
      timeout_secs: For how many seconds to wait.
    """
    try:
        lock = locks.open_directory(session)
    except OSError:  # it is no session
        return True
    if lock is None:
        return True
    with contextlib.closing(lock):
        return _wait(lock, timeout_secs, f"for another process, which saves into {session}")


@contextmanager
def recovering(directory: Path, timeout_secs: float) -> Iterator[None]:
    """Keeps other processes from recovering a directory, and runs from beginning in it, meanwhile.

    Where it cannot be locked (by who may not list it, or without locks), nothing is.

    Raises:
      CheckpointInUseError: Another process has held it for all that time.
      OSError: It is no directory, or not there.
    """
    lock = locks.open_directory(directory, follow=True)
    if lock is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    with contextlib.closing(lock):
        if not _wait(lock, timeout_secs, f"for another process, which recovers {directory}"):
            raise CheckpointInUseError(
                errno.EWOULDBLOCK,
                f"Another process has recovered it for more than {timeout_secs:g} s",
                str(directory),
            )
        yield


def _wait(lock: locks.DirectoryLock, timeout_secs: float, what: str) -> bool:
    """Waits until nobody else has a lock; returns whether that came in time."""
    began, is_told = time.monotonic(), False
    while not _try(lock, fcntl.LOCK_EX):
        waited_secs = time.monotonic() - began
        if waited_secs >= timeout_secs:
            return False
        if waited_secs > _PATIENCE_SECS and not is_told:
            logger.warning("Waiting %s.", what)
            is_told = True
        time.sleep(_PAUSE_SECS)
    return True


def _try(lock: locks.DirectoryLock, kind: int) -> bool:
    """Locks without waiting; returns False if somebody else has locked it."""
    try:
        lock.acquire(kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.debug("No lock to be had, so nobody else is seen: %s", error)
    return True


def _described(lock: locks.FileLock) -> str:
    try:
        about = json.loads(lock.read())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        return f"process {about['process']} on {about['host']}, since {since}"
    except (OSError, TypeError, ValueError, KeyError):  # it was locked a moment ago
        return "which has just begun"


_held: WeakSet[locks.FileLock] = WeakSet()


def _forget() -> None:
    """A forked child has the file open, too, and would keep it locked when its parent has died."""
    for lock in tuple(_held):
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
