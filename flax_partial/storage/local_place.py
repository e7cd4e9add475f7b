"""A checkpoint on a file system: a session is a directory, locked by `flock`, and then renamed."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flax_partial.errors import CorruptCheckpointError, NoSessionError
from flax_partial.format.model import Contents, Part, Region, data_part, data_path
from flax_partial.format.tables import decode_contents
from flax_partial.storage import checkpoint_dir, files, medium, parts, session_dir, system
from flax_partial.storage import tensorstore_io as arrays
from flax_partial.storage.direct_io import NewFile
from flax_partial.storage.locks import DirectoryLock
from flax_partial.storage.parts import SessionParts
from flax_partial.storage.paths import CONTENTS, STATE, CheckpointPath
from flax_partial.storage.place import Files, OpenSession

_MOST_FILES = 4  # of one save: a disk takes no more from more threads


@dataclass(frozen=True, slots=True)
class LocalPlace(CheckpointPath):
    """Where a checkpoint is, or will be, on a file system; see `Place`."""

    # Saving.

    def look(self, known: OpenSession | None, *, is_busy: bool) -> OpenSession | None:
        """Opens the session's directory if it is not the known one."""
        session_dir.require_absent(self)
        identity = known.identity if isinstance(known, DirectoryLock) else None
        if is_busy or files.identity(self.session) == identity:
            return known
        directory = session_dir.open_session(self)
        if directory is not None:
            session_dir.check_is_ours(self)
        return directory

    def enter(self, known: OpenSession | None) -> OpenSession:
        """Locks the session's directory, shared."""
        directory = known if isinstance(known, DirectoryLock) else None
        return session_dir.lock_for_saving(self, directory)

    def prepare(self) -> None:
        """Makes the directories that a session has."""
        session_dir.prepare_session(self)

    def sync(self) -> None:
        """Makes a session's directories durable."""
        session_dir.sync_session(self)

    def is_gone(self, session: OpenSession) -> bool:
        """Whether another directory is at the session's path, or none."""
        try:
            identity = files.identity(self.session)
        except OSError:  # such as a name that is too long: there never was a session
            return True
        return not isinstance(session, DirectoryLock) or identity != session.identity

    def create_part(self, name: str) -> "LocalPart":
        """Makes the directory of a part."""
        return LocalPart(session_dir.create_part(self, name))

    def remove_part(self, name: str) -> None:
        """Removes the directory of a part."""
        session_dir.remove_part(self, name)

    def may_have_table(self, name: str) -> bool:
        """Whether a part's table of contents is there, or may be."""
        return session_dir.may_have_table(self, name)

    def full_disk_explained(self, needed: Callable[[], int]) -> AbstractContextManager[None]:
        """Adds to the error of a full disk what is needed, in bytes, and what is free."""
        return files.full_disk_explained(self, needed)

    # What there is of a session.

    def is_session(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        return session_dir.is_session(self)

    def no_session(self) -> NoSessionError:
        """The error for a session that is not there."""
        return session_dir.no_session(self)

    def read_parts(
        self,
        *,
        process: int | None = None,
        known: Mapping[str, Part] | None = None,
        failed: Collection[str] = (),
    ) -> SessionParts:
        """Reads the tables of all parts of the session."""
        return parts.read_parts(self.state, process=process, known=known, failed=failed)

    def size_of_data(self, path: str) -> int:
        """Size of a data file, given its path below `state/`, in bytes; 0 where there is none."""
        return session_dir.size_of_data(self, path)

    # Ending it.

    def require_absent(self) -> None:
        """Raises CheckpointExistsError if anything is at the final path."""
        session_dir.require_absent(self)

    def locked_exclusively(self, pause: Callable[[], None]) -> AbstractContextManager[None]:
        """Locks the session's directory, exclusively."""
        return session_dir.locked_exclusively(self, pause)

    def decide(self, parts: Collection[str], *, committed_ns: int) -> int | None:  # noqa: ARG002
        """No other process can decide anything while the session is locked."""
        return committed_ns

    def commit_checkpoint(
        self, *, root_files: Callable[[], Files], contents: bytes, torn: Sequence[str]
    ) -> None:
        """Writes the root files, and renames the session."""
        for name in torn:  # no save is under way while the session is locked: these are left over
            session_dir.remove_part(self, name)
        session_dir.clear_root(self)

        def needed_bytes() -> int:
            sizes = (len(piece) for _, pieces in root_files() for piece in pieces)
            return sum(sizes) + len(contents)

        with files.full_disk_explained(self, needed_bytes):
            try:
                session_dir.commit_checkpoint(self, root_files=root_files(), contents=contents)
            except BaseException:
                with contextlib.suppress(OSError):  # it takes room, and is made anew in any case
                    session_dir.clear_root(self)
                raise

    def remove_session(self) -> None:
        """Drops a locked session."""
        session_dir.remove_session(self)

    # The finalized checkpoint.

    def reading(self) -> AbstractContextManager[None]:
        """Locks the checkpoint's directory, shared."""
        return checkpoint_dir.reading(self.final)

    def require_unremoved(self) -> None:
        """It is locked while it is read."""

    def read_contents(self) -> Contents | None:
        """Reads the table of contents, and looks whether it is that of the parts beside it."""
        path = self.final / STATE / CONTENTS
        data = files.read(path)
        names = parts.part_names(self.final / STATE)
        if data is None and names:  # unless it was finalized between these two looks
            data = files.read(path)
        if data is not None:
            contents = decode_contents(data, where=str(path))
            if contents.first_part not in names:
                raise CorruptCheckpointError(
                    f"{path} is of another checkpoint, or {contents.first_part} beside it is lost."
                )
            return contents
        if names:
            raise CorruptCheckpointError(
                f"{path} is missing, and {self.final} holds parts: it is damaged, or was renamed "
                f"before it was finalized. Rename it to {self.session} and finalize it."
            )
        return None

    def has_contents(self) -> bool:
        """Whether a table of contents is there: finalize writes it, whatever a directory's name is.

        What this process may not see is not there.
        """
        try:
            return (self.final / STATE / CONTENTS).is_file()
        except OSError:
            return False

    def contents_bytes(self) -> bytes | None:
        """Returns the table of contents as it is stored."""
        return files.read(self.final / STATE / CONTENTS)

    def read_own_parts(self, *, process: int | None = None) -> SessionParts:
        """Reads the tables of the parts of the finalized checkpoint."""
        return parts.read_parts(self.final / STATE, process=process)

    def holds(self, name: str, pieces: Iterable[bytes]) -> bool:
        """Whether a derived file has just this content."""
        return files.holds(self.final / name, pieces)

    def bytes_held(self) -> int:
        """Returns the size of all files below `state/`, in bytes."""
        return files.bytes_below(self.final / STATE)

    def data_files(self) -> "LocalDataFiles":
        """Gives access to the data files of its parts."""
        return LocalDataFiles(self.final / STATE)

    def read_database(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Reads boxes of leaves from the root database."""
        return arrays.read_regions(self.final / STATE, regions)

    def remove_checkpoint(self) -> None:
        """Removes the checkpoint's directory, unless it is being read."""
        checkpoint_dir.remove_checkpoint(self)


@dataclass(frozen=True, slots=True)
class LocalPart:
    """A part that is being written into its directory; see `NewPart`.

    Attributes:
      directory: The directory.
    """

    directory: Path

    def most_files(self, *, durable: bool) -> int | None:
        """A disk takes no more from more threads than from some; memory does."""
        return _MOST_FILES if durable and not medium.is_memory(self.directory) else None

    def link(self, source: Path, file: int, *, size: int, sync: bool) -> bool:
        """Links a data file into the directory."""
        return files.share(source, self._path(file), size=size, sync=sync)

    def copy(self, source: BinaryIO, file: int) -> None:
        """Copies a data file into the directory, durably."""
        files.copy_held(source, self._path(file))

    def new_file(
        self, file: int, *, expected_bytes: int, durable: bool, check: Callable[[], None]
    ) -> NewFile:
        """Creates a data file."""
        path = self._path(file)
        return NewFile(path, expected_bytes=expected_bytes, durable=durable, check=check)

    def commit(self, table: bytes, *, has_data_file: bool, durable: bool) -> None:
        """Renames the table to its name."""
        session_dir.commit_part(self.directory, table, has_data_file=has_data_file, durable=durable)

    def _path(self, file: int) -> Path:
        return self.directory.parent / data_path(data_part(self.directory.name, file))


@dataclass(frozen=True, slots=True)
class LocalDataFiles:
    """The data files of parts in a directory; see `DataFiles`.

    Attributes:
      state: The directory.
    """

    state: Path
    # While one thread waits for a disk, another can copy.
    most_readers = min(16, max(4, os.cpu_count() or 1))
    most_bytes = 8 << 20
    least_bytes = 16 << 20
    reads_whole = False  # a chunk's digest is taken while it is in the processor's cache

    def require(self, path: str, size: int) -> None:
        """Compares with the file's size."""
        file = self.state / path
        try:
            found = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            found = 0
        if size > found:
            raise ValueError(f"{file} is of {found} bytes, and the data in it goes to {size}")

    @contextmanager
    def open(self, path: str) -> Iterator["LocalDataFile"]:
        """Opens a data file."""
        with (self.state / path).open("rb", buffering=0) as file:
            yield LocalDataFile(file)


@dataclass(frozen=True, slots=True)
class LocalDataFile:
    """A data file that is open for reading."""

    file: FileIO

    def read_into(self, offset: int, into: memoryview) -> None:
        """Reads bytes of the file."""
        self.file.seek(offset)
        while into:
            count = self.file.readinto(into[: system.MOST_BYTES])
            if not count:
                raise ValueError("its data file was cut short")
            into = into[count:]
