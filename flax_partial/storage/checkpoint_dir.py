"""The directory of a finalized checkpoint: reading it, and removing it.

It is locked shared while it is read, and exclusively while it is renamed away to be removed, which
waits for no reader.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flax_partial.errors import (
    CheckpointInUseError,
    NoSessionError,
)
from flax_partial.storage import files, locks
from flax_partial.storage.locks import DirectoryLock, open_directory
from flax_partial.storage.paths import CheckpointPath


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keeps a finalized checkpoint from being removed meanwhile.

    Where there is none, or no lock to be had (on a file system without locks, or without the
    permission to list the directory), nothing is locked: reading it raises what is wrong.
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
            directory = open_directory(checkpoint, follow=True)
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
    """Removes a finalized checkpoint, unless it is being read.

    Raises:
      CheckpointInUseError: It is.
      NoSessionError: There is none, or none any more.
    """
    directory = open_directory(where.final)
    if directory is None:
        raise _no_checkpoint(where)
    try:
        try:
            directory.acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in locks.MISSING:  # else readers are told that it was removed
                raise
        if files.identity(where.final) != directory.identity:
            raise _no_checkpoint(where)
        doomed = files.rename_away(where.final)
        if files.identity(doomed) != directory.identity:  # it has come to its place, without locks
            files.rename_to_new(doomed, where.final)
            raise _no_checkpoint(where)
    except FileNotFoundError as error:
        if isinstance(error, NoSessionError):
            raise
        raise _no_checkpoint(where) from error
    except BlockingIOError:
        raise CheckpointInUseError(
            errno.EWOULDBLOCK, "It is being read, and was not removed", str(where.final)
        ) from None
    finally:
        directory.close()  # who waits for it to read need not wait for the rest
    files.remove_renamed(where.final, doomed)


def _no_checkpoint(where: CheckpointPath) -> NoSessionError:
    return NoSessionError(f"There is no checkpoint at {where.final}.")
