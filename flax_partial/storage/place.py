"""What saving, finalizing and loading need of the place of one checkpoint: the seam.

Two kinds of places keep these promises by different means. On a file system a session is a
directory that is locked by `flock`, and published by a rename (`local_place`). In an object store
nothing is locked or renamed: control objects show that a session is about to end, and one
conditional put publishes it (`object_place`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import numpy as np

from flax_partial.errors import NoSessionError
from flax_partial.format.model import Contents, Part, Region
from flax_partial.storage.parts import SessionParts
from flax_partial.storage.store_path import AnyPath

Files = Iterator[tuple[str, Iterable[bytes]]]
"""Paths below a checkpoint, and what is in each file, to be iterated once."""


class OpenSession(Protocol):
    """An unfinished checkpoint that was looked up: the one that is there, and no later one."""

    @property
    def mark(self) -> str:
        """What the names of its parts' directories have to hold; may be empty."""
        ...

    @property
    def is_new(self) -> bool:
        """Whether this process has made it: then it held no part of its own before."""
        ...

    def release(self) -> None:
        """Lets finalize and abort go on."""
        ...

    def close(self) -> None:
        """Lets go of it for good."""
        ...


class Sink(Protocol):
    """A data file that is written from its beginning to its end; use it as a context."""

    def __enter__(self) -> Self:
        """Returns itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Lets go of it, finished or not."""
        ...

    def append(self, data: np.ndarray) -> int:
        """Appends bytes, which must not change until it is finished; returns their offset."""
        ...

    def finish(self) -> None:
        """Writes what is left."""
        ...


class NewPart(Protocol):
    """A part that is being written."""

    def most_files(self, *, durable: bool) -> int | None:
        """Into how many files written side by side it may be cut; None sets no bound."""
        ...

    def link(self, source: Path, file: int, *, size: int, sync: bool) -> bool:
        """Gives another part's data file a second name, in this one; returns whether it could.

        Args:
          source: The file.
          file: Its number in this part.
          size: How large it has to be, in bytes.
          sync: Whether its data has to be put on the disk.
        """
        ...

    def copy(self, source: BinaryIO, file: int) -> None:
        """Copies an open file to this part's data file of that number."""
        ...

    def new_file(
        self, file: int, *, expected_bytes: int, durable: bool, check: Callable[[], None]
    ) -> Sink:
        """Begins the data file of that number.

        Args:
          file: Its number.
          expected_bytes: About how large it becomes.
          durable: Whether `finish` has it on the disk.
          check: Called between pieces of at most 64 MiB; what it raises ends the writing.
        """
        ...

    def commit(self, table: bytes, *, has_data_file: bool, durable: bool) -> None:
        """Commits the part: its table appears, whole or not at all.

        Raises:
          CheckpointExistsError: The session was finalized before, without this part.
          NoSessionError: It was dropped before.
          OSError: Whether it is committed is not known: it has to be removed.
        """
        ...


class DataFiles(Protocol):
    """The data files of a finalized checkpoint's parts.

    Attributes:
      most_bytes: How many bytes are best read at once.
      most_readers: How many reads are best done at once.
      reads_whole: Whether a piece is read at once, not chunk by chunk.
      least_bytes: From how many bytes on several readers are worth their while.
    """

    most_bytes: int
    most_readers: int
    reads_whole: bool
    least_bytes: int

    def require(self, path: str, size: int) -> None:
        """Raises ValueError if a data file is known to be shorter than `size` bytes."""
        ...

    def open(self, path: str) -> "AbstractContextManager[DataFile]":
        """Opens a data file, given its path below `state/`."""
        ...


class DataFile(Protocol):
    """A data file that is open for reading."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Reads as many bytes from an offset as `into` is long.

        Raises:
          ValueError: It ends before.
        """
        ...


