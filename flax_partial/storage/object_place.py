"""A checkpoint in an object store: nothing is locked or renamed, and one conditional put decides.

A session lies where the checkpoint will be. Below `state/session/` are its control objects, which
`control` lists; `control_objects` keeps them, and `object_removal` removes a checkpoint.

Each step puts something and then looks for what others have put, so that of two at least one sees
the other. A save puts its data, its table `part.json`, and then lists the control objects: no
process is ending the session, or it waits for the verdict and returns that. Finalize puts
`closing`, then lists the parts, checks them, puts the verdict if there is none, derives the root
files from the verdict's parts alone, and puts `commit_success.txt`, if there is none, last. Any
number may finalize at once: they write the same bytes. One that died after its verdict is completed
by the next. Where one dies before it, or takes too long, a save that waits puts the verdict of this
round, that it ends nothing: the session goes on, and a process that ends it has to put `closing`,
and to list the parts, anew.

Readers lock nothing. A removal puts `removed`, deletes `commit_success.txt`, then all else, and
last `begun` and `removed`: from its first step on the checkpoint is not published again. A save
that finds `removed` waits until it is gone; where that takes too long, one process takes the
removal over.

What a process that sleeps, or dies, has sent may arrive when its session was removed. Nothing that
it puts counts then, `commit_success.txt` neither, since the session's `begun` is gone. Root files
have the same names for all sessions: they are put only if they are absent, and what another session
has left in their place is replaced by a process that has just seen its own session.
"""

import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from flax_partial.errors import CheckpointExistsError, CorruptCheckpointError, NoSessionError
from flax_partial.format.digests import digest
from flax_partial.format.merge import merge
from flax_partial.format.model import Contents, Region
from flax_partial.format.tables import decode_contents
from flax_partial.storage import control, object_data, object_removal
from flax_partial.storage.control import CONTROL, MARK
from flax_partial.storage.control_objects import ControlObjects, part_of
from flax_partial.storage.object_data import StoreDataFiles, do_all, together
from flax_partial.storage.parts import SessionParts
from flax_partial.storage.paths import CONTENTS, STATE
from flax_partial.storage.place import Files
from flax_partial.storage.store import PIECE_BYTES, Entry
from flax_partial.storage.store_path import StorePath

_CONTENTS = f"{STATE}/{CONTENTS}"
# Of a root file that is put by one request: an upload has as many bytes on their way, and no
# condition. Stores take 5 GiB and more.
_MOST_AT_ONCE_BYTES = 16 * PIECE_BYTES


