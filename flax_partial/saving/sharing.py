"""What a save shares with an earlier checkpoint, so that it need not be written again.

Arrays that stay on an accelerator are recognised as the same objects; other data by digest.
"""

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from flax_partial import collector
from flax_partial.distributed import agreement
from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.model import Leaf, Part, data_file_bytes, data_part, data_path
from flax_partial.saving.reuse import DataFile, Earlier, Shared
from flax_partial.saving.saved_arrays import SavedArrays
from flax_partial.sessions.registry import Session
from flax_partial.storage import files
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.paths import STATE
from flax_partial.storage.place import Place

Arrays = Sequence["weakref.ref[Any] | None"]
"""Of each leaf of a save, the array that may be remembered, if it is one."""

Held = list[tuple[Shared, BinaryIO]]
"""What data files hold of a save, and the files, open."""

_LOG = logging.getLogger("flax_partial")
_saved_arrays = SavedArrays()
_earlier: "weakref.WeakKeyDictionary[Session, dict[LocalPlace, Earlier | None]]" = (
    weakref.WeakKeyDictionary()
)
_reading = threading.Lock()  # one worker reads an earlier checkpoint, for all saves of a session


def hold_files(
    earlier: LocalPlace, arrays: Arrays, leaves: Sequence[Leaf], *, durable: bool
) -> Held:
    """Opens the files of arrays that still exist: once the caller goes on they may be gone.

    No more is shared than needs no fsync, and what is open can be copied where no link is made.

    Args:
      earlier: The finalized checkpoint to share with.
      arrays: The arrays to be saved.
      leaves: As what each leaf of the save is to be saved.
      durable: Whether only files count that are on the disk for certain.
    """
    shared = _saved_arrays.shared_with(earlier.final, arrays, leaves, durable=durable)
    if not shared or not earlier.has_contents():
        return []
    opened = [(one, files.hold(one.file.path, size=one.file.bytes)) for one in shared]
    return [(one, file) for one, file in opened if file is not None]


def remember(where: Place, name: str, part: Part, arrays: Arrays) -> None:
    """Records those of a committed part's arrays that stay, for the next save."""
    if not any(arrays) or not isinstance(where, LocalPlace):
        return
    try:
        data_files = _data_files(where, {name: part})
    except OSError:  # no reason to fail a save that is committed
        return
    for array, leaf in zip(arrays, part.leaves, strict=True):
        file = data_files.get(data_part(name, leaf.file))
        if array is not None and file is not None:
            _saved_arrays.remember(array, checkpoint=where.final, file=file, leaf=leaf)


def find_earlier(session: Session, checkpoint: LocalPlace | None) -> Earlier | None:
    """What this process's parts of a finalized checkpoint hold, read once; None if it is gone."""
    if checkpoint is None:
        return None
    with _reading:
        known = _earlier.setdefault(session, {})
        if checkpoint not in known:
            known[checkpoint] = _read_earlier(checkpoint)
        return known[checkpoint]


def _read_earlier(checkpoint: LocalPlace) -> Earlier | None:
    """Nothing that is wrong with an earlier checkpoint keeps a save from being written."""
    try:
        if checkpoint.has_contents():
            with collector.paused():
                parts = checkpoint.read_own_parts(process=agreement.index()).committed
                return Earlier(
                    parts, _data_files(LocalPlace(checkpoint.final, checkpoint.final), parts)
                )
    except (OSError, CorruptCheckpointError) as error:
        _LOG.warning("flax_partial: cannot reuse data of %s: %s", checkpoint.final, error)
    return None


def _data_files(where: LocalPlace, parts: Mapping[str, Part]) -> dict[str, DataFile]:
    """The data files of some parts, as they are once finalized, each called as by `data_part`."""
    found = {}
    for name, part in parts.items():
        for number in data_file_bytes(part.leaves):
            file = data_part(name, number)
            size = where.size_of_data(data_path(file))
            place = where.final / STATE / data_path(file)
            found[file] = DataFile(place, size, part.durable)
    return found


def _forget_lock() -> None:
    """In a forked child nothing would give back what a thread of the parent held."""
    global _reading  # noqa: PLW0603 - once a process
    _reading = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
