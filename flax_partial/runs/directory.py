"""The directory that a run keeps its checkpoints in: what may be one, and what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_partial.loading import catalog
from flax_partial.storage import object_store, paths
from flax_partial.storage.store_path import StorePath

if TYPE_CHECKING:
    from flax_partial.storage.paths import PathLike

probably_meant = catalog.probably_meant
step_in_name = catalog.step_in_name


def checkpoints(directory: Any) -> dict[int, Any]:
    """Returns the finalized checkpoints in a run's directory by step, ascending.

    Their paths are of the directory's own type, `Path` or `StorePath`.
    """
    if not isinstance(directory, StorePath):
        return catalog.checkpoints(directory)
    store = directory.store
    steps = sorted(int(name) for name in store.children()[0] if name.isdecimal())
    mark = "commit_success.txt"
    return {one: directory / str(one) for one in steps if store.size(f"{one}/{mark}") is not None}


def uploaded_to(path: PathLike) -> Any:
    """Makes the path, or URL, of a directory that a run uploads to absolute; see `checked`."""
    text = os.fspath(path)
    return StorePath(text) if object_store.is_url(text) else checked(path)


def checked(path: PathLike) -> Path:
    """Makes the path of a run's directory, which need not exist, absolute.

    From here on it is the same, whatever the working directory.

    Raises:
      TypeError: It is not a path of text.
      ValueError: It is empty, a URL, or lies in a checkpoint.
    """
    if not os.fspath(path):
        raise ValueError("The path of a run's directory is empty; '.' is the working directory.")
    found = Path(paths.absolute(path))
    around = catalog.checkpoint_around(found)
    if around is not None:
        what = "is a checkpoint" if around == found else f"lies in the checkpoint {around}"
        raise ValueError(
            f"{found} {what}: a run's directory is one that holds checkpoints, such as "
            f"{around.parent}."
        )
    return found
