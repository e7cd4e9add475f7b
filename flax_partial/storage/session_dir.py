"""The directory of a session: its locks, its parts, the commit of a part and of the checkpoint.

A session is the directory `<checkpoint>.partial_save`. A process holds a shared `flock` on the
directory itself while it saves into it, an exclusive one while it finalizes or aborts. After
waiting, the inode behind the path is compared with the one that was locked: the session may have
been renamed away meanwhile.
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePath

from flax_partial.errors import (
    CheckpointExistsError,
    NoSessionError,
)
from flax_partial.storage import files
from flax_partial.storage.locks import DirectoryLock, open_directory
from flax_partial.storage.paths import (
    CONTENTS,
    PART_FOLDER,
    PART_PREFIX,
    PART_TABLE,
    STATE,
    CheckpointPath,
)

_ROOT_FILES = frozenset(("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt"))
_ROOT_DIRECTORIES = frozenset(("metrics",))
_STATE_FILES = frozenset(("_METADATA", "_sharding", "_strings.json", CONTENTS, "manifest.ocdbt"))
_STATE_DIRECTORIES = frozenset(("array_metadatas", "d"))
CONTROL = f"{STATE}/session"
"""Where control files are, where they take the place of locks (`unlocked_place`)."""


def open_session(where: CheckpointPath) -> DirectoryLock | None:
    """Opens the directory of a session; None where there is none.

    Raises:
      CheckpointExistsError: What is there is no directory.
    """
    try:
        return open_directory(where.session)
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
            if is_ours:  # made for nothing: another process has finalized meanwhile
                with contextlib.suppress(OSError):
                    os.rmdir(where.session)
            raise
        if directory is None:
            directory = open_session(where)
        if directory is None:
            is_ours = create_session(where)
            continue
        directory.acquire(fcntl.LOCK_SH)
        if files.identity(where.session) == directory.identity and not os.path.lexists(where.final):
            return directory
        directory.release()
        directory = None  # it was renamed away while this one waited


@contextmanager
def locked_exclusively(where: CheckpointPath, pause: Callable[[], None]) -> Iterator[None]:
    """Locks all others out of a session; waits until no save into it is under way.

    Args:
      where: The session.
      pause: Called between two tries, while one is; what it raises ends the wait.

    Raises:
      NoSessionError: There is no session, or none any more.
      CheckpointExistsError: What is at its place is not a session.
    """
    directory = open_session(where)
    if directory is None:
        raise no_session(where)
    try:
        while not directory.try_exclusive():
            pause()
        if files.identity(where.session) != directory.identity:
            raise no_session(where)
        check_state(where)  # what is derived would be cleared and written elsewhere
        yield
    finally:
        directory.close()


def create_session(where: CheckpointPath) -> bool:
    """Makes the directory; returns whether no other process had done so."""
    files.make_directories(where.session.parent)
    try:
        os.mkdir(where.session)
    except FileExistsError:
        if not where.session.is_dir() or where.session.is_symlink():
            raise _not_a_session(where, "it is not a directory") from None
        return False
    return True


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
    check_state(where)


def check_state(where: CheckpointPath) -> None:
    """Raises CheckpointExistsError if the parts of a session would be elsewhere."""
    if where.state.is_symlink():
        raise _not_a_session(where, f"its {STATE!r} is a symbolic link")


def sync_session(where: CheckpointPath) -> None:
    """Makes a session's directories durable.

    Every process does this once, before its first durable save, even if another created them: only
    its own fsync of them is known to have happened when that save returns.
    """
    files.fsync_directory(where.session)
    files.fsync_directory(where.session.parent)


def _foreign_entries(where: CheckpointPath) -> list[str]:
    known = _STATE_FILES | _STATE_DIRECTORIES | {os.path.basename(CONTROL)}

    def is_of_parts(name: str) -> bool:
        return name.startswith(PART_PREFIX) or PART_FOLDER.fullmatch(name) is not None

    root = _ROOT_FILES | _ROOT_DIRECTORIES | {STATE}
    found = [name for name in files.listed(where.session) if name not in root]
    found += [
        f"{directory}/{name}"
        for directory in _ROOT_DIRECTORIES
        for name in files.listed(where.session / directory)
        if name != directory  # the file in it is called like it
    ]
    found += [
        f"{STATE}/{name}"
        for name in files.listed(where.state)
        if name not in known and not is_of_parts(name)
    ]
    return found


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
    if _is_run(where.final):
        return NoSessionError(
            f"No unfinished checkpoint: {where.final} is a run's directory, not a checkpoint."
        )
    if os.path.lexists(where.final):
        return NoSessionError(f"No unfinished checkpoint: {where.final} is finalized already.")
    return NoSessionError(f"No unfinished checkpoint at {where.session}. Save something first.")


def require_absent(where: CheckpointPath) -> None:
    """Raises CheckpointExistsError if anything is at the final path."""
    if not os.path.lexists(where.final):
        return
    if _is_run(where.final):
        raise CheckpointExistsError(
            f"{where.final} is a run's directory, which holds checkpoints: save into a path below "
            f"it, such as {where.final / 'STEP'}."
        )
    raise CheckpointExistsError(
        f"{where.final} exists already, finalized or made by another program. "
        "Use another path, or remove it first."
    )


def _is_run(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return any((entry / STATE).is_dir() for entry in directory.iterdir())
    return False


def is_session(where: CheckpointPath) -> bool:
    """Whether there is an unfinished checkpoint."""
    return where.session.is_dir()


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
        files.fsync_directory(where.state)
        os.mkdir(directory)
    return directory


def commit_part(directory: Path, table: bytes, *, has_data_file: bool, durable: bool) -> None:
    """Commits a part whose data is durable: its table of contents appears, whole or not at all.

    The order matters in a power cut: a table that is there before its data, or before the name of
    its data file, would commit a corrupt part.
    """
    temporary = directory / (PART_TABLE + ".tmp")
    files.write(temporary, (table,), durable=durable)
    if durable and has_data_file:
        files.fsync_directory(directory)
    os.rename(temporary, directory / PART_TABLE)
    if durable:
        files.fsync_directory(directory)
        files.fsync_directory(directory.parent)


def size_of_data(where: CheckpointPath, path: str) -> int:
    """Size of a data file, given its path below `state/`, in bytes; 0 where there is none."""
    try:
        return os.stat(where.state / path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def commit_checkpoint(
    where: CheckpointPath, *, root_files: Iterable[tuple[str, Iterable[bytes]]], contents: bytes
) -> None:
    """Writes the root files (path, content), and renames the session. All durable.

    Raises:
      CheckpointExistsError: Something appeared at the final path; the session is left as it was.
    """
    directories = {where.session, where.state}
    for name, pieces in chain(root_files, [(f"{STATE}/{CONTENTS}", (contents,))]):
        path = where.session / name
        if path.parent not in directories:
            os.makedirs(path.parent, exist_ok=True)
            directories.add(path.parent)
        files.write(path, pieces, durable=True)
    for directory in sorted(directories, reverse=True):  # the inner ones first
        files.fsync_directory(directory)
    publish(where)


def write_root_at(
    session: int, root_files: Iterable[tuple[str, Iterable[bytes]]], *, scratch: str
) -> None:
    """Writes root files durably into a session that is not locked.

    Others may be writing the same ones, so that each is written elsewhere and renamed; and the
    session may be renamed meanwhile, so that no path leads to it.

    Args:
      session: The descriptor of its directory.
      root_files: Path and content of each.
      scratch: A directory in it, in which files are written.
    """
    directories = {"", STATE}
    for name, pieces in root_files:
        folder = os.path.dirname(name)
        if folder not in directories:
            for one in map(str, (*reversed(PurePath(folder).parents), folder)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(one, dir_fd=session)
            directories.add(folder)
        written = f"{scratch}/.{uuid.uuid4().hex}.tmp"
        try:
            files.write(written, pieces, durable=True, within=session)
            os.replace(written, name, src_dir_fd=session, dst_dir_fd=session)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(written, dir_fd=session)
            raise
    for folder in sorted(directories, reverse=True):  # the inner ones first
        files.fsync_directory(folder or ".", within=session)


def publish(where: CheckpointPath) -> None:
    """Renames the session, durably.

    Raises:
      CheckpointExistsError: Something appeared at the final path; the session is left as it was.
    """
    files.rename_to_new(where.session, where.final)
    try:
        files.fsync_directory(where.final.parent)
    except OSError as error:
        _take_back(where, error)
        raise


def _take_back(where: CheckpointPath, error: OSError) -> None:
    """Makes a checkpoint a session again: an error of finalize means that there is none."""
    try:
        files.rename_to_new(where.final, where.session)
    except OSError:
        error.add_note(
            f"{where.final} is there nevertheless, and complete. What failed is to make its name "
            "durable: in a power cut it may become an unfinished checkpoint again."
        )


def clear_root(where: CheckpointPath) -> None:
    """Removes what an attempt to finalize left: files that are derived from the parts."""
    for name in sorted(_ROOT_FILES):
        (where.session / name).unlink(missing_ok=True)
    for name in sorted(_ROOT_DIRECTORIES):
        files.remove_tree(where.session / name)
    for name in sorted(_STATE_FILES):
        (where.state / name).unlink(missing_ok=True)
    for name in sorted(_STATE_DIRECTORIES):
        files.remove_tree(where.state / name)


def remove_part(where: CheckpointPath, name: str) -> None:
    """Removes the directory of a part that does not count.

    Its table of contents goes first: one that outlived the data would make a corrupt part of it.
    """
    directory = where.state / name
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / PART_TABLE)
        files.fsync_directory(directory)
    files.remove_tree(directory)


def may_have_table(where: CheckpointPath, name: str) -> bool:
    """Whether a part's table of contents is there, or may be."""
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
        files.remove_directory(where.session)
    except FileNotFoundError:  # made for nothing by a save that came too late, which removed it
        raise no_session(where) from None
