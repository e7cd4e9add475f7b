"""A checkpoint on a file system whose locks do not hold between machines, or that has none.

A session is a directory, as everywhere, and is published by a rename. Who may save into it, and
what the checkpoint is made of, is shown by control files in it, `state/session/`, as in an object
store (`control_objects`). Each is made under another name and linked to its own: of two processes
that make one, one does.

A session's directory is never used for another one. A process that was stopped, and goes on when
its session is gone, finds nothing at the paths that it has, or a session of another name.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flax_partial.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    NoSessionError,
    StoreError,
)
from flax_partial.format.model import Part
from flax_partial.storage import control, files, parts, session_dir
from flax_partial.storage.control import ABORT, Listed
from flax_partial.storage.control_objects import CHANGING, ControlObjects, mark_of
from flax_partial.storage.direct_io import NewFile
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.local_place import LocalPart, LocalPlace
from flax_partial.storage.locks import DirectoryLock, open_directory
from flax_partial.storage.parts import SessionParts, is_of
from flax_partial.storage.paths import CONTENTS, STATE
from flax_partial.storage.place import Files, OpenSession
from flax_partial.storage.session_dir import CONTROL

_DESCRIPTORS = Path("/proc/self/fd")
_ATTEMPTS = 50  # at what others may change meanwhile
_PAUSE_SECS = 0.02
# What is answered of a directory that another process has just written to, or removed.
_BUSY = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY))


class UnlockedPlace(ControlObjects, LocalPlace):
    """Where a checkpoint is, or will be, on a file system without locks; see `Place`."""

    final: Path
    session: Path
    __setattr__ = object.__setattr__  # its base is frozen

    def __init__(self, final: Path, session: Path) -> None:
        LocalPlace.__init__(self, final, session)
        ControlObjects.__init__(self, DirectoryStore(session))
        self._one_at_a_time = threading.RLock()  # of this process ends a session
        self._directory: DirectoryLock | None = None  # of the session that it ends
        self._is_reading: tuple[int, int] | None = None  # the directory

    # Who and what.

    def _is_published(self) -> bool:
        return os.path.lexists(self.final)

    def _newest_opening(self, names: Collection[str]) -> str:
        """Finds it whatever is left of the session before, whose files go when it was dropped."""
        return control.newest(filter(control.is_opening, names))

    def _is_open(self, session: Listed) -> bool:
        """Whether a session is there: as the newest, or as one that has ended before that.

        One that neither holds for was begun late, by a process that slept: nothing shows it. And
        another directory numbers its sessions from 0, too.
        """
        if session.opening not in session.control:
            return False
        data = self.store.get(control.CONTROL + session.opening)
        if data is None or control.read(data).get("id") != session.id:
            return False
        is_newest = session.opening == self._newest_opening(session.control)
        return is_newest or self._decided(session.id, session.control)[1] is not None

    def _read_control(self, name: str) -> bytes | None:
        """Reads a control file, which a rename may have taken along."""
        name = f"{CONTROL}/{name}"
        return files.read(self.session / name) or files.read(self.final / name)

    def _begin(self, session: Listed) -> None:
        """Puts nothing: the directory of a session is never used for another one."""

    def no_session(self) -> NoSessionError:
        """The error for a session that is not there."""
        return LocalPlace.no_session(self)

    def require_absent(self) -> None:
        """Raises CheckpointExistsError if anything is at the final path."""
        LocalPlace.require_absent(self)

    def full_disk_explained(self, needed: Callable[[], int]) -> AbstractContextManager[None]:
        """Adds to the error of a full disk what is needed, in bytes, and what is free."""
        return LocalPlace.full_disk_explained(self, needed)

    # Saving.

    def look(self, known: OpenSession | None, *, is_busy: bool) -> OpenSession | None:
        """Looks for the session, also for a known one: another process may have ended it."""
        self.require_absent()
        if is_busy:
            return known
        self._require_ours()
        session = self._list_control()
        if session.id and session.verdict is None:
            return self._opened(session)
        self._require_dropped(session)
        return None

    def _require_ours(self) -> None:
        directory = session_dir.open_session(self)
        if directory is not None:
            directory.close()
            session_dir.check_is_ours(self)

    def enter(self, known: OpenSession | None) -> OpenSession:  # noqa: ARG002
        """Makes the session's directory if there is none, and opens a session in it."""
        for attempt in range(_ATTEMPTS):
            is_ours = session_dir.create_session(self)
            try:
                self.require_absent()
            except CheckpointExistsError:
                if is_ours:  # made for nothing: another process has finalized meanwhile
                    with contextlib.suppress(OSError):
                        os.rmdir(self.session)
                raise
            self._require_ours()
            try:
                return self._enter_at()
            except (FileNotFoundError, StoreError) as error:  # it was renamed away, or removed
                if isinstance(error, NoSessionError):
                    raise
            self._wait_until_removed(attempt)
        raise OSError(errno.EBUSY, f"It is busy: {CHANGING}", str(self.session))

    def _wait_until_removed(self, attempt: int) -> None:
        """Waits for the directory of a dropped session to go; removes it if no other one does."""
        found = self._list_control()
        if found.opening and not found.id:
            time.sleep(_PAUSE_SECS)
            if attempt >= _ATTEMPTS // 2:
                self._remove_closed(found.opening)

    def _enter_at(self) -> OpenSession:
        """Opens a session in the directory that is at the path now, and in no later one.

        Another one numbers its sessions anew: one that was opened in it by the number that follows
        the last of this one would hide that one's own.
        """
        directory = session_dir.open_session(self)
        if directory is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.session))
        with contextlib.closing(directory):
            inside = UnlockedPlace(self.final, self.session)
            inside._known, inside._to_drop = self._known, self._to_drop
            here = _DESCRIPTORS / str(directory.descriptor)
            if here.exists():  # on Linux: the directory itself, whatever its path is
                inside.store = DirectoryStore(here)
            return ControlObjects.enter(inside, None)

    def sync(self) -> None:
        """Makes a session's directories durable."""
        session_dir.sync_session(self)

    def is_gone(self, session: OpenSession) -> bool:
        """Whether it has ended, as far as this process has seen, or its directory is gone."""
        return ControlObjects.is_gone(self, session) or not session_dir.is_session(self)

    def create_part(self, name: str) -> "UnlockedPart":
        """Makes the directory of a part."""
        with self.gone_explained(name):
            return UnlockedPart(session_dir.create_part(self, name), self, name)

    @contextmanager
    def gone_explained(self, name: str) -> Iterator[None]:
        """Adds to the error of a missing directory how the session of a part ended."""
        try:
            yield
        except FileNotFoundError as error:
            if isinstance(error, NoSessionError):
                raise
            self._settle(name)
            raise

    def commit_by(self, name: str, put: Callable[[], None]) -> None:
        """Commits a part, and waits until it is certain that it counts."""
        self._known.tabled.add(name)
        with self.gone_explained(name):
            put()
        self._settle(name)

    def remove_part(self, name: str) -> None:
        """Withdraws a part; removes it only where no process can have decided that it counts."""
        if name not in self._known.tabled:
            session_dir.remove_part(self, name)
            return
        try:
            ControlObjects.remove_part(self, name)
        except FileNotFoundError:  # the session has ended: what was decided counts
            self._known.tabled.discard(name)

    # What there is of a session.

    def is_session(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        if not session_dir.is_session(self):
            return False
        # A process may have died before it opened one in the directory that it had made.
        return not self._control_names() or ControlObjects.is_session(self)

    def read_parts(
        self,
        *,
        process: int | None = None,
        known: Mapping[str, Part] | None = None,
        failed: Collection[str] = (),
    ) -> SessionParts:
        """Reads the tables of all parts of the session, or of those that a verdict names."""
        ending = self._ending
        found = ControlObjects.read_parts(self, process=process, known=known, failed=failed)
        if ending is not None and self._list_control().id != ending.id:
            raise self.no_session()  # another process has ended it
        if found.decided_ns is None:  # a part of which there is only the directory is torn, too
            seen = {*found.committed, *found.torn, *found.damaged}
            names = parts.part_names(self.state)
            own = names if process is None else [one for one in names if is_of(process, one)]
            found.torn.extend(name for name in own if name not in seen)
        return found

    # Ending it.

    @contextmanager
    def locked_exclusively(self, pause: Callable[[], None]) -> Iterator[None]:
        """Puts a fence: from here on saves wait for how this ends."""
        with self._one_at_a_time:
            directory = session_dir.open_session(self)
            if directory is None:
                raise self.no_session()
            with contextlib.closing(directory):
                self._directory, ending = directory, ""
                try:
                    session_dir.check_state(self)
                    if not self._control_names() and self._is_current():
                        self.enter(None)  # its directory was made by a process that then died
                    with ControlObjects.locked_exclusively(self, pause):
                        ending = self._ending.id if self._ending else ""
                        yield
                except FileNotFoundError as error:
                    is_there = isinstance(error, NoSessionError) or self._goes_on(ending)
                    if is_there and self._is_current():
                        raise
                    self._withdraw_fences(ending)
                    if isinstance(error, NoSessionError):
                        raise
                    raise self.no_session() from error
                finally:
                    self._directory = None

    def _goes_on(self, session: str) -> bool:
        """Whether a session is the newest, and not dropped: that removes what others have put."""
        found = self._list_control()
        if not session or found.id != session:
            return False
        return found.verdict is None or found.verdict.kind != ABORT

    def _withdraw_fences(self, session: str) -> None:
        """Removes what was put too late: into a directory that has come to the place of another."""
        names = files.listed(self.session / CONTROL)
        names = [name for name in names if name.startswith(f"{session}.closing.")]
        with contextlib.suppress(OSError):  # what stays does no harm
            self.store.delete([f"{CONTROL}/{name}" for name in names])
            os.rmdir(self.session)

    def _is_current(self) -> bool:
        """Whether the session that is being ended is the one at its path."""
        directory = self._directory
        return directory is not None and files.identity(self.session) == directory.identity

    def _lies_at(self, path: Path) -> bool:
        """Whether it is in a directory, by its control files: some FUSE renumbers what it renames.

        rclone does.
        """
        ending = self._ending
        data = files.read(path / CONTROL / ending.opening) if ending else None
        return ending is not None and data is not None and control.read(data).get("id") == ending.id

    def commit_checkpoint(
        self,
        *,
        root_files: Callable[[], Files],
        contents: bytes,
        torn: Sequence[str],  # noqa: ARG002
    ) -> None:
        """Writes the root files, which others may be writing, too, and renames the session."""
        assert self._directory is not None  # noqa: S101
        self._remove_others(self.state)
        named = [(name, list(pieces)) for name, pieces in root_files()]
        named.append((f"{STATE}/{CONTENTS}", [contents]))
        needed = sum(len(piece) for _, pieces in named for piece in pieces)
        try:
            with self.full_disk_explained(lambda: needed):
                session_dir.write_root_at(self._directory.descriptor, named, scratch=CONTROL)
            self._publish()
        except FileNotFoundError:
            if self._is_published():
                raise CheckpointExistsError(
                    f"{self.final} was finalized by another process meanwhile."
                ) from None
            raise
        # From here on no save finds the path of its part any more, except one that was about to
        # make that: it leaves an empty directory, which no verdict names.
        self._remove_others(self.final / STATE)

    def _publish(self) -> None:
        """Renames the session's directory, if it is the one at its path."""
        if not self._is_current():
            raise self.no_session()
        session_dir.publish(self)
        if not self._lies_at(self.final):
            files.rename_to_new(self.final, self.session)  # it was another one's after all
            raise self.no_session()

    def _remove_others(self, state: Path) -> None:
        """Removes the parts that do not count, and control files that are not needed any more.

        Only what was in this session's own directory: another one, whose parts no verdict of this
        session names, may be at the path by now.
        """
        assert self._ending is not None  # noqa: S101
        names = parts.part_names(state)
        listed = files.listed(state.parent / CONTROL) if state.parent == self.final else []
        _, verdict = self._decided(self._ending.id)
        if verdict is None or not self._lies_at(state.parent):
            return
        doomed = [state / name for name in names if name not in verdict.parts]
        doomed += [
            self.final / CONTROL / one
            for one in listed
            if not one.endswith(".open") and ".verdict" not in one
        ]
        for one in doomed:
            with contextlib.suppress(OSError):  # its save may just be writing, and fails
                files.remove_tree(one) if one.is_dir() else one.unlink()

    def remove_session(self) -> None:
        """Puts the verdict that the session is dropped, and removes it."""
        session_dir.check_is_ours(self)
        ControlObjects.remove_session(self)

    def _drop(self, session: str) -> None:
        """Removes what a dropped session holds, and its directory where no other one has begun.

        The one who has put the verdict removes that, in whose place it first opens a session of no
        name: of two that open the next one, one does. From then on none begins in the directory.
        """
        names = [name for name in parts.part_names(self.state) if mark_of(name) == session]
        found = self._list_control()
        if found.id != session:
            return
        # What was listed before is none of a session that has begun since.
        for name in names:
            with _busy_passed_over():
                session_dir.remove_part(self, name)
        if session in self._to_drop:
            closed = found.next_opening
            if self.store.put_new(control.CONTROL + closed, control.write({"id": ""})):
                self._remove_closed(closed)

    def _remove_closed(self, closed: str) -> None:
        """Removes the directory of a session in which none begins any more."""
        with contextlib.suppress(FileNotFoundError):  # another process has just done so
            doomed = files.rename_away(self.session)
            if (doomed / CONTROL / closed).exists():
                files.remove_renamed(self.session, doomed)
            else:
                files.rename_to_new(doomed, self.session)  # it had come to the place of that one

    # The finalized checkpoint.

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises NoSessionError where reading fails because it was removed meanwhile."""
        held = None
        with contextlib.suppress(OSError):  # reading it raises what is wrong
            held = open_directory(self.final, follow=True)  # so that its inode is not used again
        self._is_reading = _identity(self.final)
        try:
            with LocalPlace.reading(self):
                yield
        except (CorruptCheckpointError, FileNotFoundError) as error:
            if not isinstance(error, NoSessionError):
                self.require_unremoved()
            raise
        finally:
            if held is not None:
                held.close()

    def require_unremoved(self) -> None:
        """Raises NoSessionError where another directory is at the path by now, or none."""
        now = _identity(self.final)
        if now is None or self._is_reading not in {None, now}:
            raise NoSessionError(f"{self.final} was removed while it was read.")

    def read_own_parts(self, *, process: int | None = None) -> SessionParts:
        """Reads the tables of the parts of the finalized checkpoint."""
        found = LocalPlace.read_own_parts(self, process=process)
        names = files.listed(self.final / CONTROL)
        sessions = {name.partition(".verdict")[0] for name in names if ".verdict" in name}
        ended = [self._decided(session)[1] for session in sessions]
        kept = {name for verdict in ended if verdict for name in verdict.parts}
        if not kept:  # it was finalized under locks: all parts in it count
            return found
        return SessionParts(
            {name: part for name, part in found.committed.items() if name in kept},
            [name for name in found.torn if name in kept],
            {name: why for name, why in found.damaged.items() if name in kept},
        )


@dataclass(frozen=True, slots=True)
class UnlockedPart(LocalPart):
    """A part that is being written into its directory, in a session that others may end.

    Attributes:
      place: Of the session.
      name: The part's.
    """

    place: UnlockedPlace
    name: str

    def new_file(
        self, file: int, *, expected_bytes: int, durable: bool, check: Callable[[], None]
    ) -> NewFile:
        """Creates a data file."""
        how: Any = {"expected_bytes": expected_bytes, "durable": durable, "check": check}
        with self.place.gone_explained(self.name):
            return LocalPart.new_file(self, file, **how)

    def commit(self, table: bytes, *, has_data_file: bool, durable: bool) -> None:
        """Renames the table to its name, and waits until it is certain that the part counts."""
        commit = partial(session_dir.commit_part, self.directory, table)
        self.place.commit_by(
            self.name, partial(commit, has_data_file=has_data_file, durable=durable)
        )


@contextmanager
def _busy_passed_over() -> Iterator[None]:
    """Leaves what another process is just writing to, or has removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _BUSY:
            raise


def _identity(directory: Path) -> tuple[int, int] | None:
    """Device and inode of a directory, through links; None where there is none."""
    try:
        status = os.stat(directory)
    except OSError:
        return None
    return status.st_dev, status.st_ino
