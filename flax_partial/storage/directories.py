"""A run's directory, on a file system or in an object store, and what is done to it.

These are the few operations in which the two differ; the paths of both have `iterdir`, `is_dir` and
the like in common.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from flax_partial.storage import files, paths
from flax_partial.storage.control import MARK
from flax_partial.storage.object_data import do_all
from flax_partial.storage.paths import PathLike
from flax_partial.storage.store_path import AnyPath, StorePath, in_store

A = TypeVar("A")
T = TypeVar("T")


def given(path: PathLike | StorePath) -> AnyPath:
    """Takes a path, or URL, as a user gives it; one that is relative stays so.

    Raises:
      ImportError: It is a URL, and obstore is not installed.
      StoreAccessError: It is a URL, and there are no credentials.
      TypeError: It is not a path of text.
      ValueError: It is a URL that nothing serves, or that names nothing.
    """
    found = in_store(path)
    if found is None:
        return Path(paths.expanded(path))
    _ = found.store  # which says what is missing to reach it
    return found


def absolute(path: PathLike | StorePath) -> AnyPath:
    """Makes a path that a user gives absolute, as `given` takes it."""
    found = given(path)
    return Path(os.path.abspath(found)) if isinstance(found, Path) else found


def names(directory: AnyPath) -> list[str]:
    """Returns the names in a directory, in no order; none where there is no directory."""
    if isinstance(directory, Path):
        return files.listed(directory)
    folders, objects = directory.store.children()
    return [*folders, *(one.key for one in objects)]


def make(directory: AnyPath) -> None:
    """Makes a directory; of one in an object store, finds out whether it can be reached.

    Raises:
      StoreError: There is no such bucket, it cannot be reached, or it refuses to be listed.
    """
    if isinstance(directory, Path):
        directory.mkdir(parents=True, exist_ok=True)
    else:
        directory.store.children()


def identity(checkpoint: AnyPath) -> object:
    """What tells a finalized checkpoint from one that was at the same path before.

    Raises:
      FileNotFoundError: There is none.
    """
    if isinstance(checkpoint, StorePath):
        return (checkpoint / MARK).read_bytes()
    status = checkpoint.stat()
    return status.st_ino, status.st_mtime_ns


def is_published(checkpoint: StorePath) -> bool:
    """Whether a finalized checkpoint is there, in an object store."""
    return (checkpoint / MARK).is_file()


def bytes_below(directory: AnyPath) -> int:
    """Returns the size of all that is below a directory."""
    if isinstance(directory, Path):
        return files.bytes_below(directory)
    return sum(one.size for one in directory.store.list())


@contextmanager
def new_file(path: AnyPath) -> Iterator[int]:
    """Makes a file, or an object of that name, that appears whole or not at all.

    For an object it is written to a temporary file of this machine first, as large as it gets.

    Yields:
      A descriptor to write to.

    Raises:
      FileExistsError: A file is at `path` by the end; it is kept, and what was written is not. An
        object that appears meanwhile is replaced.
    """
    if isinstance(path, Path):
        with files.new_file(path) as descriptor:
            yield descriptor
        return
    with tempfile.TemporaryFile() as file:
        yield file.fileno()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        path.parent.store.put(path.name, [memoryview(mapped)])


def for_each(directory: AnyPath, do: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Does something for each of many items of a directory: side by side in an object store."""
    if isinstance(directory, Path):
        return [do(item) for item in items]
    return do_all([partial(do, item) for item in items])