class Place(Protocol):
    """Where one checkpoint is, or will be, and its session."""

    @property
    def final(self) -> AnyPath:
        """The finalized checkpoint."""
        ...

    @property
    def session(self) -> AnyPath:
        """Where the unfinished one lies."""
        ...

    # Saving.

    def look(self, known: OpenSession | None, *, is_busy: bool) -> OpenSession | None:
        """Looks for the session before a save.

        Args:
          known: The one that this process has seen.
          is_busy: Whether saves into it are under way, which look for themselves.

        Returns:
          The session that is there; `known`, if it still is, or could be.

        Raises:
          CheckpointExistsError: The finalized checkpoint is there, or what is no session.
        """
        ...

    def enter(self, known: OpenSession | None) -> OpenSession:
        """Creates the session if there is none, and keeps finalize and abort out as far as it can.

        Returns:
          The session; `known`, if that is the one that is there still.

        Raises:
          CheckpointExistsError: The finalized checkpoint is there, or what is no session.
          OSError: It cannot be made.
        """
        ...

    def prepare(self) -> None:
        """Makes an entered session ready for this process's first part."""
        ...

    def sync(self) -> None:
        """Makes an entered session durable."""
        ...

    def is_gone(self, session: OpenSession) -> bool:
        """Whether a session is known not to be there any more."""
        ...

    def create_part(self, name: str) -> NewPart:
        """Begins a part of an entered session; `name` holds the session's mark."""
        ...

    def remove_part(self, name: str) -> None:
        """Has a part of this process count for nothing.

        Raises:
          OSError: It may still count.
        """
        ...

    def may_have_table(self, name: str) -> bool:
        """Whether a part that was to be removed may still count."""
        ...

    def full_disk_explained(self, needed: Callable[[], int]) -> AbstractContextManager[None]:
        """Adds to the error of a full disk what is needed, in bytes, and what is free."""
        ...

    # What there is of a session.

    def is_session(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        ...

    def no_session(self) -> NoSessionError:
        """The error for a session that is not there."""
        ...

    def read_parts(
        self,
        *,
        process: int | None = None,
        known: Mapping[str, Part] | None = None,
        failed: Collection[str] = (),
    ) -> SessionParts:
        """Reads the tables of all parts of the session.

        Args:
          process: Only the parts of this process.
          known: Parts read before, by name: a committed part never changes.
          failed: Names of parts whose save failed in this process: they count as torn.

        Raises:
          OSError: One cannot be read.
        """
        ...

    def size_of_data(self, path: str) -> int:
        """Size of a data file, given its path below `state/`, in bytes; 0 where there is none."""
        ...

    # Ending it.

    def require_absent(self) -> None:
        """Raises CheckpointExistsError if anything is where the checkpoint is to be."""
        ...

    def locked_exclusively(self, pause: Callable[[], None]) -> AbstractContextManager[None]:
        """Keeps saves out of a session, or has them wait for how this ends.

        Args:
          pause: Called between two tries, while saves are under way; what it raises ends the wait.

        Raises:
          NoSessionError: There is no session, or none any more.
          CheckpointExistsError: What is at its place is not a session.
        """
        ...

    def decide(self, parts: Collection[str], *, committed_ns: int) -> int | None:
        """Fixes, in a locked session, which parts the checkpoint is made of, and since when.

        Returns:
          The time of the commit; None where another one has decided, as `read_parts` then shows.
        """
        ...

    def commit_checkpoint(
        self, *, root_files: Callable[[], Files], contents: bytes, torn: Sequence[str]
    ) -> None:
        """Writes what is derived, and publishes the checkpoint. All durable.

        Args:
          root_files: Gives the files but for the table of contents, anew at each call.
          contents: The table of contents.
          torn: Names of the parts that do not count.

        Raises:
          CheckpointExistsError: Another process has published it, or something else is there.
        """
        ...

    def remove_session(self) -> None:
        """Drops a locked session.

        Raises:
          CheckpointExistsError: It holds what is not a session's, or is finalized by now.
          NoSessionError: It is gone.
        """
        ...

    # The finalized checkpoint.

    def reading(self) -> AbstractContextManager[None]:
        """Keeps the checkpoint from being removed meanwhile, or reports that it was."""
        ...

    def require_unremoved(self) -> None:
        """Raises NoSessionError if the checkpoint was removed since `reading` began."""
        ...

    def read_contents(self) -> Contents | None:
        """Reads the table of contents; None where there is no checkpoint of this package.

        Raises:
          CorruptCheckpointError: It is damaged, or is of another checkpoint.
        """
        ...

    def contents_bytes(self) -> bytes | None:
        """Returns the table of contents as it is stored."""
        ...

    def read_own_parts(self) -> SessionParts:
        """Reads the tables of the parts of the finalized checkpoint."""
        ...

    def holds(self, name: str, pieces: Iterable[bytes]) -> bool:
        """Whether a derived file, by its path below the checkpoint, has just this content."""
        ...

    def bytes_held(self) -> int:
        """Returns the size of all that is below `state/`, in bytes."""
        ...

    def data_files(self) -> DataFiles:
        """Gives access to the data files of its parts."""
        ...

    def read_database(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Reads boxes of leaves from the root database, and checks every digest.

        Returns:
          For each region its data, C-contiguous and the caller's own, or what is wrong.
        """
        ...

    def remove_checkpoint(self) -> None:
        """Removes the finalized checkpoint.

        Raises:
          CheckpointInUseError: It is being read, as far as that is known.
          NoSessionError: There is none.
        """
        ...
