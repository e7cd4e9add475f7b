"""This process's record of each unfinished checkpoint: its claims, its lock, its failed saves.

Saving registers here; finalize, abort and status read here. Callers claim leaves in memory; only
workers take the lock of the directory, and hold it while saves are under way.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from flax_partial.distributed import agreement
from flax_partial.errors import KeyConflictError, NoSessionError
from flax_partial.format.model import Leaf
from flax_partial.sessions import workers
from flax_partial.sessions.claims import Claims
from flax_partial.sessions.handles import Handle, SaveHandle
from flax_partial.storage.place import OpenSession, Place
from flax_partial.storage.store_path import AnyPath

_LOG = logging.getLogger("flax_partial")


class Session:
    """This process's record of the unfinished checkpoint at one path.

    Attributes:
      where: Its paths.
      is_aborted: Whether it is being dropped, or was.
      not_removed: Parts that failed saves have written and could not remove: they do not count.
    """

    def __init__(self, where: Place) -> None:
        self.where = where
        self.is_aborted = False
        self.not_removed: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # guards what follows
        self._claims = Claims()
        self._are_claims_torn = False  # where an interrupt came while leaves were claimed
        self._begun = weakref.WeakSet[object]()  # saves under way
        self._pending: dict[object, Sequence[Leaf]] = {}  # what those have claimed
        self._directory: OpenSession | None = None  # what the claims are about
        self._failed: list[SaveHandle] = []
        self._last_time_ns = 0
        self._entering = threading.Lock()  # guards what follows; workers only, who may wait long
        self._writers = 0
        self._locked: OpenSession | None = None
        self._prepared: OpenSession | None = None  # what holds all that it has to
        self._synced: OpenSession | None = None  # what this process has made durable

    # What a caller does.

    def begin(self, save: object) -> None:
        """Notes a save that is under way, until `release` or `keep`."""
        self._begun.add(save)

    def claim(
        self, save: object, leaves: Sequence[Leaf], *, replace: bool, is_tree: bool
    ) -> tuple[Sequence[Leaf], int]:
        """Claims leaves for a save that has begun.

        Args:
          save: Stands for the save.
          leaves: What is to be saved.
          replace: Whether leaves that are claimed already are replaced.
          is_tree: Whether the leaves are known to form a tree.

        Returns:
          The leaves, each in its generation; the save's time, in nanoseconds since the epoch.

        Raises:
          CheckpointExistsError: The finalized checkpoint, or something else, is there.
          KeyConflictError: Some leaves cannot be claimed; it names all of them.
          NoSessionError: The session is being aborted.
        """
        self.require_not_aborted()
        with self._lock:
            self._look()
            self._are_claims_torn = True
            try:
                claimed = self._claims.claim(
                    leaves, replace=replace, is_tree=is_tree, visible=self._newest_generation
                )
                self._pending[save] = claimed
            except (KeyConflictError, OSError) as error:  # it has claimed nothing
                self._are_claims_torn = False
                error.add_note(f"This is about {self.where.session}.")
                raise
            self._are_claims_torn = False
            self._last_time_ns = max(time.time_ns(), self._last_time_ns + 1)
            return claimed, self._last_time_ns

    def release(self, save: object) -> None:
        """Takes back what a save has claimed, if anything."""
        with self._lock:
            self._claims.release(self._pending.get(save, ()))
            self._end(save)

    def require_not_aborted(self) -> None:
        """Raises NoSessionError if the session was aborted."""
        if self.is_aborted:
            raise NoSessionError(
                f"The session of {self.where.final} was aborted before this part was written."
            )

    def raise_unseen(self) -> None:
        """Raises the error of a background save that no call has raised yet."""
        if not self._failed:
            return
        with self._lock:
            failed = [handle for handle in self._failed if handle.done()]
            self._failed = [handle for handle in self._failed if handle not in failed]
        errors = [error for handle in failed if (error := handle.unseen_error())]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"And another save of this session failed: {other!r}")
            errors[0].add_note(f"It was a save_async to {self.where.final} that failed.")
            raise errors[0]

    def _look(self) -> None:
        """Drops claims that are about a directory that is gone; reads those of one that is there.

        While saves are pending, their workers do so.
        """
        if self._are_claims_torn:
            self._take_over(self._directory)
        found = self.where.look(self._directory, is_busy=bool(self._pending))
        if found is not self._directory:
            self._take_over(found)

    def _take_over(self, directory: OpenSession | None) -> None:
        """Makes the claims those of a directory, and of the saves that are pending."""
        claims = Claims()
        if directory is not None and not directory.is_new:
            failed = self.not_removed
            mine = self.where.read_parts(process=agreement.index(), failed=failed)
            for part in mine.committed.values():
                claims.load(part)
        for leaves in self._pending.values():
            claims.hold(leaves)
        before, self._directory, self._claims = self._directory, directory, claims
        self._are_claims_torn = False
        if before is not None and before is not directory:
            before.close()

    def _newest_generation(self, names: frozenset[str]) -> dict[str, int]:
        """Largest generation of each of these leaves in the parts on disk, where there is one."""
        found: dict[str, int] = {}
        for part in self.where.read_parts(failed=self.not_removed).committed.values():
            for leaf in part.leaves:
                if leaf.name in names:
                    found[leaf.name] = max(found.get(leaf.name, 0), leaf.generation)
        return found

    # What a worker does.

    @contextlib.contextmanager
    def entered(self, *, durable: bool) -> Iterator[OpenSession]:
        """Keeps finalize and abort out while a worker writes.

        The directory is made if there is none. The lock is given back once no save is under way
        or about to be.

        Yields:
          The session.

        Raises:
          CheckpointExistsError: The finalized checkpoint is there by now.
          OSError: The directory cannot be made, or what a failed save left cannot be removed.
        """
        with self._entering:
            opened = self._enter(durable=durable)
            self._writers += 1
        try:
            yield opened
        finally:
            with self._entering:
                self._writers -= 1
                self._unlock_if_idle()

    def _enter(self, *, durable: bool) -> OpenSession:
        if self._locked is None or self._locked is not self._directory:
            directory = self.where.enter(self._directory)
            try:
                if directory is not self._prepared:
                    self.where.prepare()
                    self._prepared = directory
                if directory is not self._directory:
                    with self._lock:
                        self._take_over(directory)
            except BaseException:
                directory.release()
                raise
            self._locked = directory
        try:
            self.remove_failed()
            if durable and self._synced is not self._locked:
                self.where.sync()
                self._synced = self._locked
        except BaseException:
            self._unlock_if_idle()
            raise
        return self._locked

    def skip(self) -> None:
        """Gives the lock back if it was held for a save that was withdrawn."""
        with self._entering:
            self._unlock_if_idle()

    def _unlock_if_idle(self) -> None:
        if not self._writers and not workers.saving.has_queued(self):
            locked, self._locked = self._locked, None
            if locked is not None:
                locked.release()

    def keep(self, save: object) -> None:
        """Keeps the claims of a save that is committed."""
        with self._lock:
            self._end(save)

    def _end(self, save: object) -> None:
        self._pending.pop(save, None)
        self._begun.discard(save)

    def fail(self, handle: SaveHandle) -> None:
        """Remembers a background save that has failed, until its error is seen."""
        with self._lock:
            self._failed.append(handle)

    def remove(self, part: str) -> None:
        """Removes what a failed save has written: now, or before it can be taken for saved."""
        with self._entering:
            self.not_removed |= {part}
            with contextlib.suppress(OSError):
                self.where.remove_part(part)
            if not self.where.may_have_table(part):  # it counts for nothing
                self.not_removed -= {part}

    def remove_failed(self) -> None:
        """Removes what failed saves of this process have left; the session is locked exclusively.

        Raises:
          OSError: It cannot be removed.
        """
        for part in sorted(self.not_removed):
            self.where.remove_part(part)
            self.not_removed -= {part}

    def in_flight(self) -> list[Handle[Any]]:
        """The handles of the saves in flight that this process has now."""
        return [task.handle for task in workers.saving.tasks_about(self)]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing in flight, and no error to raise."""
        return not self._begun and all(handle.was_seen for handle in self._failed)

    @property
    def is_stale(self) -> bool:
        """Whether the directory that this is about is gone."""
        if not self.is_idle:
            return False
        return self._directory is None or self.where.is_gone(self._directory)

    def close(self) -> None:
        """Forgets the claims, unless saves are pending: those find out that it is gone."""
        with self._lock:
            if not self._begun:
                self.not_removed = frozenset()
                self._take_over(None)