class StorePlace(ControlObjects):
    """Where a checkpoint is, or will be, in an object store; see `Place`."""

    def __init__(self, final: StorePath) -> None:
        super().__init__(final.store)
        self._one_at_a_time = threading.RLock()  # of this process ends a session
        self.final = self.session = final
        self._mark: bytes | None = None  # of the checkpoint that it reads

    @contextmanager
    def locked_exclusively(self, pause: Callable[[], None]) -> Iterator[None]:
        """Puts a fence: from here on saves wait for how this ends."""
        with self._one_at_a_time, super().locked_exclusively(pause):
            yield

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePlace) and self.final == other.final

    def __hash__(self) -> int:
        return hash(self.final)

    # Publishing.

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
        number, verdict = self._decided(session)
        if verdict is None:
            raise self.no_session()
        are_there = do_all([partial(self._put_root_file, *one) for one in named])
        if not control.lives(session, self._control_names()):  # removed while these were put
            raise self.no_session()
        others = [one for one, is_there in zip(named, are_there, strict=True) if not is_there]
        do_all([partial(self.store.put, *one) for one in others])
        told = {"flax_partial": 1, "session": session, "round": number}
        told |= {"contents": digest(contents), "by": uuid.uuid4().hex}
        entries = self._put_mark(session, control.write(told))
        self._sweep(session, entries, kept=verdict.parts)

    def _put_root_file(self, name: str, pieces: Sequence[bytes]) -> bool:
        """Puts a root file, if there is none; returns whether it is what is there now."""
        if sum(map(len, pieces)) > _MOST_AT_ONCE_BYTES:
            self.store.put(name, pieces)
            return True
        return self.store.put_new(name, b"".join(pieces))

    def _put_mark(self, session: str, mark: bytes) -> Sequence[Entry]:
        """Puts the mark, if there is none of a checkpoint; returns what is below `state/` then."""
        while True:
            is_mine = self.store.put_new(MARK, mark)
            entries = self.store.list(f"{STATE}/")
            if not control.lives(session, control.names_of(entries)):
                self._delete_mark(mark)  # removed while this process slept
                raise self.no_session()
            if is_mine:
                return entries
            found = self.store.get(MARK)
            if found is not None and control.session_of(found) in ("", session):
                raise CheckpointExistsError(
                    f"{self.final} was finalized by another process meanwhile."
                )
            self._delete_mark(found)  # of a checkpoint that was removed before this session began

    def _delete_mark(self, mark: bytes | None) -> None:
        """Deletes the mark if it is this one."""
        if mark is not None and self.store.get(MARK) == mark:
            self.store.delete([MARK])

    def _sweep(self, session: str, entries: Sequence[Entry], *, kept: Collection[str]) -> None:
        """Deletes what does not count; the verdicts stay, for who still sleeps."""
        doomed = [
            entry.key
            for entry in entries
            if ((name := part_of(entry.key)) and name not in kept)
            or entry.key.startswith(f"{CONTROL}{session}.closing.")
            or ".withdrawn." in entry.key.removeprefix(CONTROL).partition("/")[0]
        ]
        self.store.delete(doomed)

    # The finalized checkpoint.

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises NoSessionError where reading fails because it was removed meanwhile."""
        try:
            yield
        except (CorruptCheckpointError, FileNotFoundError) as error:
            if not isinstance(error, NoSessionError):
                self.require_unremoved()
            raise

    def require_unremoved(self) -> None:
        """Raises NoSessionError where what was read is gone, or another one is in its place."""
        mark = self.store.get(MARK)
        is_another = self._mark is not None and mark != self._mark
        if mark is None or is_another or not self._is_of_checkpoint(mark):
            raise NoSessionError(f"{self.final} was removed while it was read.")

    def is_more_than_a_mark(self) -> bool:
        """Whether a mark is there, and not only since it was put when its checkpoint was removed.

        One whose removal has begun, and that can still be read, is there.
        """
        mark = self.store.get(MARK)
        session = "" if mark is None else control.session_of(mark)
        begun = CONTROL + control.begun_name(session)
        return mark is not None and (not session or self.store.size(begun) is not None)

    def read_contents(self) -> Contents | None:
        """Reads the mark and the table of contents, and whether they belong together."""
        mark, data = together(lambda: self.store.get(MARK), self.contents_bytes)
        if mark is None:
            return None
        self._mark = mark
        where = f"{self.final}/{_CONTENTS}"
        wanted = control.read(mark).get("contents")
        if data is None or digest(data) != wanted:
            data = self.contents_bytes()  # it was finalized between these two looks
        if data is not None and digest(data) == wanted:
            return decode_contents(data, where=where)
        if not self._is_of_checkpoint(mark):
            return None
        what = "is missing" if data is None else "is not what was finalized"
        raise CorruptCheckpointError(f"{where} {what}.")

    def contents_bytes(self) -> bytes | None:
        """Returns the table of contents as it is stored."""
        return self.store.get(_CONTENTS)

    def read_own_parts(self) -> SessionParts:
        """Reads the tables of the parts of the finalized checkpoint."""
        mark = control.read(self.store.get(MARK) or b"{}")
        number = mark.get("round", 0)
        verdict = self._read_verdict(mark["session"], number) if "session" in mark else None
        if verdict is None:
            self.require_unremoved()
        return self._read(() if verdict is None else verdict.parts, None)

    def holds(self, name: str, pieces: Iterable[bytes]) -> bool:
        """Whether a derived object has just this content; the mark is this place's own."""
        if name == MARK:
            return self.store.size(MARK) is not None
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
        """Puts that it is being removed, and deletes it."""
        mark = self.store.get(MARK)
        gone = NoSessionError(f"There is no checkpoint at {self.final}.")
        if mark is None:
            self.finish_removal()
            raise gone
        session = control.session_of(mark)
        if session and object_removal.remove(self.store, session):
            return
        names = self._control_names()
        if self.store.get(MARK) != mark or control.begun_name(session) in names:
            raise gone  # another process removes it, or has done so just now
        self.store.delete([MARK])  # another program's, or it was put when its checkpoint was gone
        if control.newest_opening(names):
            raise gone  # what is there is a newer session
        self.store.delete([entry.key for entry in self.store.list()])

    def finish_removal(self) -> None:
        """Deletes what a removal has left that began some time ago, and was killed."""
        session = control.removed_session(self._control_names())
        if session:
            object_removal.finish(self.store, session, waits=False)
