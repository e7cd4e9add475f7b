"""What a file lies on: which file system, mounted how, and what that means for what we do there."""

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger("flax_partial")
_MOUNTS = Path("/proc/self/mountinfo")
_DESCRIPTORS = Path("/proc/self/fdinfo")
_IN_MEMORY = frozenset(("tmpfs", "ramfs"))
_ESCAPED = re.compile(r"\\([0-7]{3})")  # of spaces and the like, as proc_pid_mountinfo(5) has them


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system.

    Attributes:
      kind: Its type, such as "ext4", "lustre" or "fuse.sshfs".
      source: What is mounted, such as "/dev/sda1" or "server:/export".
      point: The directory that it is mounted on.
      options: Of the mount and of the file system, such as "rw" or "local_lock=all".
    """

    kind: str
    source: str
    point: str
    options: frozenset[str]

    def __str__(self) -> str:
        """Names it for users."""
        return f"{self.point} ({self.kind})"


def is_memory(directory: Path) -> bool:
    """Whether the file system of a directory keeps its files in memory; False where unknown.

    Many threads fill memory faster than one, and a disk not.
    """
    mount = mount_of(directory)
    return mount is not None and mount.kind in _IN_MEMORY


def mount_of(place: Path | int) -> Mount | None:
    """Returns the mount that a directory, or an open file, lies on; None where unknown."""
    device = os.stat(place).st_dev
    if device not in _mounts:
        if len(_mounts) >= _MOST_MOUNTS:
            _mounts.clear()
        _mounts[device] = _look_up(place, device)
    return _mounts[device]


_mounts: dict[int, Mount | None] = {}
_MOST_MOUNTS = 64


def _look_up(place: Path | int, device: int) -> Mount | None:
    """Finds the line of proc_pid_mountinfo(5): by the mount's number, or else by the device's.

    Of btrfs and overlays the device that files are on is not the one that is listed.
    """
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:  # such as on macOS
        return None
    number = ""
    with contextlib.suppress(OSError):  # of a directory that may not be read
        number = _number_of_mount(place)
    by_device = f"{os.major(device)}:{os.minor(device)}"
    found = [line.split() for line in lines]
    for column, wanted in ((0, number), (2, by_device)):
        for fields in reversed(found):  # what was mounted last hides the others
            if fields[column] == wanted:
                return _parsed(fields)
    return None


def _number_of_mount(place: Path | int) -> str:
    if isinstance(place, int):
        lines = (_DESCRIPTORS / str(place)).read_text().splitlines()
        return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _number_of_mount(descriptor)
    finally:
        os.close(descriptor)


def _parsed(fields: list[str]) -> Mount:
    rest = fields[fields.index("-") + 1 :]
    point, source = (
        _ESCAPED.sub(lambda m: chr(int(m[1], 8)), text) for text in (fields[4], rest[1])
    )
    return Mount(rest[0], source, point, frozenset((*fields[5].split(","), *rest[2].split(","))))


def say_once(place: Path | int, level: int, text: str) -> None:
    """Logs something about the file system of a directory, or an open file, once a process.

    Args:
      place: The directory, or the file's descriptor.
      level: Of `logging`.
      text: What is logged; its `%s` becomes the file system.
    """
    device = os.stat(place).st_dev
    if (device, text) not in _said:
        _said.add((device, text))
        _LOG.log(level, text, mount_of(place) or f"the file system of device {device}")


_said: set[tuple[int, str]] = set()
