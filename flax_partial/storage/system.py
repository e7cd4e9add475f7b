"""Calls that systems other than Linux lack, or make under another name.

What is missing is looked for at each call, and has a replacement here: a durable write is as safe
without it, though not always as fast.
"""

import ctypes
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from flax_partial.storage import medium

MOST_BYTES = 1 << 30
"""What one read or write is asked for: macOS refuses 2 GiB and more, Linux cuts it short."""

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # of renameat2, Linux
_RENAME_EXCL = 4  # of renamex_np, macOS
# What F_FULLFSYNC raises on file systems that do not have it, such as those of a network.
_NO_FULL_SYNC = frozenset(
    (errno.EINVAL, errno.ENODEV, errno.ENOTSUP, errno.ENOTTY, errno.EOPNOTSUPP)
)
# What fsync raises where a file system does not have it, mostly for directories: SMB, some FUSE.
_NO_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY))
_NO_SYNC_OF_DIRECTORIES = _NO_SYNC | {errno.EBADF, errno.EISDIR}
_NOT_DURABLE = (
    "%s has no fsync for {}: what is saved there outlives the process, and may not outlive a power "
    "cut"
)


def sync(descriptor: int) -> None:
    """Puts a file, or the names in a directory, on the disk, as far as its file system can do that.

    Where it cannot, that is logged once.

    On macOS fsync leaves them in the disk's own cache, which a power cut empties; fsync(2) there
    names F_FULLFSYNC for what has to outlive one.

    Raises:
      OSError: It failed; what was written may be lost.
    """
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:  # else fsync could succeed after a failed write
                raise
        else:
            return
    try:
        os.fsync(descriptor)
    except OSError as error:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if error.errno not in (_NO_SYNC_OF_DIRECTORIES if is_directory else _NO_SYNC):
            raise
        what = "directories" if is_directory else "files"
        medium.say_once(descriptor, logging.WARNING, _NOT_DURABLE.format(what))


def write(descriptor: int, views: Sequence[memoryview]) -> int:
    """Writes at least one byte of some memory, in order; returns how many bytes that were.

    Args:
      descriptor: The file.
      views: Not empty; at most 1,000 of them, of `MOST_BYTES` in all.

    Raises:
      OSError: Writing failed.
    """
    if hasattr(os, "writev"):
        return os.writev(descriptor, views)
    return os.write(descriptor, views[0])


def rename_exclusively(source: Path, target: Path) -> int:
    """Renames unless something is at `target`.

    Returns:
      The error number: 0 for success, EEXIST where something is there, EINVAL, ENOSYS or ENOTSUP
      where the system, or the file system, cannot do this.
    """
    library = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if (renameat2 := getattr(library, "renameat2", None)) is not None:
        failed = renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE)
    elif (renamex_np := getattr(library, "renamex_np", None)) is not None:
        failed = renamex_np(old, new, _RENAME_EXCL)
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if failed else 0
