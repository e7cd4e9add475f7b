"""Whether a training run lives: others may read its directory, and do not change what it writes.

A run locks `<directory>/timeline/running.json` for as long as it lives, and records its process
there. Others probe that lock without waiting. The locks of sessions are others, and only held while
something is written: a session without saves under way can still be finalized or aborted.

A process that recovers what an ended run has left locks the directory itself meanwhile, and so does
a run that begins: no run begins while another process drops the sessions of an ended one.

Where there are no locks, or only such as hold on one machine, and in object stores, leases take the
place of both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from flax_partial.errors import CheckpointInUseError
from flax_partial.runs import leases
from flax_partial.runs.leases import Lease
from flax_partial.runs.timeline import FOLDER
from flax_partial.storage import locks
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.store_path import StorePath

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flax_partial.storage.store import Store
    from flax_partial.storage.store_path import AnyPath

logger = logging.getLogger(__name__)

_FILE = "running.json"
_PAUSE_SECS = 0.05
_INSTANT_SECS = 0.15  # for how long at most a probe holds the lock
_PATIENCE_SECS = 1.0  # after which a wait is logged
_LIVES = f"{FOLDER}/running"  # the names of leases, without their numbers
_RECOVERS = f"{FOLDER}/recovering"


class Life:
    """Shows other processes that a run of this one lives in a directory, until either ends."""

    def __init__(self, directory: AnyPath) -> None:
        self._directory = directory
        self._held: locks.FileLock | Lease | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it has begun, and not ended."""
        return self._held is not None

    def begin(self) -> None:
        """Begins it, if it has not begun.

        Raises:
          CheckpointInUseError: Another run lives there.
          OSError: The directory cannot be made, or written to.
        """
        if self._held is not None:
            return
        if isinstance(self._directory, Path):
            try:
                (self._directory / FOLDER).mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                where = self._directory
                logger.warning(
                    "Other processes cannot be shown that a run trains in %s: %s", where, error
                )
                return
        store = _store(self._directory)
        self._held = self._lock() if store is None else self._lease(store)

    def _lock(self) -> locks.FileLock:
        lock = locks.make_file(Path(self._directory, FOLDER, _FILE))
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(lock.close)  # the error may be kept, and it refers to the lock
            if not _wait(lock, _INSTANT_SECS, "for who looks whether a run lives"):
                raise self._taken(_described(lock))
            lock.write(json.dumps(leases.about_this_process()))
            if_it_fails.pop_all()
        _locked.add(lock)
        return lock

    def _lease(self, store: Store) -> Lease:
        lease = Lease(store, _LIVES)
        who = lease.take()
        if who is not None:
            raise self._taken(who)
        return lease

    def _taken(self, who: str) -> CheckpointInUseError:
        return CheckpointInUseError(
            errno.EWOULDBLOCK,
            f"Another run trains in this directory ({who}), and the steps of two runs would mix. "
            "Callbacks of one process that save into one directory share a FinalizeHook "
            "(finalizer=); another job takes a directory of its own, or waits for that one to "
            "end",
            str(self._directory),
        )

    def check(self) -> None:
        """Raises CheckpointInUseError if another run has taken the directory meanwhile.

        That can happen where there are no locks, to a process that was stopped for long.
        """
        if isinstance(self._held, Lease) and self._held.lost_to is not None:
            raise self._taken(self._held.lost_to)

    def end(self) -> None:
        """Ends it; a second call does nothing."""
        held, self._held = self._held, None
        if isinstance(held, Lease):
            held.release()
        elif held is not None:
            held.close()


def living(directory: AnyPath) -> str | None:
    """Returns which run lives in a directory, of this process or another; None if there is none.

    It waits for nothing, unless there are no locks: then until a run of another machine renews its
    lease, or for the grace. What cannot be read is not known.
    """
    try:
        store = _store(directory)
        if store is not None:
            return leases.holder(store, _LIVES)
        lock = locks.open_file(Path(directory, FOLDER, _FILE))
    except OSError:
        return None
    if lock is None:
        return None
    try:
        lock.acquire(fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _described(lock)
    finally:
        lock.close()
    return None


def wait_until_idle(session: AnyPath, timeout_secs: float) -> bool:
    """Waits until no process writes to a session; returns whether that came in time.

    Where there are no locks it waits for nothing: a save that comes too late finds that out.

    Args:
      session: Its directory.
      timeout_secs: For how many seconds to wait.
    """
    if isinstance(session, StorePath):
        return True
    try:
        lock = locks.open_directory(session)
    except OSError:  # it is no session
        return True
    if lock is None:
        return True
    with contextlib.closing(lock):
        return not locks.are_shared(session) or _wait(
            lock, timeout_secs, f"for another process, which saves into {session}"
        )


@contextmanager
def recovering(directory: AnyPath, timeout_secs: float) -> Iterator[None]:
    """Keeps other processes from recovering a directory, and runs from beginning in it, meanwhile.

    Raises:
      CheckpointInUseError: Another process has held it for all that time.
      OSError: It is no directory, or not there.
    """
    with _held_for_recovery(directory, timeout_secs) as is_ours:
        if not is_ours:
            raise CheckpointInUseError(
                errno.EWOULDBLOCK,
                f"Another process has been recovering it for more than {timeout_secs:g} s",
                str(directory),
            )
        yield


@contextmanager
def _held_for_recovery(directory: AnyPath, timeout_secs: float) -> Iterator[bool]:
    """Yields whether the directory is held by this process."""
    store = _store(directory)
    if store is not None:
        lease = Lease(store, _RECOVERS)
        try:
            is_ours = lease.take(timeout_secs) is None
        except OSError as error:
            if not (isinstance(error, PermissionError) or error.errno == errno.EROFS):
                raise
            is_ours = True  # a process that may not write recovers nothing
        try:
            yield is_ours
        finally:
            lease.release()
        return
    lock = locks.open_directory(Path(directory), follow=True)
    if lock is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    with contextlib.closing(lock):
        yield _wait(lock, timeout_secs, f"for another process, which recovers {directory}")


def _store(directory: AnyPath) -> Store | None:
    """Where the leases of a run are; None where it has locks."""
    if isinstance(directory, StorePath):
        return directory.store
    return None if locks.are_shared(directory) else DirectoryStore(directory, durable=False)


def _wait(lock: locks.DirectoryLock, timeout_secs: float, what: str) -> bool:
    """Waits until no other process has the lock; returns whether that came in time."""
    began, is_told = time.monotonic(), False
    while not lock.try_exclusive():
        waited_secs = time.monotonic() - began
        if waited_secs >= timeout_secs:
            return False
        if waited_secs > _PATIENCE_SECS and not is_told:
            logger.warning("Waiting %s.", what)
            is_told = True
        time.sleep(_PAUSE_SECS)
    return True


def _described(lock: locks.FileLock) -> str:
    try:
        return leases.described(json.loads(lock.read()))
    except (OSError, ValueError):  # it was locked a moment ago
        return leases.described({})


_locked: WeakSet[locks.FileLock] = WeakSet()


def _forget() -> None:
    """A forked child has the file open, too, and would keep it locked when its parent has died."""
    for lock in tuple(_locked):
        lock.close()
    _locked.clear()


os.register_at_fork(after_in_child=_forget)
