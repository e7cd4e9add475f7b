"""A server whose processes are watched, and a directory that costs no time to fsync."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fileops import NoCompilerError
from nursery import Nursery

_MEMORY = Path("/dev/shm")  # noqa: S108 - below it is a directory of our own


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory, in memory where there is such a file system: nothing here needs a real disk."""
    parent = _MEMORY if _MEMORY.is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="flax_partial_crash.", dir=parent)).resolve()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def nursery(scratch: Path) -> Iterator[Nursery]:
    """Forks processes whose changes to the disk are counted, and stopped."""
    try:
        server = Nursery(scratch)
    except NoCompilerError as error:
        pytest.skip(str(error))
    yield server
    server.close()
