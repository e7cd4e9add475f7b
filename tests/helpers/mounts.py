"""File systems that are mounted for a test, each in a process that has mounts of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from preloaded import server

import flax_partial as fp
from flax_partial.callbacks.plain import checkpointing
from flax_partial.storage import medium

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS, of unshare(2)
_X = np.arange(300_000.0)


class CannotMountError(Exception):
    """A program is missing here, or a permission."""


def bind(at: Path, beside: Path) -> None:
    _run("mount", "--bind", beside, at)


def tmpfs(at: Path, beside: Path) -> None:  # noqa: ARG001
    _run("mount", "-t", "tmpfs", "none", at)


def overlay(at: Path, beside: Path) -> None:
    _run("mount", "-t", "overlay", "overlay", "-o", _layers(beside), at)


def fuse_overlayfs(at: Path, beside: Path) -> None:
    _run("fuse-overlayfs", "-o", _layers(beside), at)


def mergerfs(at: Path, beside: Path) -> None:
    _run("mergerfs", beside, at)


def image(kind: str) -> Callable[[Path, Path], None]:
    """Mounts a file that holds a file system."""

    def mount(at: Path, beside: Path) -> None:
        with (beside / "image").open("wb") as file:
            file.truncate(320 << 20)  # xfs takes no less than 300 MiB
        _run(f"mkfs.{kind}", "-q", beside / "image")
        _run("mount", "-o", "loop", beside / "image", at)

    return mount


# How it is mounted; the type that it has then.
MOUNTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "bind": (bind, ""),
    "tmpfs": (tmpfs, "tmpfs"),
    "overlay": (overlay, "overlay"),
    "ext4": (image("ext4"), "ext4"),
    "xfs": (image("xfs"), "xfs"),
    "btrfs": (image("btrfs"), "btrfs"),
    "fuse-overlayfs": (fuse_overlayfs, "fuse.fuse-overlayfs"),
    "mergerfs": (mergerfs, "fuse.mergerfs"),
}


def tour(name: str, directory: Path) -> None:
    """Mounts a file system below a directory, and saves, loads, trains and is killed there.

    Raises:
      CannotMountError: It cannot be mounted.
      AssertionError: Something does not hold.
    """
    process = server().Process(target=_in_process, args=(name, directory))
    process.start()
    process.join()
    text = (directory / "outcome").read_text()
    if text.startswith(CannotMountError.__name__):
        raise CannotMountError(text)
    assert not text, text


def _in_process(name: str, directory: Path) -> None:
    at, beside = directory / "mounted", directory / "beside"
    at.mkdir()
    beside.mkdir()
    mount, kind = MOUNTS[name]
    text = "it was killed"
    (directory / "outcome").write_text(text)
    try:
        _leave_the_mounts_of_others()
        mount(at, beside)
        try:
            found = medium.mount_of(at)
            assert found is not None
            assert kind in {found.kind, ""}
            _tour(at)
        finally:
            _run("umount", at)  # which ends a server of FUSE
        text = ""
    except CannotMountError as error:
        text = f"{CannotMountError.__name__}: {error}"
    except BaseException:  # noqa: BLE001 - the caller shows it
        text = traceback.format_exc()
    (directory / "outcome").write_text(text)


def _leave_the_mounts_of_others() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise CannotMountError(os.strerror(ctypes.get_errno()))
    _run("mount", "--make-rprivate", "/")


def _run(*command: object) -> None:
    text = list(map(str, command))
    try:
        done = subprocess.run(text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotMountError(str(error)) from None
    if done.returncode:
        raise CannotMountError(f"{' '.join(text)}: {done.stderr.strip() or done.returncode}")


def _layers(beside: Path) -> str:
    for name in ("lower", "upper", "work"):
        (beside / name).mkdir()
    return f"lowerdir={beside}/lower,upperdir={beside}/upper,workdir={beside}/work"


def _tour(at: Path) -> None:
    savers = [_forked(lambda name=name: fp.save(at / "1", {name: _X})) for name in "ab"]
    killed = _forked(lambda: _train(at / "run", 3, dies=True))
    assert [os.waitpid(one, 0)[1] for one in (*savers, killed)] == [0, 0, signal.SIGKILL]
    fp.finalize(at / "1")
    assert sorted(fp.load(at / "1")) == ["a", "b"]
    fp.save(at / "2", {"a": _X, "b": _X + 1}, reuse=at / "1")
    fp.finalize(at / "2")
    fp.remove(at / "1")
    np.testing.assert_array_equal(fp.load(at / "2")["b"], _X + 1)
    assert fp.verify(at / "2").ok
    _train(at / "run", 6)
    assert fp.steps(at / "run") == [5, 6]
    assert {one.name for one in (at / "run").iterdir()} == {"5", "6", "timeline"}


def _forked(work: Callable[[], object]) -> int:
    """Does something in a child, before this process has used JAX; returns its number."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - the process ends here
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _train(directory: Path, last: int, *, dies: bool = False) -> None:
    state = {"w": _X, "step": 0}
    with checkpointing(directory, every_n_train_steps=1, keep_last=2) as checkpoints:
        if fp.steps(directory):
            state = checkpoints.restore(state)
            np.testing.assert_array_equal(state["w"], _X + state["step"])
        for step in range(state["step"] + 1, last + 1):
            state = {"w": state["w"] + 1, "step": step}
            checkpoints.step(state)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
