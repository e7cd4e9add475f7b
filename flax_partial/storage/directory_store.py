"""A local directory as a `Store`: what is put there whole stands in for locks.

A cluster's file system may have no locks, or locks that hold on one machine only. It has atomic
names: an object is written under a temporary name and then linked, or renamed, to its own. A name
made by O_EXCL would stand before its content does.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flax_partial.storage import files, medium, system
from flax_partial.storage.store import PIECE_BYTES, Entry, cut

if TYPE_CHECKING:
    from flax_partial.storage.store import Store

_TEMPORARY = ".tmp"
# What link answers where there are no hard links, or none to be had.
_NO_LINKS = frozenset(
    (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
)


class DirectoryStore:
    """Objects as files below a directory, which has to be there: it is never made.

    Attributes:
      root: The directory.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        """Uses a directory.

        Args:
          root: The directory.
          durable: Whether what is put outlives a power cut.
        """
        self.root = root
        self._durable = durable

    @property
    def url(self) -> str:
        """The directory's path."""
        return str(self.root)

    def below(self, prefix: str) -> "Store":
        """Returns the store of a directory below."""
        return DirectoryStore(self.root / prefix, durable=self._durable)

    def get(self, key: str) -> bytes | None:
        """Returns an object; None where there is none."""
        _look_anew((self.root / key).parent)
        return files.read(self.root / key)

    def get_into(self, key: str, offset: int, into: memoryview) -> None:
        """Reads as many bytes of an object from an offset as `into` is long.

        Raises:
          FileNotFoundError: There is no such object.
          ValueError: It ends before.
        """
        end = offset + len(into)
        with open(self.root / key, "rb", buffering=0) as file:
            file.seek(offset)
            while into:
                read = file.readinto(into)
                if not read:
                    raise ValueError(f"{self.root / key} ends before {end} bytes")
                into = into[read:]

    def put(
        self,
        key: str,
        pieces: Iterable[bytes | memoryview],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes an object, made of pieces one after the other, in place of what is there."""
        with self._written(key, _checked(pieces, check)) as temporary:
            os.replace(temporary, self.root / key)

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none; returns whether `data` is what is there now.

        NFS repeats a request whose answer was lost, and may then find the name that it has made.
        """
        with self._written(key, (data,)) as temporary:
            if _named(temporary, self.root / key):
                return True
        return files.holds(self.root / key, (data,))

    def require_conditions(self, key: str) -> None:
        """Asks nothing: link(2) replaces no file, nor does renameat2(2) with RENAME_NOREPLACE."""

    @contextlib.contextmanager
    def _written(self, key: str, pieces: Iterable[bytes | memoryview]) -> Iterator[Path]:
        """Writes a temporary file beside where an object is to be; makes durable what it became."""
        path = self.root / key
        temporary = path.with_name(f".{uuid.uuid4().hex}{_TEMPORARY}")
        try:
            while True:
                try:
                    files.write(temporary, pieces, durable=self._durable)
                    break
                except FileNotFoundError:  # they may be removed again at once, while they are empty
                    self._make_directories(path.parent)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        if self._durable:
            files.fsync_directory(path.parent)

    def _make_directories(self, directory: Path) -> None:
        """Makes directories below the root. The root may be gone for good, and is not made."""
        if directory == self.root:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
        try:
            os.mkdir(directory)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_directories(directory.parent)
            self._make_directories(directory)
            return
        if self._durable:
            files.fsync_directory(directory.parent)

    def list(self, prefix: str = "") -> Sequence[Entry]:
        """Returns all objects below a prefix, which ends in a slash, or is empty."""
        names, entries = self.children(prefix)
        found = list(entries)
        for name in names:
            found += self.list(f"{prefix}{name}/")
        return found

    def children(self, prefix: str = "") -> tuple[Sequence[str], Sequence[Entry]]:
        """Returns one level below a prefix: names of directories, and the objects there."""
        _look_anew(self.root / prefix)
        names: list[str] = []
        entries: list[Entry] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(self.root / prefix):
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
                elif not entry.name.endswith(_TEMPORARY):
                    entries.append(Entry(prefix + entry.name, _size(entry)))
        return names, entries

    def size(self, key: str) -> int | None:
        """Returns the size of an object, in bytes; None where there is none."""
        try:
            status = os.stat(self.root / key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects, and directories that hold none any more; none need be there."""
        for key in keys:
            path = self.root / key
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            with contextlib.suppress(OSError):  # it holds more, or is gone
                while (path := path.parent) != self.root:
                    os.rmdir(path)


def _size(entry: os.DirEntry[str]) -> int:
    """The size of a file that is listed; 0 where its path leads to nothing any more.

    It was deleted, or its directory renamed. A listing that left out some names for this, and not
    those before, would show a session as it never was.
    """
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _named(temporary: Path, path: Path) -> bool:
    """Gives a whole file a name; returns False if something has that name."""
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    code = system.rename_exclusively(temporary, path)
    if code in files.NOT_EXCLUSIVE:
        raise OSError(
            errno.ENOTSUP,
            f"{medium.mount_of(path.parent) or 'The file system'} has no locks, or they are local "
            "to a machine, and it has neither hard links nor exclusive renames: nothing keeps two "
            "processes apart. If only one machine writes there, set FLAX_PARTIAL_LOCKS=flock",
            str(path),
        )
    if code not in (0, errno.EEXIST):
        raise OSError(code, os.strerror(code), str(temporary), None, str(path))
    return not code


def _look_anew(directory: Path) -> None:
    """Makes NFS drop its cache of the names in a directory, which it keeps for a minute.

    When it makes a name there, and removes it, its server reports whether others did, meanwhile.
    """
    with contextlib.suppress(OSError):  # such as of a share that may only be read
        mount = medium.mount_of(directory)
        if mount is not None and mount.kind in {"nfs", "nfs4"}:
            temporary = directory / f".{uuid.uuid4().hex}{_TEMPORARY}"
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            os.unlink(temporary)


def _checked(
    pieces: Iterable[bytes | memoryview], check: Callable[[], None]
) -> Iterator[bytes | memoryview]:
    for piece in cut(pieces, PIECE_BYTES):
        check()
        yield piece