_sessions: dict[AnyPath, Session] = {}
_sessions_lock = threading.Lock()


def session_of(where: Place) -> Session:
    """Returns the record of a session; drops the records of sessions now gone."""
    with _sessions_lock:
        return _session_of(where)


def begin_save(where: Place, save: object) -> Session:
    """Returns the session that a save goes into, which stays known until the save has ended."""
    with _sessions_lock:
        session = _session_of(where)
        session.begin(save)
        return session


def _session_of(where: Place) -> Session:
    known = _sessions.get(where.final)
    if known is not None and type(known.where) is not type(where) and known.is_idle:
        known.close()  # the one that is there now is kept by other rules
        del _sessions[where.final]
    if where.final not in _sessions:
        for final, other in list(_sessions.items()):
            if other.is_stale:
                other.close()
                del _sessions[final]
        _sessions[where.final] = Session(where)
    return _sessions[where.final]


def forget(session: Session, *, for_good: bool = False) -> None:
    """Forgets a session that was finalized; one that was aborted, with what is in flight."""
    session.close()
    with _sessions_lock:
        is_known = _sessions.get(session.where.final) is session
        if is_known and (session.is_idle or for_good):
            del _sessions[session.where.final]


def failed_parts(where: Place) -> frozenset[str]:
    """Names of the parts that failed saves of this process could not remove: they do not count."""
    session = _sessions.get(where.final)
    return frozenset() if session is None else session.not_removed


def _forget_all() -> None:
    """A forked child has none of its parent's threads: nothing of this is in flight there."""
    global _sessions_lock  # noqa: PLW0603 - a thread of the parent may hold it
    _sessions_lock = threading.Lock()
    _sessions.clear()


os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _report_unseen() -> None:
    """Logs the errors of saves that no call can raise any more."""
    for session in list(_sessions.values()):
        try:
            session.raise_unseen()
        except BaseException as error:  # noqa: BLE001 - of any kind that saves raise
            _LOG.error(
                "flax_partial: a save to %s failed: %s: %s",
                session.where.final,
                type(error).__name__,
                error,
            )
