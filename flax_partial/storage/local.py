"""The one module that touches files: paths, locks, atomic writes, commit, removal.

A session is the directory `<checkpoint>.partial_save`. A process holds a shared `flock` on the
directory itself while it saves into it, an exclusive one while it finalizes or aborts; there is no
lock file, and the kernel drops the lock of a process that dies. After waiting, the inode behind the
path is compared with the one that was locked: the session may have been renamed away meanwhile.

A finalized checkpoint is locked the same way: shared while it is read, exclusively while it is
renamed away to be removed, which waits for no reader.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flax_partial.errors import (
    CheckpointExistsError,
    CheckpointInUseError,
    CorruptCheckpointError,
    NoSessionError,
)

PathLike = str | os.PathLike[str]

SESSION_SUFFIX = ".partial_save"
DELETED_SUFFIX = ".deleted"  # of what is being removed, or was when it was killed
PART_PREFIX = "part."
PART_FOLDER = re.compile(r"p[0-9]{1,9}")  # of the parts of some processes among very many
PART_TABLE = "part.json"
CONTENTS = "contents.json"
STATE = "state"

_ROOT_FILES = frozenset(("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt"))
_STATE_FILES = frozenset(("_METADATA", "_sharding", "_strings.json", CONTENTS, "manifest.ocdbt"))
_STATE_DIRECTORIES = frozenset(("array_metadatas", "d"))
_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT))
_WRITE_BYTES = 1 << 20
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """Where a checkpoint is, or will be.

    Attributes:
      final: The finalized checkpoint; absolute, its parent without symbolic links.
      session: The directory of the unfinished one.
    """

    final: Path
    session: Path

    @property
    def state(self) -> Path:
        """The session's directory of parts."""
        return self.session / STATE

    @property
    def finalized(self) -> "CheckpointPath":
        """The same checkpoint once it is finalized: its parts are at its final place."""
        return CheckpointPath(self.final, self.final)


def resolve(path: str | os.PathLike[str]) -> CheckpointPath:
    """Takes the path of a checkpoint, or of its session, as a user gives it.

    Raises:
      TypeError: It is not a path of text.
      ValueError: It has no last component that could name a checkpoint.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of str, not {type(text).__name__}")
    parent, name = os.path.split(os.path.abspath(text))
    name = name.removesuffix(SESSION_SUFFIX)
    if not text or not name or "\0" in text or not _is_utf8(text):
        raise ValueError(
            f"path {text!r} does not name a checkpoint: give a directory below a parent, in UTF-8"
        )
    known = _known_paths.get((parent, name))
    if known is not None and _is_same_directory(parent, known.final.parent):
        return known
    final = Path(os.path.realpath(parent), name)
    if len(_known_paths) >= _MOST_KNOWN_PATHS:
        _known_paths.clear()
    found = CheckpointPath(final, final.with_name(name + SESSION_SUFFIX))
    _known_paths[parent, name] = found
    return found


# Following links costs 60 us, and a training step resolves its checkpoint's path for each layer.
_known_paths: dict[tuple[str, str], CheckpointPath] = {}
_MOST_KNOWN_PATHS = 256


def _is_same_directory(one: str, other: Path) -> bool:
    """Whether a path still leads to where it once led, and that is still there."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except OSError:
        return False


def _is_utf8(text: str) -> bool:
    """Whether tensorstore can be told of this path: it knows no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class DirectoryLock:
    """An open directory that can be locked; while it is open, its inode is not used again.

    Attributes:
      identity: Device and inode of the directory.
    """

    _descriptor = -1

    def __init__(self, descriptor: int) -> None:
        self._process = os.getpid()
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)

    def acquire(self, kind: int) -> None:
        """Waits for the `flock`, shared or exclusive; with `LOCK_NB`, raises BlockingIOError."""
        fcntl.flock(self._descriptor, kind)

    def release(self) -> None:
        """Gives the lock back; the directory stays open."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the lock back and closes the directory; a second call does nothing."""
        if self._process == os.getpid():  # closing would do, unless a forked child has it open, too
            self.release()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._descriptor >= 0:  # left by an interrupt, or by a fork
            self.close()


def open_session(where: CheckpointPath) -> DirectoryLock | None:
    """Opens the directory of a session; None where there is none.

    Raises:
      CheckpointExistsError: What is there is no directory.
    """
    try:
        return _open_directory(where.session)
    except NotADirectoryError as error:
        raise _no_directory(where, error) from error


