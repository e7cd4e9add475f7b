"""A session that is kept by control objects, in an object store or without locks in a directory.

`object_place` has the rules, and `control` the names of the objects.
"""

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

from flax_partial.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    NoSessionError,
    StoreError,
)
from flax_partial.format.merge import Source
from flax_partial.format.model import Part
from flax_partial.format.tables import decode_part
from flax_partial.storage import control, object_removal
from flax_partial.storage.control import ABORT, CONTROL, FINALIZE, MARK, VOID, Listed, Verdict
from flax_partial.storage.object_data import StorePart, do_all, together
from flax_partial.storage.parts import SessionParts, decoded, is_of, oldest_first, own_name
from flax_partial.storage.paths import PART_PREFIX, PART_TABLE, STATE
from flax_partial.storage.place import NewPart, OpenSession
from flax_partial.storage.store import Entry, Store
from flax_partial.storage.store_path import AnyPath

_ATTEMPTS = 50  # at what others may change meanwhile, such as who opens the next session
CHANGING = (
    f"in each of {_ATTEMPTS} tries another process had just begun, finalized or dropped a session; "
    "nothing was changed by this call. Call again when those processes are done; jobs that do not "
    "belong together need paths of their own"
)
_PATIENCE_SECS = 30.0  # of a save, with a process that has begun to end the session
_LONGEST_PAUSE_SECS = 0.5
_MARK_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that this process saves into; see `OpenSession`.

    Attributes:
      opening: Name of the control object that it was opened by.
      mark: Its name, with which the names of its parts begin.
      is_new: Whether this process has made it.
    """

    opening: str
    mark: str
    is_new: bool = False

    def release(self) -> None:
        """Nothing is locked."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class _Known:
    """What this process has read of the objects at a place; never wrong, since none is changed.

    Attributes:
      parts: Tables of the parts that it has written or read, by name.
      sizes: Sizes of objects, by key.
      tabled: Names of parts whose table it has put, or may have.
      opened: The sessions that it saves, or has saved, into, by their marks.
      ended: The marks of those that were finalized or dropped.
      sources: Of the finalized checkpoint, where the chunks of each leaf lie, by its name.
      rounds: How many rounds of a session are known to have ended nothing.
      vacant: The listing by which there was no session to save into; used once.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    tabled: set[str] = field(default_factory=set)
    opened: dict[str, Opened] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    sources: dict[str, Sequence[Source]] | None = None
    rounds: dict[str, int] = field(default_factory=dict)
    vacant: Listed | None = None


class ControlObjects:
    """A session that is kept by control objects in a store; see the module.

    Attributes:
      final: The finalized checkpoint.
      session: Where the unfinished one lies.
      store: The store whose root that is.
    """

    final: AnyPath
    session: AnyPath

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known = _Known()
        self._ending: Listed | None = None
        self._fence = ""  # the last one that this one has put
        self._to_drop: set[str] = set()  # sessions of which this one has put that they are dropped

    # Who and what.

    def _list_control(self) -> Listed:
        """Lists the control objects, and finds the newest session: two requests, or one."""
        for _ in range(_ATTEMPTS):
            found = self._session_among(self._control_names())
            if found is not None:
                return found
        raise StoreError(f"{self.final} is busy: {CHANGING}")

    def _control_names(self) -> frozenset[str]:
        return control.names_of(self.store.list(CONTROL))

    def _session_among(self, names: frozenset[str]) -> Listed | None:
        """Finds the newest session; None where what was listed is gone by now."""
        opening = self._newest_opening(names)
        if not opening or control.removed_session(names):
            return Listed("", "", names)
        data = self.store.get(CONTROL + opening)
        return None if data is None else self._listed(opening, _id_in(data), names)

    def _newest_opening(self, names: Collection[str]) -> str:
        return control.newest_opening(names)

    def _listed(self, opening: str, session: str, names: frozenset[str]) -> Listed | None:
        """Adds to a session that was listed how it ended; None where its verdict is gone by now."""
        number, verdict = self._decided(session, names)
        is_gone = verdict is None and control.verdict_name(session, number) in names
        return None if is_gone else Listed(opening, session, names, number, verdict)

    def _decided(
        self, session: str, names: Collection[str] | None = None
    ) -> tuple[int, Verdict | None]:
        """Finds the round that a session is in, and its verdict; None where there is none.

        Args:
          session: Its name.
          names: Those that were listed: others are not asked for. None: whatever is there.
        """
        number = self._known.rounds.get(session, 0)
        while names is None or control.verdict_name(session, number) in names:
            verdict = self._read_verdict(session, number)
            if verdict is None or verdict.kind != VOID:
                return number, verdict
            number += 1
            self._known.rounds[session] = number
        return number, None

    def _read_verdict(self, session: str, number: int) -> Verdict | None:
        data = self._read_control(control.verdict_name(session, number))
        return None if data is None else control.read_verdict(data)

    def _read_control(self, name: str) -> bytes | None:
        return self.store.get(CONTROL + name)

    def _is_published(self) -> bool:
        """Whether a checkpoint is there, and not only a mark that was put when it was removed."""
        if self.store.size(MARK) is None:
            return False
        mark = self.store.get(MARK)
        return mark is not None and self._is_of_checkpoint(mark)

    def _is_of_checkpoint(self, mark: bytes) -> bool:
        session = control.session_of(mark)
        return not session or control.lives(session, self._control_names())

    def _is_open(self, session: Listed) -> bool:
        """Whether a session is there, by a listing, whose names it has."""
        names = session.control
        if not (control.lives(session.id, names) and control.counts(session.opening, names)):
            return False
        if not control.strangers(session.id, names):
            return True
        data = self.store.get(CONTROL + session.opening)  # which another one may have put by now
        return data is not None and _id_in(data) == session.id

    def _put_verdict(self, wanted: Verdict) -> Verdict:
        """Puts a verdict, if there is none; returns the one that counts.

        Where that ends nothing, since a save has waited for too long, the next round begins.

        Raises:
          NoSessionError: The whole checkpoint was removed while this process slept.
        """
        session = self._ending
        assert session is not None  # noqa: S101
        key = CONTROL + control.verdict_name(session.id, session.round)
        if self.store.put_new(key, control.write_verdict(wanted, by=uuid.uuid4().hex)):
            if not self._is_open(session._replace(control=self._control_names())):
                self.store.delete([key])
                raise self.no_session()
            if wanted.kind == ABORT:
                self._to_drop.add(session.id)
            return wanted
        found = self._read_verdict(session.id, session.round)
        if found is None:
            raise self.no_session()
        if found.kind == VOID:
            self._ending = session._replace(round=session.round + 1)
            self._put_fence()
        return found

    def _put_fence(self) -> None:
        """Has saves wait for how the session ends that this process is ending."""
        session = self._ending
        assert session is not None  # noqa: S101
        fence = f"{CONTROL}{session.id}.closing.{session.round}.{uuid.uuid4().hex}"
        self._fence = fence
        self.store.put(fence, [control.write({"at": time.time()})])

    # Saving.

    def look(self, known: OpenSession | None, *, is_busy: bool) -> OpenSession | None:
        """Looks for the session; sends no request where one is known."""
        if is_busy or (known is not None and known.mark not in self._known.ended):
            return known
        session, is_published = together(self._list_control, self._is_published)
        if is_published:
            raise self._exists()
        if session.id and session.verdict is None:
            return self._opened(session)
        self._require_dropped(session)
        self._known.vacant = session
        return None

    def _opened(self, session: Listed) -> Opened:
        self._begin(session)
        return self._known.opened.setdefault(session.id, Opened(session.opening, session.id))

    def _begin(self, session: Listed) -> None:
        """Puts the object that shows a session in listings, unless it is there."""
        begun = control.begun_name(session.id)
        if begun not in session.control:
            self.store.put(CONTROL + begun, [b"{}"])

    def enter(self, known: OpenSession | None) -> OpenSession:
        """Opens a session if there is none."""
        if known is not None and known.mark not in self._known.ended:
            return known
        vacant, self._known.vacant = self._known.vacant, None
        mark = uuid.uuid4().hex[:_MARK_LENGTH]
        for _ in range(_ATTEMPTS):
            session, vacant = vacant or self._list_control_unpublished(), None
            if session.id and session.verdict is None:
                return self._opened(session)
            removed = control.removed_session(session.control)
            if removed:
                object_removal.finish(self.store, removed)
                continue
            self._require_dropped(session)
            if session.id:
                self._drop(session.id)
            opening = session.next_opening
            self._begin(Listed(opening, mark, frozenset()))
            if self.store.put_new(CONTROL + opening, control.write({"id": mark})):
                self.store.require_conditions(CONTROL + opening)
                return self._known.opened.setdefault(mark, Opened(opening, mark, is_new=True))
            self.store.delete([CONTROL + control.begun_name(mark)])
        raise StoreError(f"{self.final} is busy: {CHANGING}")

    def _list_control_unpublished(self) -> Listed:
        session = self._list_control()
        self.require_absent()
        return session

    def _require_dropped(self, session: Listed) -> None:
        """Raises CheckpointExistsError if the session that ended last was not dropped."""
        if session.verdict is not None and session.verdict.kind == FINALIZE:
            raise CheckpointExistsError(
                f"{self.final} is being finalized. If its process has ended, call finalize "
                "again, which completes it."
            )

    def prepare(self) -> None:
        """There is nothing to make."""

    def sync(self) -> None:
        """Every put is durable when it returns."""

    def is_gone(self, session: OpenSession) -> bool:
        """Whether it has ended, as far as this process has seen."""
        return session.mark in self._known.ended

    def create_part(self, name: str) -> NewPart:
        """Begins a part."""
        return StorePart(self.store, name, partial(self.commit_part, name))

    def commit_part(self, name: str, table: bytes) -> None:
        """Puts a part's table, and waits until it is certain that it counts."""
        self._known.tabled.add(name)
        self.store.put(f"{STATE}/{name}/{PART_TABLE}", [table])
        self._settle(name)
        self._known.parts[name] = decode_part(table, where=name)

    def _settle(self, name: str) -> None:
        """Returns once a part counts: the session is not being ended, or its verdict has the part.

        It has to be the last thing that a save does, after its table is there. Where the round has
        ended without a verdict since then, what ends the session later lists that table: it counts.
        """
        mark = mark_of(name)
        opening = self._known.opened[mark].opening
        deadline = time.monotonic() + _PATIENCE_SECS
        pause, first = 0.01, None
        while True:
            session = Listed(opening, mark, self._control_names())
            is_there = self._is_open(session)
            if is_there:
                listed = self._listed(*session[:3])
                if listed is None:
                    continue
                session = listed
                first = session.round if first is None else first
                if not session.verdict and (session.round > first or not session.is_closing):
                    return
            verdict = session.verdict if is_there else self._decided(mark)[1]
            if verdict is not None and name in verdict.parts:
                return
            if verdict is not None or not is_there:
                self._known.ended.add(mark)
                self._known.tabled.discard(name)  # it may be deleted, since it does not count
                if verdict is not None and verdict.kind == FINALIZE:
                    raise CheckpointExistsError(
                        f"{self.final} was finalized before this part was written."
                    )
                self._delete_late(session)
                raise NoSessionError(
                    f"The session of {self.final} was aborted before this part was written."
                )
            if time.monotonic() > deadline:  # its process has died: it ends nothing in this round
                end = control.write_verdict(Verdict(VOID), by=uuid.uuid4().hex)
                with suppress(FileNotFoundError):  # its directory may be renamed just now
                    self.store.put_new(CONTROL + control.verdict_name(mark, session.round), end)
                continue
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECS)

    def _delete_late(self, session: Listed) -> None:
        """Deletes what has opened a session too late, into a place that has another one by now."""
        is_removed = bool(control.removed_session(session.control))  # which deletes it, too
        if (
            control.session_before(session.opening)
            and not is_removed
            and not self._is_open(session)
        ):
            late = (session.opening, control.begun_name(session.id))
            self.store.delete([f"{CONTROL}{name}" for name in late])

    def remove_part(self, name: str) -> None:
        """Withdraws a part; deletes it only where no process can have decided that it counts."""
        if name in self._known.tabled:
            self.store.put(f"{CONTROL}{mark_of(name)}.withdrawn.{own_name(name)}", [b"{}"])
            self._known.tabled.discard(name)
        else:
            entries = self.store.list(f"{STATE}/{name}/")
            self.store.delete([entry.key for entry in entries])

    def may_have_table(self, name: str) -> bool:
        """Whether a part could not be withdrawn."""
        return name in self._known.tabled

    def full_disk_explained(
        self,
        needed: Callable[[], int],  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """A bucket is never full."""
        return nullcontext()

    # What there is of a session.

    def is_session(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        session, is_published = together(self._list_control, self._is_published)
        is_dropped = session.verdict is not None and session.verdict.kind == ABORT
        return bool(session.id) and not is_published and not is_dropped

    def no_session(self) -> NoSessionError:
        """The error for a session that is not there."""
        if self._is_published():
            return NoSessionError(f"No unfinished checkpoint: {self.final} is finalized already.")
        return NoSessionError(f"No unfinished checkpoint at {self.final}. Save something first.")

    def read_parts(
        self,
        *,
        process: int | None = None,
        known: Mapping[str, Part] | None = None,
        failed: Collection[str] = (),
    ) -> SessionParts:
        """Reads the tables of all parts of the session, or of those that a verdict names."""
        entries = self.store.list(f"{STATE}/")
        session = self._session_among(control.names_of(entries))
        if session is None or not session.id:
            return SessionParts()
        self._known.sizes.update(entries)
        keys = {entry.key for entry in entries}
        verdict = session.verdict
        if verdict is not None and verdict.kind == FINALIZE:
            return self._read(verdict.parts, known, decided_ns=verdict.committed_ns)
        prefix = f"{session.id}.withdrawn."
        withdrawn = {name.removeprefix(prefix) for name in session.control}
        names = [
            name
            for name in _part_names(entries)
            if mark_of(name) == session.id and (process is None or is_of(process, name))
        ]
        torn = [
            name
            for name in names
            if name in failed
            or own_name(name) in withdrawn
            or f"{STATE}/{name}/{PART_TABLE}" not in keys
        ]
        found = self._read([name for name in names if name not in torn], known)
        found.torn.extend(torn)
        return found

    def _read(
        self,
        names: Sequence[str],
        known: Mapping[str, Part] | None,
        *,
        decided_ns: int | None = None,
    ) -> SessionParts:
        """Reads the tables of some parts, many at a time."""
        found = SessionParts(decided_ns=decided_ns)
        have = {**self._known.parts, **(known or {})}
        reads = [partial(self._read_part, name) for name in names if name not in have]
        read = dict(zip([name for name in names if name not in have], do_all(reads), strict=True))
        for name in oldest_first(names):
            part = have.get(name) or read[name]
            if part is None:
                found.torn.append(name)
            elif isinstance(part, CorruptCheckpointError):
                found.damaged[name] = str(part)
            else:
                found.committed[name] = self._known.parts[name] = part
        return found

    def _read_part(self, name: str) -> Part | CorruptCheckpointError | None:
        key = f"{STATE}/{name}/{PART_TABLE}"
        data = self.store.get(key)
        try:
            return None if data is None else decoded(data, name, where=f"{self.final}/{key}")
        except CorruptCheckpointError as error:
            return error

    def size_of_data(self, path: str) -> int:
        """Size of a data file, as it was listed with the parts; 0 where there is none."""
        return self._known.sizes.get(f"{STATE}/{path}", 0)

    # Ending it.

    def require_absent(self) -> None:
        """Raises CheckpointExistsError if the checkpoint is there."""
        if self._is_published():
            raise self._exists()

    def _exists(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            f"{self.final} exists already, finalized. Use another path, or remove it first."
        )

    @contextmanager
    def locked_exclusively(self, pause: Callable[[], None]) -> Iterator[None]:  # noqa: ARG002
        """Puts a fence: from here on saves wait for how this ends."""
        session = self._list_control()
        if not session.id or self._is_published():
            raise self.no_session()
        is_decided = session.verdict is not None
        if session.verdict is not None and session.verdict.kind == ABORT:
            self._drop(session.id)  # which another process has begun
            raise self.no_session()
        self._begin(session)
        self._ending = session
        try:
            if not is_decided:
                self._put_fence()
                self.store.require_conditions(self._fence)
            yield
        except Exception as error:
            if not is_decided and self._decided(session.id)[1] is None:
                self.store.delete([self._fence])  # saves go on
            if isinstance(error, CorruptCheckpointError):
                self._require_undecided(session, error)
            raise
        finally:
            self._ending = None

    def _require_undecided(self, session: Listed, cause: Exception) -> None:
        """Says that another process has ended a session, where what was read of it is deleted.

        Raises:
          CheckpointExistsError: It is finalized.
          NoSessionError: It was dropped, or the checkpoint was removed.
        """
        if self._is_published():
            raise self._exists() from cause
        _, verdict = self._decided(session.id)
        is_there = self._is_open(session._replace(control=self._control_names()))
        if not is_there or (verdict is not None and verdict.kind == ABORT):
            raise self.no_session() from cause

    def decide(self, parts: Collection[str], *, committed_ns: int) -> int | None:
        """Puts the verdict."""
        wanted = Verdict(FINALIZE, tuple(sorted(parts)), committed_ns)
        found = self._put_verdict(wanted)
        if found.kind == ABORT:
            assert self._ending is not None  # noqa: S101
            self._drop(self._ending.id)
            raise self.no_session()
        return committed_ns if found is wanted else None

    def remove_session(self) -> None:
        """Puts the verdict that the session is dropped, and deletes its parts."""
        assert self._ending is not None  # noqa: S101
        found = Verdict(VOID)
        while found.kind == VOID:
            found = self._put_verdict(Verdict(ABORT))
        if found.kind == FINALIZE:
            raise CheckpointExistsError(
                f"{self.final} is finalized, or about to be: call finalize again, and remove it."
            )
        self._drop(self._ending.id)

    def _drop(self, session: str) -> None:
        """Deletes what a dropped session holds; its control objects stay."""
        doomed = [
            entry.key
            for entry in self.store.list(f"{STATE}/")
            if (name := part_of(entry.key)) and mark_of(name) == session
        ]
        self.store.delete(doomed)


def mark_of(name: str) -> str:
    """The session that a part is of, by its name; empty where sessions are locked."""
    unique = own_name(name).rpartition(".")[2]
    return unique[:_MARK_LENGTH] if len(unique) > _MARK_LENGTH else ""


def _part_names(entries: Iterable[Entry]) -> list[str]:
    return oldest_first({name for entry in entries if (name := part_of(entry.key))})


def part_of(key: str) -> str:
    """The name of the part that an object is of; empty for what is of none."""
    segments = key.removeprefix(f"{STATE}/").split("/")[:-1]
    for depth in (1, 2):
        if segments[depth - 1 : depth] and segments[depth - 1].startswith(PART_PREFIX):
            return "/".join(segments[:depth])
    return ""


def _id_in(data: bytes) -> str:
    """The session that an object which opened it names."""
    return str(control.read(data).get("id"))
