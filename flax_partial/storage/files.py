"""Files and directories as such: reading, atomic and durable writing, renaming, removal."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flax_partial.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
)
from flax_partial.storage import system
from flax_partial.storage.paths import DELETED_SUFFIX, CheckpointPath

_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT))
_CHANGED = frozenset((errno.ENOENT, errno.ENOTEMPTY))  # by another process, since it was listed
_ATTEMPTS = 50
_WRITE_BYTES = 1 << 20
_NAME_BYTES = 255  # the longest name that file systems take
NOT_EXCLUSIVE = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))


def identity(directory: Path) -> tuple[int, int] | None:
    """Device and inode of a directory; None where there is none."""
    try:
        status = os.stat(directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def listed(directory: Path) -> list[str]:
    """Returns the names in a directory, in no order; none where there is no directory."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(path: Path) -> bytes | None:
    """Returns a file's bytes; None where there is no such file.

    Raises:
      CorruptCheckpointError: It is no file, but what may have no end: a pipe, a device.
    """
    try:
        with _open(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _open(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptCheckpointError(f"{path}: it is not a file")
    return open(descriptor, "rb")


def holds(path: Path, pieces: Iterable[bytes]) -> bool:
    """Whether there is a file with just this content, given piece by piece."""
    try:
        with _open(path) as file:
            return all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)
    except (CorruptCheckpointError, FileNotFoundError, NotADirectoryError):
        return False


def bytes_below(directory: Path) -> int:
    """Returns the size of all files below a directory."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(directory)
        for name in names
    )


def share(source: Path, target: Path, *, size: int, sync: bool) -> bool:
    """Gives a file that never changes a second name.

    Args:
      source: The file.
      target: Its new name; nothing is there.
      size: How large it has to be, in bytes.
      sync: Whether its data has to be put on the disk.

    Returns:
      Whether that was done. Where it cannot be (the file is gone or another one, the file system is
      another or makes no more links of it, the system does not allow it), nothing is at `target`.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    try:
        status = os.lstat(target)
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            if sync:
                _fsync(target, os.O_RDONLY)
            return True
    except OSError:
        pass
    os.unlink(target)
    return False


def hold(path: Path, *, size: int) -> BinaryIO | None:
    """Opens a file of that size, which outlives its name then; None where there is none."""
    try:
        file = _open(path)
    except (OSError, CorruptCheckpointError):
        return None
    if os.fstat(file.fileno()).st_size == size:
        return file
    file.close()
    return None


def copy_held(file: BinaryIO, target: Path) -> None:
    """Copies an open file, from its beginning, to a new one, durably."""
    with open(target, "xb") as copy:
        file.seek(0)
        shutil.copyfileobj(file, copy)
        copy.flush()
        system.sync(copy.fileno())


def write(
    path: Path | str,
    pieces: Iterable[bytes | memoryview],
    *,
    durable: bool,
    within: int | None = None,
) -> None:
    """Writes a file anew, piece by piece.

    Args:
      path: The file.
      pieces: Its content.
      durable: Whether it is to be on the disk at the return.
      within: The descriptor of the directory that a relative path begins at.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666, dir_fd=within)
    try:
        for data in _joined(pieces):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view[: system.MOST_BYTES]) :]
        if durable:
            system.sync(descriptor)
    finally:
        os.close(descriptor)


def _joined(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Joins small pieces to some that are worth a call of the system each."""
    batch: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= _WRITE_BYTES:
            yield b"".join(batch)
            batch, size = [], 0
    yield b"".join(batch)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Makes a file that appears at `path` whole and durable, or not at all.

    Only where the process is killed does what was written so far stay, beside it and under a hidden
    name that ends in `.tmp`.

    Yields:
      A descriptor to write to.

    Raises:
      FileExistsError: Something is at `path` by the end; it is kept, and what was written is not.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield descriptor
            system.sync(descriptor)
        finally:
            os.close(descriptor)
        rename_to_new(temporary, path)
    except CheckpointExistsError:
        temporary.unlink()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def make_directories(directory: Path) -> None:
    """Makes a directory and those above it that are missing, each durable before the next.

    Also for a save that need not be durable: later it is not known which of them were made.
    """
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has just made it
            os.mkdir(one)
        fsync_directory(one.parent)


def fsync_directory(directory: Path | str, *, within: int | None = None) -> None:
    """Makes the names in a directory durable; `within` is as for `write`."""
    _fsync(directory, os.O_RDONLY | os.O_DIRECTORY, within)


def _fsync(path: Path | str, flags: int, within: int | None = None) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, dir_fd=within)
    try:
        system.sync(descriptor)
    finally:
        os.close(descriptor)


def rename_to_new(source: Path, target: Path) -> None:
    """Renames without replacing anything: plain rename(2) would replace an empty directory."""
    code = system.rename_exclusively(source, target)
    if code in NOT_EXCLUSIVE:
        if not os.path.lexists(target):
            os.rename(source, target)
            return
        code = errno.EEXIST
    if code == errno.EEXIST:
        raise CheckpointExistsError(f"{target} exists already; the session {source} was kept.")
    if code:
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def remove_directory(directory: Path) -> None:
    """Removes a directory that others may be looking at: it disappears at once, then is deleted."""
    remove_renamed(directory, rename_away(directory))


def rename_away(directory: Path) -> Path:
    """Renames a directory to a hidden name that no reader takes for a checkpoint; returns that."""
    name, rest = directory.name, f".{uuid.uuid4().hex}{DELETED_SUFFIX}"
    while len(os.fsencode(f".{name}{rest}")) > _NAME_BYTES:
        name = name[:-1]
    doomed = directory.with_name(f".{name}{rest}")
    os.rename(directory, doomed)
    return doomed


def remove_renamed(directory: Path, doomed: Path) -> None:
    """Deletes what `rename_away` has renamed."""
    try:
        fsync_directory(directory.parent)  # else a power cut may bring back half of it
        remove_tree(doomed)
    except OSError as error:
        error.add_note(f"{directory} is gone; what is left of it lies in {doomed}.")
        raise


def remove_tree(directory: Path) -> None:
    """Deletes a directory and all in it, if it is there, also while others change it."""
    attempts = _ATTEMPTS
    while os.path.lexists(directory):
        try:
            shutil.rmtree(directory)
        except OSError as error:
            attempts -= 1
            if error.errno not in _CHANGED or not attempts:
                raise


@contextmanager
def full_disk_explained(where: CheckpointPath, needed: Callable[[], int]) -> Iterator[None]:
    """Adds to the error of a full disk, or a used-up quota, what is needed and what is free.

    Args:
      where: What is written.
      needed: Returns how many bytes, as far as that is known by then.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        text = (
            f"{os.strerror(error.errno)}: about {needed():,} bytes are to be written, and "
            f"{_free_bytes(where.session):,} are free. Make room and call again; the session is "
            "as it was before"
        )
        explained = OSError(error.errno, text, str(where.session))
        for note in getattr(error, "__notes__", ()):
            explained.add_note(note)
        raise explained from error


def _free_bytes(directory: Path) -> int:
    """Room on a directory's file system, which may have to be made yet."""
    while not directory.exists():
        directory = directory.parent
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
