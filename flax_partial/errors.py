"""What can go wrong, as one tree.

    PartialCheckpointError
    ├── CheckpointExistsError   (FileExistsError)    the finalized checkpoint is there already
    ├── NoSessionError          (FileNotFoundError)  nothing here to finalize, look at or load
    ├── CheckpointInUseError    (BlockingIOError)    it is being read, or another run trains there
    ├── KeyConflictError        (ValueError)         two leaves cannot stand in one tree
    ├── UnsupportedLeafError    (TypeError)          a value that no checkpoint can hold
    │   └── EmptyStateError     (ValueError)         a state without a single leaf
    ├── IncompleteCheckpointError (RuntimeError)     leaves, or parts of leaves, are missing
    ├── CorruptCheckpointError  (ValueError)         bytes on disk are not those that were written
    ├── TargetMismatchError     (ValueError)         the checkpoint does not fit the target
    ├── ForkedProcessError      (RuntimeError)       a forked child of a process that used JAX
    ├── DeviceMemoryError       (MemoryError)        a device had no memory for a copy
    └── StoreError              (OSError)            a request to an object store failed for good
        └── StoreAccessError    (PermissionError)    it refused, or there are no credentials

Each is also the built-in kind that a caller would catch without knowing this package. Failures of
a file system (a full disk, a lost mount) stay the `OSError` they are.
"""

import traceback
from collections.abc import Iterable
from itertools import islice
from pathlib import Path


class PartialCheckpointError(Exception):
    """Base of every error that this package raises by itself."""


class CheckpointExistsError(PartialCheckpointError, FileExistsError):
    """A finalized checkpoint, or something else, is at the path already; nothing was written."""


class NoSessionError(PartialCheckpointError, FileNotFoundError):
    """Nothing that could be finalized, looked at, or loaded is at the path."""


class CheckpointInUseError(PartialCheckpointError, BlockingIOError):
    """It is being read or written, or a run trains in its directory; it was left as it is."""


class KeyConflictError(PartialCheckpointError, ValueError):
    """Two leaves cannot stand in one tree: the same key twice, or a leaf that is a subtree."""


class UnsupportedLeafError(PartialCheckpointError, TypeError):
    """A leaf, or a value of `custom_metadata`, that a checkpoint cannot represent."""


class EmptyStateError(UnsupportedLeafError, ValueError):
    """A state without leaves: there is nothing to save."""


class IncompleteCheckpointError(PartialCheckpointError, RuntimeError):
    """Leaves, boxes of leaves, or processes are missing; the session is left as it was."""


class CorruptCheckpointError(PartialCheckpointError, ValueError):
    """Data on disk is damaged: a digest, a length or a structure is not what was written."""


class TargetMismatchError(PartialCheckpointError, ValueError):
    """The checkpoint differs from the target in structure, shape, dtype or kind."""


class ForkedProcessError(PartialCheckpointError, RuntimeError):
    """A call that writes, in a forked child of a process that had used JAX; nothing was written."""


class DeviceMemoryError(PartialCheckpointError, MemoryError):
    """A device had no memory for a copy of what is saved, and told so when the arrays were gone."""


class StoreError(PartialCheckpointError, OSError):
    """A request to an object store failed for good; the message names the object."""


class StoreAccessError(StoreError, PermissionError):
    """An object store refused a request, or there are no credentials."""


def how_to_install(extra: str) -> str:
    """Returns how to install what an extra of this package needs, from where it was installed."""
    if origin := _installed_from():
        return f"pip install '{origin}[{extra}]'"
    return f"pip install '.[{extra}]' in a checkout of flax_partial"


def _installed_from() -> str | None:
    """Returns the checkout or wheel that pip installed this package from, where it is still there.

    pip records it (PEP 610).
    """
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        recorded = distribution("flax-partial").read_text("direct_url.json")
    except PackageNotFoundError:  # a checkout that is not installed
        return None
    url = urlsplit(json.loads(recorded or "{}").get("url", ""))
    path = unquote(url.path)
    return path if url.scheme == "file" and Path(path).exists() else None


def first_few(items: Iterable[str], *, most: int, count: int) -> list[str]:
    """Shortens a list for a message.

    Args:
      items: The items, of which at most `most` are taken.
      most: How many are shown.
      count: How many there are.

    Returns:
      The first items, and how many more there are.
    """
    shown = list(islice(items, most))
    return [*shown, f"and {count - most} more"] if count > most else shown


def clear_frames(error: BaseException, *, until: BaseException | None) -> None:
    """Has an error, and those that it came from, refer to no local variable of what raised them.

    Args:
      error: The error.
      until: The one that was being handled before, with which it has nothing to do, if any.
    """
    seen = {id(until)}
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += (one.__cause__, one.__context__)
