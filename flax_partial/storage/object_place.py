"""A checkpoint in an object store: nothing is locked or renamed, and one conditional put decides.

A session lies where the checkpoint will be. Below `state/session/` are its control objects, each of
which is put once, and whose names are never used again until the checkpoint is removed:

    <n>.open               {"id": SESSION}: a session begins; the one with the largest n counts
    SESSION.closing.TOKEN  a process is about to end it: a save that sees one waits for the verdict
    SESSION.withdrawn.PART the save of that part has failed: it does not count
    SESSION.verdict        the parts that the checkpoint is made of, or that the session is dropped

Each step puts something and then looks for what others have put, so that of two at least one sees
the other. A save puts its data, its table `part.json`, and then lists the control objects: no
process is ending the session, or it waits for the verdict and returns that. Finalize puts
`closing`, then lists the parts, checks them, puts the verdict if there is none, derives the root
files from the verdict's parts alone, and puts `commit_success.txt`, if there is none, last. Any
number may finalize at once: they write the same bytes. One that died is completed by the next.

Readers lock nothing. Who removes a checkpoint deletes `commit_success.txt` first.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flax_partial.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    NoSessionError,
    StoreError,
)
from flax_partial.format.digests import digest
from flax_partial.format.merge import Source, merge
from flax_partial.format.model import Contents, Part, Region
from flax_partial.format.tables import decode_contents, decode_part
from flax_partial.storage import object_data
from flax_partial.storage.object_data import StoreDataFiles, StorePart, do_all
from flax_partial.storage.parts import SessionParts, decoded, is_of, oldest_first, own_name
from flax_partial.storage.paths import CONTENTS, PART_PREFIX, PART_TABLE, STATE
from flax_partial.storage.place import Files, NewPart, OpenSession
from flax_partial.storage.store import Entry, Store
from flax_partial.storage.store_path import AnyPath, StorePath

T = TypeVar("T")

MARK = "commit_success.txt"
_CONTROL = f"{STATE}/session/"
_CONTENTS = f"{STATE}/{CONTENTS}"
ABORT, _FINALIZE = "abort", "finalize"
_ATTEMPTS = 50  # at what others may change meanwhile, such as who opens the next session
_PATIENCE_SECS = 30.0  # of a save, for the verdict of who has begun to end the session
_LONGEST_PAUSE_SECS = 0.5
_MARK_LENGTH = 12


class Listed(NamedTuple):
    """A session as it was listed.

    Attributes:
      number: Which of the place's sessions it is.
      id: Its name; empty where there is none.
      control: Names of the control objects.
    """

    number: int
    id: str
    control: frozenset[str]

    @property
    def has_verdict(self) -> bool:
        """Whether it is decided how it ends."""
        return f"{self.id}.verdict" in self.control

    @property
    def is_closing(self) -> bool:
        """Whether a process is about to end it."""
        return any(name.startswith(f"{self.id}.closing.") for name in self.control)


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that this process saves into; see `OpenSession`.

    Attributes:
      number: Which of the place's sessions it is.
      mark: Its name, with which the names of its parts begin.
      is_new: Whether this process has made it.
    """

    number: int
    mark: str
    is_new: bool = False

    def release(self) -> None:
        """Nothing is locked."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a session ended."""

    kind: str
    parts: tuple[str, ...] = ()
    committed_ns: int = 0


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
      vacant: The listing by which there was no session to save into; used once.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    tabled: set[str] = field(default_factory=set)
    opened: dict[str, Opened] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    sources: dict[str, Sequence[Source]] | None = None
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
        self._to_drop: set[str] = set()  # sessions of which this one has put that they are dropped

    # Who and what.

    def _list_control(self) -> Listed:
        """Lists the control objects, and finds the newest session: two requests, or one."""
        for _ in range(_ATTEMPTS):
            found = self._session_among(self._control_names())
            if found is not None:
                return found
        raise StoreError(f"{self.final}: its sessions change all the time")

    def _control_names(self) -> frozenset[str]:
        return _names_of_control(self.store.list(_CONTROL))

    def _session_among(self, control: frozenset[str]) -> Listed | None:
        """Finds the newest session; None where it is being removed."""
        numbers = [int(name.removesuffix(".open")) for name in control if name.endswith(".open")]
        if not numbers:
            return Listed(-1, "", control)
        opening = self.store.get(f"{_CONTROL}{max(numbers)}.open")
        return None if opening is None else Listed(max(numbers), _read(opening)["id"], control)

    def _is_published(self) -> bool:
        return self.store.size(MARK) is not None

    def _is_open(self, session: Listed) -> bool:
        """Whether a session that was listed is there, by a newer listing."""
        return f"{session.number}.open" in session.control

    def _read_verdict(self, session: str) -> bytes | None:
        return self.store.get(f"{_CONTROL}{session}.verdict")

    def _verdict(self, session: str) -> Verdict | None:
        data = self._read_verdict(session)
        if data is None:
            return None
        read = _read(data)
        return Verdict(read["kind"], tuple(read.get("parts", ())), read.get("committed_ns", 0))

    def _put_verdict(self, session: Listed, verdict: Verdict) -> Verdict:
        """Puts a verdict if there is none; returns the one that counts.

        Raises:
          NoSessionError: The whole checkpoint was removed while this process slept.
        """
        key = f"{_CONTROL}{session.id}.verdict"
        value = {"kind": verdict.kind, "parts": verdict.parts, "committed_ns": verdict.committed_ns}
        if self.store.put_new(key, _write(value | {"by": uuid.uuid4().hex})):
            if not self._is_open(session._replace(control=self._control_names())):
                self.store.delete([key])
                raise self.no_session()
            if verdict.kind == ABORT:
                self._to_drop.add(session.id)
            return verdict
        found = self._verdict(session.id)
        if found is None:
            raise self.no_session()
        return found

    def _require_conditions(self, key: str) -> None:
        """Finds out a server that ignores conditions: it replaces what is there.

        Raises:
          StoreError: It does.
        """
        if self.store.server in _tried:
            return
        if self.store.put_new(key, _write({"by": uuid.uuid4().hex})):
            self.store.delete([key])
            raise StoreError(
                f"{self.final}: the server ignores {self.store.condition!r}, by which an object "
                "is put only if there is none. Without that nothing can be committed safely: use a "
                "server that honours it."
            )
        _tried.add(self.store.server)

    # Saving.

    def look(self, known: OpenSession | None, *, is_busy: bool) -> OpenSession | None:
        """Looks for the session; sends no request where one is known."""
        if is_busy or (known is not None and known.mark not in self._known.ended):
            return known
        session, is_published = _together(self._list_control, self._is_published)
        if is_published:
            raise self._exists()
        if session.id and not session.has_verdict:
            return self._opened(session.number, session.id)
        if session.id:
            self._require_dropped(session)
        self._known.vacant = session
        return None

    def _opened(self, number: int, mark: str) -> Opened:
        return self._known.opened.setdefault(mark, Opened(number, mark))

    def enter(self, known: OpenSession | None) -> OpenSession:
        """Opens a session if there is none."""
        if known is not None and known.mark not in self._known.ended:
            return known
        vacant, self._known.vacant = self._known.vacant, None
        for _ in range(_ATTEMPTS):
            session, vacant = vacant or self._list_control_unpublished(), None
            if session.id and not session.has_verdict:
                return self._opened(session.number, session.id)
            if session.id:
                self._require_dropped(session)
                self._drop(session.id)
            number, mark = session.number + 1, uuid.uuid4().hex[:_MARK_LENGTH]
            key = f"{_CONTROL}{number}.open"
            if self.store.put_new(key, _write({"id": mark})):
                self._require_conditions(key)
                return self._known.opened.setdefault(mark, Opened(number, mark, is_new=True))
        raise StoreError(f"{self.final}: its sessions change all the time")

    def _list_control_unpublished(self) -> Listed:
        session = self._list_control()
        self.require_absent()
        return session

    def _require_dropped(self, session: Listed) -> None:
        """Raises CheckpointExistsError if the session that ended last was not dropped."""
        verdict = self._verdict(session.id)
        if verdict is not None and verdict.kind == _FINALIZE:
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

        It has to be the last thing that a save does, after its table is there.
        """
        mark = mark_of(name)
        number = self._known.opened[mark].number
        deadline = time.monotonic() + _PATIENCE_SECS
        pause = 0.01
        while True:
            session = Listed(number, mark, self._control_names())
            is_there = self._is_open(session)
            if is_there and not session.has_verdict and not session.is_closing:
                return
            verdict = self._verdict(mark)
            if verdict is not None and name in verdict.parts:
                return
            if verdict is not None or not is_there:
                self._known.ended.add(mark)
                self._known.tabled.discard(name)  # it may be deleted, since it does not count
                if verdict is not None and verdict.kind == _FINALIZE:
                    raise CheckpointExistsError(
                        f"{self.final} was finalized before this part was written."
                    )
                raise NoSessionError(
                    f"The session of {self.final} was aborted before this part was written."
                )
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.final}: a finalize has begun and does not end. If its process has "
                    "ended, call finalize again, or abort; then save this part again."
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECS)

    def remove_part(self, name: str) -> None:
        """Withdraws a part; deletes it only where no process can have decided that it counts."""
        if name in self._known.tabled:
            self.store.put(f"{_CONTROL}{mark_of(name)}.withdrawn.{own_name(name)}", [b"{}"])
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
        session, is_published = _together(self._list_control, self._is_published)
        if not session.id or is_published:
            return False
        verdict = self._verdict(session.id) if session.has_verdict else None
        return verdict is None or verdict.kind == _FINALIZE

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
        session = self._session_among(_names_of_control(entries))
        if session is None or not session.id:
            return SessionParts()
        self._known.sizes.update(entries)
        keys = {entry.key for entry in entries}
        verdict = self._verdict(session.id) if session.has_verdict else None
        if verdict is not None and verdict.kind == _FINALIZE:
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

    def read_own_parts(self, *, process: int | None = None) -> SessionParts:
        """Reads the tables of the parts of the finalized checkpoint."""
        mark = self.store.get(MARK)
        verdict = self._verdict(_read(mark)["session"]) if mark else None
        parts = () if verdict is None else verdict.parts
        return self._read([one for one in parts if process is None or is_of(process, one)], None)

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
        if session.has_verdict:
            verdict = self._verdict(session.id)
            if verdict is None or verdict.kind == ABORT:
                self._drop(session.id)  # which another process has begun
                raise self.no_session()
        fence = f"{_CONTROL}{session.id}.closing.{uuid.uuid4().hex}"
        if not session.has_verdict:
            self.store.put_new(fence, _write({"at": time.time()}))
        self._ending = session
        try:
            if not session.has_verdict:
                self._require_conditions(fence)
            yield
        except Exception as error:
            if not session.has_verdict and self._verdict(session.id) is None:
                self.store.delete([fence])  # saves go on
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
        verdict = self._verdict(session.id)
        is_there = self._is_open(session._replace(control=self._control_names()))
        if not is_there or (verdict is not None and verdict.kind == ABORT):
            raise self.no_session() from cause

    def decide(self, parts: Collection[str], *, committed_ns: int) -> int | None:
        """Puts the verdict."""
        assert self._ending is not None  # noqa: S101
        wanted = Verdict(_FINALIZE, tuple(sorted(parts)), committed_ns)
        found = self._put_verdict(self._ending, wanted)
        if found.kind == ABORT:
            self._drop(self._ending.id)
            raise self.no_session()
        return committed_ns if found is wanted else None

    def commit_checkpoint(
        self,
        *,
        root_files: Callable[[], Files],
        contents: bytes,
        torn: Sequence[str],  # noqa: ARG002
    ) -> None:
        """Puts what is derived, and then the one object by which readers find the checkpoint."""
        assert self._ending is not None  # noqa: S101
        session = self._ending.id
        named = [(name, list(pieces)) for name, pieces in root_files() if name != MARK]
        named.append((_CONTENTS, [contents]))
        do_all([partial(self.store.put, name, pieces) for name, pieces in named])
        mark = {"flax_partial": 1, "session": session, "contents": digest(contents)}
        is_mine = self.store.put_new(MARK, _write(mark | {"by": uuid.uuid4().hex}))
        entries = self.store.list(f"{STATE}/")
        if f"{_CONTROL}{session}.verdict" not in {entry.key for entry in entries}:
            self.store.delete([MARK] if is_mine else [])  # removed while this process slept
            raise self.no_session()
        if not is_mine:
            raise CheckpointExistsError(f"{self.final} was finalized by another process meanwhile.")
        self._sweep(session, entries)

    def _sweep(self, session: str, entries: Sequence[Entry]) -> None:
        """Deletes what does not count; the verdict stays, for who still sleeps."""
        verdict = self._verdict(session)
        kept = set(verdict.parts) if verdict else set()
        if not kept:
            return
        doomed = [
            entry.key
            for entry in entries
            if ((name := _part_of(entry.key)) and name not in kept)
            or entry.key.startswith(f"{_CONTROL}{session}.closing.")
            or ".withdrawn." in entry.key.removeprefix(_CONTROL).partition("/")[0]
        ]
        self.store.delete(doomed)

    def remove_session(self) -> None:
        """Puts the verdict that the session is dropped, and deletes its parts."""
        assert self._ending is not None  # noqa: S101
        found = self._put_verdict(self._ending, Verdict(ABORT))
        if found.kind == _FINALIZE:
            raise CheckpointExistsError(
                f"{self.final} is finalized, or about to be: call finalize again, and remove it."
            )
        self._drop(self._ending.id)

    def _drop(self, session: str) -> None:
        """Deletes what a dropped session holds; its control objects stay."""
        doomed = [
            entry.key
            for entry in self.store.list(f"{STATE}/")
            if (name := _part_of(entry.key)) and mark_of(name) == session
        ]
        self.store.delete(doomed)


class StorePlace(ControlObjects):
    """Where a checkpoint is, or will be, in an object store; see `Place`."""

    def __init__(self, final: StorePath) -> None:
        super().__init__(final.store)
        self.final = self.session = final

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePlace) and self.final == other.final

    def __hash__(self) -> int:
        return hash(self.final)

    # The finalized checkpoint.

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises NoSessionError where reading fails because it was removed meanwhile."""
        try:
            yield
        except (CorruptCheckpointError, FileNotFoundError) as error:
            if isinstance(error, NoSessionError) or self._is_published():
                raise
            raise NoSessionError(f"{self.final} was removed while it was read.") from error

    def read_contents(self) -> Contents | None:
        """Reads the mark and the table of contents, and whether they belong together."""
        mark, data = _together(lambda: self.store.get(MARK), self.contents_bytes)
        if mark is None:
            return None
        where = f"{self.final}/{_CONTENTS}"
        if data is None:
            data = self.contents_bytes()  # it was finalized between these two looks
        if data is None:
            raise CorruptCheckpointError(f"{where} is missing.")
        if digest(data) != _read(mark).get("contents"):
            raise CorruptCheckpointError(f"{where} is not what was finalized.")
        return decode_contents(data, where=where)

    def contents_bytes(self) -> bytes | None:
        """Returns the table of contents as it is stored."""
        return self.store.get(_CONTENTS)

    def holds(self, name: str, pieces: Iterable[bytes]) -> bool:
        """Whether a derived object has just this content; the mark is this place's own."""
        if name == MARK:
            return self._is_published()
        return self.store.get(name) == b"".join(pieces)

    def bytes_held(self) -> int:
        """Returns the size of all objects below `state/`, in bytes."""
        return sum(entry.size for entry in self.store.list(f"{STATE}/"))

    def data_files(self) -> "StoreDataFiles":
        """Gives access to the data files of its parts."""
        return StoreDataFiles(self.store)

    def read_database(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Reads chunks where the parts' tables say that they lie; asks for no database."""
        if self._known.sources is None:
            plan = merge(self.read_own_parts().committed)
            leaves = zip(plan.leaves, plan.sources, strict=True)
            self._known.sources = {leaf.name: sources for leaf, sources in leaves}
        return object_data.read_stored(self.store, self._known.sources, regions)

    def remove_checkpoint(self) -> None:
        """Deletes the mark first: from then on no reader takes what is left for a checkpoint."""
        if not self._is_published():
            raise NoSessionError(f"There is no checkpoint at {self.final}.")
        self.store.delete([MARK])
        keys = [entry.key for entry in self.store.list()]
        self.store.delete(sorted(keys, key=lambda key: not key.startswith(_CONTROL)))


def _names_of_control(entries: Iterable[Entry]) -> frozenset[str]:
    keys = (entry.key for entry in entries if entry.key.startswith(_CONTROL))
    return frozenset(key.removeprefix(_CONTROL) for key in keys)


def mark_of(name: str) -> str:
    """The session that a part is of, by its name; empty where sessions are locked."""
    unique = own_name(name).rpartition(".")[2]
    return unique[:_MARK_LENGTH] if len(unique) > _MARK_LENGTH else ""


def _part_names(entries: Iterable[Entry]) -> list[str]:
    return oldest_first({name for entry in entries if (name := _part_of(entry.key))})


def _part_of(key: str) -> str:
    """The name of the part that an object is of; empty for what is of none."""
    segments = key.removeprefix(f"{STATE}/").split("/")[:-1]
    for depth in (1, 2):
        if segments[depth - 1 : depth] and segments[depth - 1].startswith(PART_PREFIX):
            return "/".join(segments[:depth])
    return ""


def _read(data: bytes) -> dict[str, Any]:
    try:
        read = json.loads(data)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise CorruptCheckpointError(f"a control object holds {data[:100]!r}, which is no JSON")
    return read


def _write(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _together(one: Callable[[], T], other: Callable[[], Any]) -> tuple[T, Any]:
    """Does two requests side by side."""
    first, second = do_all([one, other])
    return first, second


# The servers that were found to honour conditions.
_tried: set[str] = set()
