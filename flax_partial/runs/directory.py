"""The directory that a run keeps its checkpoints in: what may be one, and what it holds.

It may be one of a file system, or a prefix of an object store.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from flax_partial.errors import StoreAccessError
from flax_partial.loading import catalog
from flax_partial.storage import directories, places
from flax_partial.storage.object_place import StorePlace
from flax_partial.storage.store_path import AnyPath, StorePath

if TYPE_CHECKING:
    from flax_partial.storage.paths import PathLike

__all__ = [
    "AnyPath",
    "check_is_none",
    "checked",
    "checkpoints",
    "identity",
    "make",
    "probably_meant",
    "step_in_name",
    "sweep",
    "unfinished",
]

checkpoints = catalog.checkpoints
identity = directories.identity
make = directories.make
probably_meant = catalog.probably_meant
step_in_name = catalog.step_in_name

_SESSION = re.compile(r"(\d+)\.partial_save")
# What `fp.remove` leaves when it is killed, and what `fp.abort` does.
_HALF_DELETED = re.compile(r"\.([^.]+_)?\d+(\.partial_save)?\.[0-9a-f]+\.deleted")


def checked(path: PathLike | StorePath) -> AnyPath:
    """Makes the path of a run's directory, which need not exist, absolute.

    From here on it is the same, whatever the working directory. An object store is asked nothing.

    Raises:
      ImportError: It is a URL, and obstore is not installed.
      StoreAccessError: It is a URL, and there are no credentials.
      TypeError: It is not a path of text.
      ValueError: It is empty, a URL that nothing serves, or lies in a checkpoint.
    """
    if not str(path):
        raise ValueError("The path of a run's directory is empty; '.' is the working directory.")
    found = directories.absolute(path)
    if isinstance(found, Path):
        check_is_none(found)
    return found


def check_is_none(directory: AnyPath) -> None:
    """Raises ValueError if a run's directory is a checkpoint, or lies in one."""
    around = catalog.checkpoint_around(directory)
    if around is not None:
        what = "is a checkpoint" if around == directory else f"lies in the checkpoint {around}"
        raise ValueError(
            f"{directory} {what}: a run's directory is one that holds checkpoints, such as "
            f"{around.parent}."
        )


def unfinished(directory: AnyPath) -> list[tuple[int, AnyPath]]:
    """Returns the unfinished checkpoints in a run's directory: their steps, and their paths.

    The paths are those that they will have once they are finalized.
    """
    if isinstance(directory, Path):
        names = map(_SESSION.fullmatch, sorted(directories.names(directory)))
        return [(int(name[1]), directory / name[1]) for name in names if name]
    steps = _not_finalized(directory)
    are_sessions = directories.for_each(
        directory, lambda step: places.resolve(directory / str(step)).is_session(), steps
    )
    pairs = zip(steps, are_sessions, strict=True)
    return [(step, directory / str(step)) for step, is_session in pairs if is_session]


def _not_finalized(directory: AnyPath) -> list[int]:
    finalized = catalog.checkpoints(directory)
    return [step for step in catalog.names_by_step(directory) if step not in finalized]


def sweep(directory: AnyPath) -> None:
    """Deletes what is left of checkpoints and sessions whose removal was interrupted.

    In an object store it is what a removal has left that began some time ago.
    """
    if isinstance(directory, StorePath):
        places_left = [StorePlace(directory / str(step)) for step in _not_finalized(directory)]
        with contextlib.suppress(StoreAccessError):  # who only reads leaves it to others
            directories.for_each(directory, StorePlace.finish_removal, places_left)
    else:
        for name in directories.names(directory):
            if _HALF_DELETED.fullmatch(name):
                # Another process may be deleting it, too.
                shutil.rmtree(directory / name, ignore_errors=True)