def lock_for_saving(where: CheckpointPath, known: DirectoryLock | None) -> DirectoryLock:
    """Creates the session if there is none, and locks it against finalize and abort.

    Args:
      where: The session.
      known: Its directory, as this process has opened it before.

    Returns:
      The locked directory; `known`, if that is the one at the path still.

    Raises:
      CheckpointExistsError: The finalized checkpoint is there, or something that is not a session.
      OSError: The directory cannot be made.
    """
    is_ours = False
    directory = known
    while True:
        try:
            require_absent(where)
        except CheckpointExistsError:
            if is_ours:  # made for nothing: somebody else has finalized meanwhile
                with contextlib.suppress(OSError):
                    os.rmdir(where.session)
            raise
        if directory is None:
            directory = open_session(where)
        if directory is None:
            is_ours = _create_session(where)
            continue
        directory.acquire(fcntl.LOCK_SH)
        if identity(where.session) == directory.identity and not os.path.lexists(where.final):
            return directory
        directory.release()
        directory = None  # it was renamed away while this one waited


@contextmanager
def locked_exclusively(where: CheckpointPath) -> Iterator[None]:
    """Keeps everybody else out of a session; waits until nobody saves into it.

    Raises:
      NoSessionError: There is no session, or none any more.
      CheckpointExistsError: What is at its place is not a session.
    """
    directory = open_session(where)
    if directory is None:
        raise no_session(where)
    try:
        directory.acquire(fcntl.LOCK_EX)
        if identity(where.session) != directory.identity:
            raise no_session(where)
        if where.state.is_symlink():  # what is derived would be cleared and written elsewhere
            raise _not_a_session(where, f"its {STATE!r} is a symbolic link")
        yield
    finally:
        directory.close()


