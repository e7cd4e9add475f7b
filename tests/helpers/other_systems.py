"""Masks under which Linux lacks what other systems lack, and a tour of the package to run there.

Run as a script, `other_systems.py DIRECTORY NAME` puts the masks of `TOGETHER[NAME]` on before the
package is imported.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MOST_BYTES = 1 << 16  # in the place of 2 GiB
_F_FULLFSYNC = 51
_RENAME_NOREPLACE, _RENAME_EXCL = 1, 4
_AT_FDCWD = -100
_REAL_LIBRARY = ctypes.CDLL(None, use_errno=True)


def no_o_direct(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "O_DIRECT")


def full_sync(patch: pytest.MonkeyPatch) -> None:
    """F_FULLFSYNC is there, and fsync fails the test."""
    real_sync, real_fcntl = os.fsync, fcntl.fcntl

    def syncing(descriptor: int, command: int, argument: int = 0) -> int:
        if command != _F_FULLFSYNC:
            return real_fcntl(descriptor, command, argument)
        real_sync(descriptor)
        return 0

    def no_fsync(_: int) -> None:
        raise AssertionError("what fsync has done does not outlive a power cut")

    patch.setattr(fcntl, "F_FULLFSYNC", _F_FULLFSYNC, raising=False)
    patch.setattr(fcntl, "fcntl", syncing)
    patch.setattr(os, "fsync", no_fsync)


def full_sync_refused(patch: pytest.MonkeyPatch, code: int = errno.ENOTSUP) -> None:
    """F_FULLFSYNC is there, and the file system does not support it."""
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, argument: int = 0) -> int:
        if command == _F_FULLFSYNC:
            raise OSError(code, os.strerror(code))
        return real(descriptor, command, argument)

    patch.setattr(fcntl, "F_FULLFSYNC", _F_FULLFSYNC, raising=False)
    patch.setattr(fcntl, "fcntl", refusing)


class _Library:
    """The C library with some of its functions only."""

    def __init__(
        self, patch: pytest.MonkeyPatch, *missing: str, **added: Callable[..., int]
    ) -> None:
        self._missing, self._added = missing, added
        patch.setattr(ctypes, "CDLL", lambda *_, **__: self)

    def __getattr__(self, name: str) -> Any:
        if name in self._added:
            return self._added[name]
        if name in self._missing:
            raise AttributeError(name)
        return getattr(_REAL_LIBRARY, name)


def _renamex_np(old: bytes, new: bytes, flags: int) -> int:
    assert flags == _RENAME_EXCL
    result: int = _REAL_LIBRARY.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE)
    return result


def _refused(*_: object) -> int:
    ctypes.set_errno(errno.ENOTSUP)
    return -1


def renamex_np(patch: pytest.MonkeyPatch) -> None:
    _Library(patch, "renameat2", "malloc_trim", renamex_np=_renamex_np)


def renamex_np_refused(patch: pytest.MonkeyPatch) -> None:
    _Library(patch, "renameat2", "malloc_trim", renamex_np=_refused)


def plain_c_library(patch: pytest.MonkeyPatch) -> None:
    _Library(patch, "renameat2", "malloc_trim")


def no_vectors(patch: pytest.MonkeyPatch) -> None:
    for name in ("readv", "preadv", "writev", "pwritev"):
        patch.delattr(os, name)


def _refuse_beyond(size: int) -> None:
    if size > MOST_BYTES:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class _RawFile(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        _refuse_beyond(len(buffer))
        return super().readinto(buffer)


def small_transfers(patch: pytest.MonkeyPatch) -> None:
    """A read or a write of more than a limit is refused."""
    from flax_partial.storage import direct_io, system

    patch.setattr(system, "MOST_BYTES", MOST_BYTES)
    assert direct_io._AT_ONCE_BYTES < 1 << 30  # noqa: SLF001 - it is lowered like the other
    patch.setattr(direct_io, "_AT_ONCE_BYTES", MOST_BYTES)

    def limit(name: str, size_of: Callable[[Any], int]) -> None:
        real = getattr(os, name)

        def limited(descriptor: int, data: Any, *more: Any) -> Any:
            _refuse_beyond(size_of(data))
            return real(descriptor, data, *more)

        patch.setattr(os, name, limited)

    limit("write", len)
    limit("pwrite", len)
    if hasattr(os, "writev"):  # else another mask is on, too
        limit("writev", lambda views: sum(map(len, views)))
    path_open = Path.open

    def opening(path: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        return _RawFile(path) if buffering == 0 else path_open(path, mode, buffering, **options)

    patch.setattr(Path, "open", opening)


def links_loop(patch: pytest.MonkeyPatch) -> None:
    """A link that is not to be followed is ELOOP, even where a directory is wanted."""
    real = os.open

    def opening(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_NOFOLLOW and Path(path).is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return real(path, flags, *arguments, **options)

    patch.setattr(os, "open", opening)


def fsync_refused(
    patch: pytest.MonkeyPatch, code: int = errno.EINVAL, *, of_files: bool = False
) -> None:
    """The file system has no fsync for directories, as SMB; or for nothing at all."""
    real = os.fsync

    def refusing(descriptor: int) -> None:
        if of_files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    patch.setattr(os, "fsync", refusing)


def no_links(patch: pytest.MonkeyPatch) -> None:
    """The file system has no hard links, as FAT, SMB and much of FUSE."""

    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    patch.setattr(os, "link", refusing)


def o_direct_refused_late(patch: pytest.MonkeyPatch) -> None:
    """A file is opened with O_DIRECT, and cannot be written so; a server keeps that flag."""
    real, real_fcntl = os.writev, fcntl.fcntl

    def refusing(descriptor: int, views: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, views)

    def keeping(descriptor: int, command: int, argument: int = 0) -> int:
        return 0 if command == fcntl.F_SETFL else real_fcntl(descriptor, command, argument)

    patch.setattr(os, "writev", refusing)
    patch.setattr(fcntl, "fcntl", keeping)


def no_flock(patch: pytest.MonkeyPatch, code: int = errno.ENOSYS) -> None:
    """The file system has no locks, as Lustre's where it is mounted without them."""

    def refusing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    patch.setattr(fcntl, "flock", refusing)


