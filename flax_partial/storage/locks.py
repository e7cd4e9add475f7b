"""Open directories, and files, that can be locked by `flock`; and where such locks hold.

The kernel drops the lock of a process that dies. Sessions and checkpoints are locked by their own
directories: there is no lock file. A living run locks a file, whose text names it.

On a cluster's file systems these locks are missing, or local to a machine. Linux's clients of NFS,
SMB and FUSE, and Lustre's, pass the `flock` of a file on to their server, if they are mounted so,
but have none for directories, whose locks the kernel then keeps for one machine. That cannot be
found out by trying: the type of the file system decides.
"""

import contextlib
import errno
import fcntl
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from flax_partial.storage import medium

VARIABLE = "FLAX_PARTIAL_LOCKS"
"""The environment variable that chooses: "flock", "files", or "auto", the default."""

# Types of file systems, as proc_pid_mountinfo(5) has them in lower case, on which the lock of a
# directory does not keep out another machine. It does on Ceph's (not by FUSE), GFS2 and OCFS2.
_LOCAL_LOCKS = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs"),
        *("lustre", "gpfs", "beegfs", "panfs", "pvfs2", "wekafs"),
        *("fuse.ceph-fuse", "fuse.daos", "fuse.glusterfs", "fuse.juicefs", "fuse.lizardfs"),
        *(
            "fuse.mfs",
            "fuse.moosefs",
            "fuse.quobyte",
            "fuse.saunafs",
            "fuse.seaweedfs",
            "fuse.sshfs",
        ),
    )
)
# A bucket as a directory, which is renamed file by file.
_BUCKETS = frozenset(
    ("fuse.blobfuse2", "fuse.gcsfuse", "fuse.geesefs", "fuse.goofys", "fuse.rclone", "fuse.s3fs")
)
# Errors of a file system without `flock`, or without it for what is open for reading only.
MISSING = frozenset(
    (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
)
_NO_LOCKS = (
    f"%s has no locks that hold between machines: control files, and leases that are renewed, take "
    f"their place. ({VARIABLE}=flock uses locks where a single machine writes.)"
)
_NO_RENAMES = (
    "%s cannot rename a directory at once: a checkpoint that others read, or that a process dies "
    "over, while it is finalized there may be damaged. Give s3:// or gs:// where it is a bucket."
)

_MOST_BYTES = 4096  # of what the text of a lock may be


class DirectoryLock:
    """An open directory that can be locked; while it is open, its inode is not used again.

    Attributes:
      identity: Device and inode of the directory.
    """

    mark = ""  # what the names of a session's parts have to hold
    is_new = False  # whether it is known to hold no part
    _descriptor = -1

    def __init__(self, descriptor: int) -> None:
        self._process = os.getpid()
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)

    @property
    def descriptor(self) -> int:
        """That of the open directory."""
        return self._descriptor

    def acquire(self, kind: int) -> None:
        """Waits for the `flock`, shared or exclusive; with `LOCK_NB`, raises BlockingIOError."""
        fcntl.flock(self._descriptor, kind)

    def try_exclusive(self) -> bool:
        """Acquires the exclusive `flock`; returns False where another process has one."""
        try:
            self.acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Gives the lock back; the directory stays open."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the lock back and closes the directory; a second call does nothing."""
        if self._process == os.getpid():  # closing would do, unless a forked child has it open, too
            with contextlib.suppress(OSError):  # of a file system without locks
                self.release()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self, _is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._descriptor >= 0 and not _is_ending():  # left by an interrupt, or by a fork
            self.close()


def open_directory(directory: Path, *, follow: bool = False) -> DirectoryLock | None:
    """Opens a directory, through a symbolic link only with `follow`; None where there is none.

    Raises:
      NotADirectoryError: Something else is there.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return DirectoryLock(os.open(directory, flags if follow else flags | os.O_NOFOLLOW))
    except FileNotFoundError:
        return None
    except OSError as error:
        # Of a link that is not followed, Linux reports ENOTDIR, and macOS ELOOP.
        if error.errno == errno.ELOOP and not follow and os.path.islink(directory):
            code = errno.ENOTDIR
            raise NotADirectoryError(code, os.strerror(code), str(directory)) from None
        raise


class FileLock(DirectoryLock):
    """An open file that can be locked in the same way; its text names the holder."""

    def read(self) -> str:
        """Returns the text."""
        return os.pread(self._descriptor, _MOST_BYTES, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        """Replaces the text."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def open_file(path: Path) -> FileLock | None:
    """Opens a file to look at its lock; None where there is none.

    Raises:
      OSError: It cannot be opened.
    """
    try:
        return FileLock(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return None


def make_file(path: Path) -> FileLock:
    """Opens a file to lock it and to write to it; makes it if need be.

    Raises:
      OSError: It cannot be made, or opened.
    """
    return FileLock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))


def are_shared(directory: Path) -> bool:
    """Whether a `flock` on a directory keeps all others out, on whatever machine.

    Where it does not, that is logged once, and so is where directories are not renamed at once.

    Args:
      directory: A directory that is there. What may not be opened is taken for one with locks.

    Raises:
      ValueError: The environment variable has another value.
      OSError: It demands locks, and there are none.
    """
    chosen = os.environ.get(VARIABLE) or "auto"
    if chosen not in {"auto", "flock", "files"}:
        raise ValueError(f"{VARIABLE} is 'auto', 'flock' or 'files', not {chosen!r}")
    if chosen == "auto":
        mount = medium.mount_of(directory)
        is_local = mount is not None and mount.kind.lower() in _LOCAL_LOCKS
        if mount is not None and mount.kind in _BUCKETS:
            medium.say_once(directory, logging.WARNING, _NO_RENAMES)
        shared = not is_local and _are_there(directory)
    else:
        shared = chosen == "flock"
        if shared and not _are_there(directory):
            raise OSError(errno.ENOLCK, f"{VARIABLE}=flock, and it has no locks", str(directory))
    if not shared:
        medium.say_once(directory, logging.INFO, _NO_LOCKS)
    return shared


def _are_there(directory: Path) -> bool:
    """Whether a directory can be locked at all."""
    try:
        lock = open_directory(directory, follow=True)
    except OSError:
        return True
    if lock is not None:
        with contextlib.closing(lock):
            try:
                lock.acquire(fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError as error:
                return error.errno not in MISSING
    return True
