"""Which file system a directory lies on, and what is done about what it lacks."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import other_systems
import pytest

import flax_partial as fp
from flax_partial.storage import files, medium

MOUNTS = """\
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
31 20 0:40 / /scratch rw,relatime - lustre 10.0.0.1@o2ib:/fs rw,flock,lazystatfs
32 20 0:41 /u /home/a\\040b rw - nfs4 nas:/u rw,vers=4.2,local_lock=none
33 20 0:42 / /mnt ro shared:5 master:1 - fuse.sshfs host:/data rw,user_id=0
34 20 0:42 / /mnt rw - tmpfs none rw,size=1k
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the kernel's files: the table of mounts, and the mount of each descriptor."""
    monkeypatch.setattr(medium, "_mounts", {})
    monkeypatch.setattr(medium, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(medium, "_DESCRIPTORS", tmp_path / "fdinfo")
    (tmp_path / "mountinfo").write_text(MOUNTS)
    (tmp_path / "fdinfo").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("number", "kind", "point"),
    [
        ("20", "ext4", "/"),
        ("31", "lustre", "/scratch"),
        ("32", "nfs4", "/home/a b"),
        ("33", "fuse.sshfs", "/mnt"),
        ("34", "tmpfs", "/mnt"),
    ],
)
def test_mount_is_found_by_its_number(number: str, kind: str, point: str, mounts: Path) -> None:
    descriptor = os.open(mounts, os.O_RDONLY)
    try:
        (mounts / "fdinfo" / str(descriptor)).write_text(
            f"pos:\t0\nflags:\t02\nmnt_id:\t{number}\n"
        )
        found = medium.mount_of(descriptor)
    finally:
        os.close(descriptor)
    assert found is not None
    assert (found.kind, found.point) == (kind, point)
    assert found.options >= ({"local_lock=none", "rw"} if number == "32" else {"rw"})
    assert str(found) == f"{point} ({kind})"


def test_mount_is_found_by_its_device_where_its_number_is_not_told(mounts: Path) -> None:
    device = mounts.stat().st_dev
    line = f"50 20 {os.major(device)}:{os.minor(device)} / /here rw - xfs /dev/x rw\n"
    (mounts / "mountinfo").write_text(MOUNTS + line)
    found = medium.mount_of(mounts)
    assert found is not None
    assert found.point == "/here"


def test_mount_that_is_not_listed_is_unknown(mounts: Path) -> None:
    assert medium.mount_of(mounts) is None
    assert not medium.is_memory(mounts)


def test_real_file_system_is_found(tmp_path: Path) -> None:
    found = medium.mount_of(tmp_path)
    assert found is not None
    assert tmp_path.resolve().is_relative_to(found.point)


@pytest.mark.parametrize(
    ("code", "of_files"),
    [(code, of_files) for code in ("EINVAL", "ENOTSUP", "ENOSYS") for of_files in (False, True)]
    + [("EBADF", False), ("EISDIR", False)],
)
def test_missing_fsync_is_said_once_and_saving_goes_on(
    code: str,
    of_files: bool,  # noqa: FBT001 - of a table
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(medium, "_said", set())
    other_systems.fsync_refused(monkeypatch, getattr(errno, code), of_files=of_files)
    for name in ("1", "2"):
        fp.save(tmp_path / name, {"a": np.arange(3)})
        fp.finalize(tmp_path / name)
        assert fp.verify(tmp_path / name).ok
    fp.remove(tmp_path / "1")
    texts = [record.getMessage() for record in caplog.records if "fsync" in record.getMessage()]
    assert len(texts) == (2 if of_files else 1)
    assert all(str(medium.mount_of(tmp_path)) in text for text in texts)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EDQUOT", "EBADF"])
def test_fsync_that_fails_fails_the_save(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EBADF of a file is a mistake of this package, whatever it is of a directory."""
    other_systems.fsync_refused(monkeypatch, getattr(errno, code), of_files=True)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, code))):
        files.write(tmp_path / "file", (b"data",), durable=True)