def poor_cluster(patch: pytest.MonkeyPatch) -> None:
    """No locks, no hard links, no fsync of directories, and O_DIRECT fails late."""
    for mask in (no_flock, no_links, fsync_refused, o_direct_refused_late):
        mask(patch)


MASKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "none": lambda _: None,
    "no O_DIRECT": no_o_direct,
    "F_FULLFSYNC": full_sync,
    "F_FULLFSYNC refused": full_sync_refused,
    "renamex_np": renamex_np,
    "renamex_np refused": renamex_np_refused,
    "no exclusive rename, no malloc_trim": plain_c_library,
    "no readv, writev": no_vectors,
    "small transfers": small_transfers,
    "ELOOP for links": links_loop,
    "no fsync of directories": fsync_refused,
    "no hard links": no_links,
    "O_DIRECT refused late": o_direct_refused_late,
    "no flock (ENOSYS)": no_flock,
    "no flock (ENOTSUP)": lambda patch: no_flock(patch, errno.ENOTSUP),
    "no flock (ENOLCK)": lambda patch: no_flock(patch, errno.ENOLCK),
    "a poor cluster": poor_cluster,
}
# `small_transfers` imports the package, so it comes last.
TOGETHER = {
    "macOS": (no_o_direct, full_sync, renamex_np, links_loop, small_transfers),
    "macOS on a network": (
        *(no_o_direct, full_sync_refused, fsync_refused),
        *(renamex_np_refused, no_links, links_loop),
    ),
    "old and poor": (no_o_direct, plain_c_library, no_vectors, links_loop, small_transfers),
}


def tour(directory: Path) -> None:
    """Saves, finalizes, loads, verifies, shares, removes; trains a loop; runs commands."""
    _by_hand(directory)
    _in_a_loop(directory / "run")
    _by_commands(directory)


def _by_hand(directory: Path) -> None:
    import jax.numpy as jnp
    import numpy as np

    import flax_partial as fp

    random = np.random.default_rng(0)
    large, odd = random.random((3, 1 << 17)), random.random(20_001)
    first, second = directory / "1", directory / "2"
    bounded = fp.SaveOptions(max_inflight_bytes=1 << 20)
    fp.save(first, {"large": jnp.zeros(5), "small": 1})
    fp.save(first, {"large": large}, replace=True, options=fp.SaveOptions(chunk_bytes=1 << 18))
    fp.save_async(first, {"odd": odd}, options=bounded).result()
    fp.save_async(first, {"packed": odd}, options=fp.SaveOptions(compression="zstd")).result()
    first.mkdir()  # which a plain rename would replace
    with pytest.raises(fp.CheckpointExistsError):
        fp.finalize(first)
    first.rmdir()
    fp.finalize(first)
    with pytest.raises(fp.CheckpointExistsError):
        fp.save(first, {"small": 2})

    fp.save(second, {"large": large, "odd": odd + 1}, reuse=first)
    fp.finalize_async(second).result()
    fp.remove(first)
    loaded = fp.load(second)
    assert fp.verify(second).ok
    np.testing.assert_array_equal(loaded["large"], large)
    np.testing.assert_array_equal(loaded["odd"], odd + 1)

    link = directory / "link"
    link.symlink_to(second)
    assert fp.load(link, {"odd": odd}, partial=True)["odd"].shape == odd.shape
    with pytest.raises(NotADirectoryError):
        fp.remove(link)
    (directory / "3.partial_save").symlink_to(second)
    for change in (
        lambda: fp.save(directory / "3", {"small": 1}),
        lambda: fp.abort(directory / "3"),
    ):
        with pytest.raises(fp.CheckpointExistsError, match="is in the way"):
            change()
    fp.save(directory / "4", {"small": 1})
    fp.abort(directory / "4")


def _in_a_loop(directory: Path) -> None:
    import numpy as np

    import flax_partial as fp
    from flax_partial.callbacks.plain import checkpointing

    state = {"w": np.arange(300_000.0), "step": 0}
    with checkpointing(directory, every_n_train_steps=2, keep_last=1) as checkpoints:
        for step in range(1, 5):
            state = {"w": state["w"] + 1, "step": step}
            checkpoints.step(state)
    with checkpointing(directory) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(state)["w"], state["w"])
    assert fp.steps(directory) == [4]


def _by_commands(directory: Path) -> None:
    from flax_partial.cli.main import FINE, main

    step = str(directory / "run" / "4")
    for arguments in (
        ("ls", str(directory / "run")),
        ("show", step),
        ("verify", step),
        ("diff", step, step),
        ("export", str(directory / "2"), str(directory / "2.safetensors")),
        ("rm", "--yes", step),
    ):
        assert main(arguments) == FINE, arguments


if __name__ == "__main__":
    for mask in TOGETHER[sys.argv[2]]:
        mask(pytest.MonkeyPatch())
    tour(Path(sys.argv[1]))