def _open_directory(directory: Path, *, follow: bool = False) -> DirectoryLock | None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return DirectoryLock(os.open(directory, flags if follow else flags | os.O_NOFOLLOW))
    except FileNotFoundError:
        return None


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keeps a finalized checkpoint from being removed meanwhile.

    Where there is none, or no lock to be had (on a file system that knows none, or without the
    permission to list the directory), nothing is locked: reading it says what is wrong.
    """
    directory = _lock_for_reading(checkpoint)
    try:
        yield
    finally:
        if directory is not None:
            directory.close()


def _lock_for_reading(checkpoint: Path) -> DirectoryLock | None:
    while True:
        try:
            directory = _open_directory(checkpoint, follow=True)
            if directory is None:
                return None
            directory.acquire(fcntl.LOCK_SH)
            status = os.stat(checkpoint)
        except OSError:
            return None
        if (status.st_dev, status.st_ino) == directory.identity:
            return directory
        directory.close()  # another one has taken its place


def remove_checkpoint(where: CheckpointPath) -> None:
    """Removes a finalized checkpoint, unless somebody reads it.

    Raises:
      CheckpointInUseError: Somebody does.
      NoSessionError: There is none, or none any more.
    """
    directory = _open_directory(where.final)
    if directory is None:
        raise _no_checkpoint(where)
    try:
        directory.acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        if identity(where.final) != directory.identity:
            raise _no_checkpoint(where)
        doomed = _rename_away(where.final)
    except BlockingIOError:
        raise CheckpointInUseError(
            errno.EWOULDBLOCK, "It is being read, and was not removed", str(where.final)
        ) from None
    finally:
        directory.close()  # who waits for it to read need not wait for the rest
    _remove_renamed(where.final, doomed)


def _no_checkpoint(where: CheckpointPath) -> NoSessionError:
    return NoSessionError(f"There is no checkpoint at {where.final}.")


def identity(directory: Path) -> tuple[int, int] | None:
    """Device and inode of a directory; None where there is none."""
    try:
        status = os.stat(directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _create_session(where: CheckpointPath) -> bool:
    """Makes the directory; returns whether nobody else had done so."""
    _make_directories(where.session.parent)
    try:
        os.mkdir(where.session)
    except FileExistsError:
        if not where.session.is_dir() or where.session.is_symlink():
            raise _not_a_session(where, "it is not a directory") from None
        return False
    return True


def _make_directories(directory: Path) -> None:
    """Makes a directory and those above it that are missing, each durable before the next.

    Also for a save that need not be durable: later nobody knows which of them were made.
    """
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has just made it
            os.mkdir(one)
        fsync_directory(one.parent)


def prepare_session(where: CheckpointPath) -> None:
    """Makes a locked session ready for this process's first part.

    Raises:
      CheckpointExistsError: The directory holds what is not a session's.
    """
    check_is_ours(where)
    os.makedirs(where.state, exist_ok=True)


def check_is_ours(where: CheckpointPath) -> None:
    """Raises CheckpointExistsError if a session's directory holds what is not a session's."""
    foreign = _foreign_entries(where)
    if foreign:
        raise _not_a_session(where, f"it holds {foreign[0]!r}")
    if where.state.is_symlink():
        raise _not_a_session(where, f"its {STATE!r} is a symbolic link")


def sync_session(where: CheckpointPath) -> None:
    """Makes a session's directories durable.

    Every process does this once, before its first durable save, whoever created them: only its own
    fsync of them is known to have happened when that save returns.
    """
    fsync_directory(where.session)
    fsync_directory(where.session.parent)


def _foreign_entries(where: CheckpointPath) -> list[str]:
    known = _STATE_FILES | _STATE_DIRECTORIES

    def is_of_parts(name: str) -> bool:
        return name.startswith(PART_PREFIX) or PART_FOLDER.fullmatch(name) is not None

    found = [name for name in listed(where.session) if name != STATE and name not in _ROOT_FILES]
    found += [
        f"{STATE}/{name}"
        for name in listed(where.state)
        if name not in known
        and not name.startswith(PART_PREFIX)
        and not PART_FOLDER.fullmatch(name)
    ]
    return found


def listed(directory: Path) -> list[str]:
    """Returns the names in a directory, in no order; none where there is no directory."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def full_disk_explained(where: CheckpointPath, needed: Callable[[], int]) -> Iterator[None]:
    """Has the error of a full disk, or a used-up quota, say what is needed and what is free.

    Args:
      where: What is written.
      needed: Says how many bytes, as far as that is known by then.
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


def _not_a_session(where: CheckpointPath, why: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        f"{where.session} is in the way: {why}, so it is not an unfinished checkpoint of "
        "flax_partial. Move it away, or use another path."
    )


def _no_directory(where: CheckpointPath, error: NotADirectoryError) -> OSError:
    """The error where the session, or one of the directories above it, is something else."""
    if os.path.lexists(where.session):
        return _not_a_session(where, "it is not a directory")
    return NotADirectoryError(error.errno, error.strerror, error.filename)


def no_session(where: CheckpointPath) -> NoSessionError:
    """The error for a session that is not there."""
    if os.path.lexists(where.final):
        return NoSessionError(f"No unfinished checkpoint: {where.final} is finalized already.")
    return NoSessionError(f"No unfinished checkpoint at {where.session}. Save something first.")


def require_absent(where: CheckpointPath) -> None:
    """Raises CheckpointExistsError if anything is at the final path."""
    if os.path.lexists(where.final):
        raise CheckpointExistsError(
            f"{where.final} exists already, finalized or made by somebody else. "
            "Use another path, or remove it first."
        )


def is_session(where: CheckpointPath) -> bool:
    """Whether there is an unfinished checkpoint."""
    return where.session.is_dir()


def has_contents(where: CheckpointPath) -> bool:
    """Whether a table of contents is there: finalize writes it, whatever a directory's name is.

    What the system does not let anybody see is not there.
    """
    try:
        return (where.state / CONTENTS).is_file()
    except OSError:
        return False


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


def holds(path: Path, pieces: Sequence[bytes]) -> bool:
    """Whether there is a file with just this content, given piece by piece."""
    try:
        with _open(path) as file:
            if os.fstat(file.fileno()).st_size != sum(map(len, pieces)):
                return False
            return all(file.read(len(piece)) == piece for piece in pieces)
    except (CorruptCheckpointError, FileNotFoundError, NotADirectoryError):
        return False


def bytes_below(directory: Path) -> int:
    """Returns the size of all files below a directory."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(directory)
        for name in names
    )


def create_part(where: CheckpointPath, name: str) -> Path:
    """Makes the directory of a part, and the folder around it that its name may have."""
    directory = where.state / name
    try:
        os.mkdir(directory)
    except FileNotFoundError:
        if directory.parent == where.state:
            raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory.parent)
        fsync_directory(where.state)
        os.mkdir(directory)
    return directory


def is_committed(where: CheckpointPath, name: str) -> bool:
    """Whether a part's table of contents is there."""
    return (where.state / name / PART_TABLE).exists()


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
        os.fsync(copy.fileno())


def commit_part(directory: Path, table: bytes, *, has_data_file: bool, durable: bool) -> None:
    """Commits a part whose data is durable: its table of contents appears, whole or not at all.

    The order matters in a power cut: a table that is there before its data, or before the name of
    its data file, would commit a corrupt part.
    """
    temporary = directory / (PART_TABLE + ".tmp")
    _write(temporary, (table,), durable=durable)
    if durable and has_data_file:
        fsync_directory(directory)
    os.rename(temporary, directory / PART_TABLE)
    if durable:
        fsync_directory(directory)
        fsync_directory(directory.parent)


