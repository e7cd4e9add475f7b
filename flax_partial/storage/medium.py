"""What a file lies on: memory, which many threads fill faster, or a disk, which they do not."""

import os
from functools import lru_cache
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset(("tmpfs", "ramfs"))


def is_memory(directory: Path) -> bool:
    """Whether the file system of a directory keeps its files in memory; False where unknown."""
    return _type_of(directory.stat().st_dev) in _IN_MEMORY


@lru_cache(maxsize=64)
def _type_of(device: int) -> str:
    """The type of a file system, as proc_pid_mountinfo(5) tells it; empty where it does not."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        about, _, kind = line.partition(" - ")
        if about.split()[2] == number:
            return kind.split()[0]
    return ""