def size_of_data(where: CheckpointPath, path: str) -> int:
    """Size of a data file, given its path below `state/`, in bytes; 0 where there is none."""
    try:
        return os.stat(where.state / path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def commit_checkpoint(
    where: CheckpointPath, *, root_files: Mapping[str, Sequence[bytes]], contents: bytes
) -> None:
    """Writes the root files, and renames the session. All durable.

    Raises:
      CheckpointExistsError: Something appeared at the final path; the session is left as it was.
    """
    files = {**root_files, f"{STATE}/{CONTENTS}": (contents,)}
    directories = {where.session, where.state}
    for name, pieces in files.items():
        path = where.session / name
        if path.parent not in directories:
            os.makedirs(path.parent, exist_ok=True)
            directories.add(path.parent)
        _write(path, pieces, durable=True)
    for directory in sorted(directories, reverse=True):  # the inner ones first
        fsync_directory(directory)
    _rename_to_new(where.session, where.final)
    try:
        fsync_directory(where.final.parent)
    except OSError as error:
        _take_back(where, error)
        raise


def _take_back(where: CheckpointPath, error: OSError) -> None:
    """Makes a checkpoint a session again: an error of finalize means that there is none."""
    try:
        _rename_to_new(where.final, where.session)
    except OSError:
        error.add_note(
            f"{where.final} is there nevertheless, and complete. What failed is to make its name "
            "durable: in a power cut it may become an unfinished checkpoint again."
        )


def clear_root(where: CheckpointPath) -> None:
    """Removes what an attempt to finalize left: files that are derived from the parts."""
    for name in sorted(_ROOT_FILES):
        (where.session / name).unlink(missing_ok=True)
    for name in sorted(_STATE_FILES):
        (where.state / name).unlink(missing_ok=True)
    for name in sorted(_STATE_DIRECTORIES):
        _remove_tree(where.state / name)


def remove_part(where: CheckpointPath, name: str) -> None:
    """Removes the directory of a part that does not count.

    Its table of contents goes first: one that outlived the data would make a corrupt part of it.
    """
    directory = where.state / name
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / PART_TABLE)
        fsync_directory(directory)
    _remove_tree(directory)


def may_have_table(where: CheckpointPath, name: str) -> bool:
    """Whether a part's table of contents is there, or nobody can say."""
    try:
        os.lstat(where.state / name / PART_TABLE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def remove_session(where: CheckpointPath) -> None:
    """Drops a locked session: renamed away first, so that no half of it looks like a session.

    Raises:
      CheckpointExistsError: The directory holds what is not a session's; nothing is removed.
      NoSessionError: It is gone.
    """
    check_is_ours(where)
    try:
        remove_directory(where.session)
    except FileNotFoundError:  # made for nothing by a save that came too late, which removed it
        raise no_session(where) from None


def remove_directory(directory: Path) -> None:
    """Removes a directory that others may be looking at: it disappears at once, then is deleted."""
    _remove_renamed(directory, _rename_away(directory))


def _rename_away(directory: Path) -> Path:
    doomed = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}{DELETED_SUFFIX}")
    os.rename(directory, doomed)
    return doomed


def _remove_renamed(directory: Path, doomed: Path) -> None:
    try:
        fsync_directory(directory.parent)  # else a power cut may bring back half of it
        _remove_tree(doomed)
    except OSError as error:
        error.add_note(f"{directory} is gone; what is left of it lies in {doomed}.")
        raise


def _remove_tree(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return


def _write(path: Path, pieces: Sequence[bytes], *, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for data in _joined(pieces):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _joined(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Joins small pieces to some that are worth a call of the system each."""
    if len(pieces) == 1:
        yield pieces[0]
        return
    batch, size = [], 0
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
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _rename_to_new(temporary, path)
    except CheckpointExistsError:
        temporary.unlink()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    _fsync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_new(source: Path, target: Path) -> None:
    """Renames without replacing anything: plain rename(2) would replace an empty directory."""
    code = _renameat2(source, target)
    if code in (errno.EINVAL, errno.ENOSYS):  # the file system, or the kernel, does not know it
        if not os.path.lexists(target):
            os.rename(source, target)
            return
        code = errno.EEXIST
    if code == errno.EEXIST:
        raise CheckpointExistsError(f"{target} exists already; the session {source} was kept.")
    if code:
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def _renameat2(source: Path, target: Path) -> int:
    """Returns the error number, 0 for success; ENOSYS where the C library has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    old, new = os.fsencode(source), os.fsencode(target)
    if call(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
        return 0
    return ctypes.get_errno()
