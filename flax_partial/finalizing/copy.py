"""Copies a finalized checkpoint to another place: part by part, and then by one commit there.

The name of a copied part ends in a digest of the name that the part has at the source. So a copy
that was killed goes on where it stopped: parts that are there are not copied again.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO, cast

import numpy as np

from flax_partial.distributed.agreement import index
from flax_partial.errors import CheckpointExistsError, CorruptCheckpointError, NoSessionError
from flax_partial.finalizing.finalize import finalize
from flax_partial.format.digests import digest
from flax_partial.format.model import Part, data_file_bytes, data_part, data_path
from flax_partial.format.tables import encode_part
from flax_partial.loading.checkpoint import metadata
from flax_partial.reports import CheckpointMetadata
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.registry import begin_save
from flax_partial.storage import places
from flax_partial.storage.local_place import LocalDataFile
from flax_partial.storage.parts import own_name, prefix_of_name
from flax_partial.storage.paths import PathLike
from flax_partial.storage.place import DataFile, DataFiles, NewPart, Place
from flax_partial.storage.store_path import StorePath

_DIGITS = 12
_PIECE_BYTES = 16 << 20
_PARTS_AT_ONCE = 8


def copy(
    source: PathLike | StorePath,
    target: PathLike | StorePath,
    *,
    entered: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> CheckpointMetadata:
    """Copies a finalized checkpoint from one place to another, directories or object stores.

    It appears at the target whole, or not at all. Killed anywhere, it leaves a session there; the
    next call with the same source goes on with that, and `abort` drops it. Where the target is a
    copy of the source already, nothing is done.

    Args:
      source: The checkpoint; one that this package wrote.
      target: Where the copy is to be.
      entered: Called once the copy's session is open, before anything is copied; what it raises
        ends the copying.
      check: Called before each piece of 16 MiB; what it raises ends the copying.

    Returns:
      What the copy holds.

    Raises:
      CheckpointExistsError: Another checkpoint is at the target, or is being saved there.
      NoSessionError: There is no finalized checkpoint at the source; or another process has dropped
        the copy's session meanwhile.
      CorruptCheckpointError: The source is damaged.
      OSError: Reading or writing failed; calling again goes on.
    """
    check_not_forked("copy")
    here, there = places.resolve(source), places.resolve(target)
    with here.reading():
        parts = _parts_of(here)
        if there.read_contents() is not None:
            _require_copies(there, there.read_own_parts().committed, parts, all_of_them=True)
            return metadata(there.final)
        found = there.read_parts()
        _require_copies(there, found.committed, parts, all_of_them=found.decided_ns is not None)
        if found.decided_ns is None:
            _copy_parts(here, there, parts, entered, check)
    check()
    return finalize(there.final, processes=[index()])


def _parts_of(here: Place) -> Mapping[str, Part]:
    if here.read_contents() is None:
        raise NoSessionError(f"There is no checkpoint of flax_partial at {here.final}.")
    found = here.read_own_parts()
    lost = [f"{name} in {here.final} has no table of contents" for name in found.torn]
    if found.damaged or lost:
        raise CorruptCheckpointError("\n".join([*found.damaged.values(), *lost]))
    return found.committed


def _require_copies(
    there: Place, names: Mapping[str, Part], parts: Mapping[str, Part], *, all_of_them: bool
) -> None:
    """Raises CheckpointExistsError if parts are no copies of these, or not of all of them."""
    wanted = {_end_of_copy(name) for name in parts}
    found = {name[-_DIGITS:] for name in names}
    if found - wanted or (all_of_them and found != wanted):
        raise CheckpointExistsError(
            f"{there.final} is another checkpoint, or one that is being saved: copy to another "
            "path, or remove that one, or abort it."
        )


def _end_of_copy(name: str) -> str:
    """What the names of all copies of a part end in."""
    return digest(own_name(name).encode())[:_DIGITS]


def _copy_parts(
    here: Place,
    there: Place,
    parts: Mapping[str, Part],
    entered: Callable[[], None],
    check: Callable[[], None],
) -> None:
    """Copies the parts that are not there yet, several at a time; raises the first error."""
    copying = _Copying()
    session = begin_save(there, copying)
    try:
        with session.entered(durable=True) as opened:
            entered()
            there = session.where
            found = there.read_parts()
            for name in found.torn:
                there.remove_part(name)
            done = {name[-_DIGITS:] for name in found.committed}
            files = here.data_files()

            def copy_one(name: str) -> None:
                check()
                new = there.create_part(_copied_name(name, parts[name], opened.mark))
                _copy_part(files, name, parts[name], new, check)

            with ThreadPoolExecutor(_PARTS_AT_ONCE, "flax_partial-copy") as pool:
                left = [name for name in parts if _end_of_copy(name) not in done]
                list(pool.map(copy_one, left))  # after an error those that have begun still end
    finally:
        session.release(copying)


class _Copying:
    """Stands for a copy that is under way, among the saves of a session."""


def _copied_name(name: str, part: Part, mark: str) -> str:
    folder = name.removesuffix(own_name(name))
    return f"{folder}{prefix_of_name(part)}{mark}{_end_of_copy(name)}"


def _copy_part(
    files: DataFiles,
    name: str,
    part: Part,
    new: NewPart,
    check: Callable[[], None],
) -> None:
    sizes = data_file_bytes(part.leaves)
    for file, size in sizes.items():
        path = data_path(data_part(name, file))
        try:
            files.require(path, size)
            with files.open(path) as data, _as_file(data, size, check) as source:
                check()
                new.copy(source, file)
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: {error}") from error
    check()
    table = encode_part(replace(part, durable=True))
    new.commit(table, has_data_file=bool(sizes), durable=True)


@contextmanager
def _as_file(data: DataFile, size: int, check: Callable[[], None]) -> Iterator[BinaryIO]:
    """Gives a data file as a file of this machine: that of a store is copied to a temporary one."""
    if isinstance(data, LocalDataFile):
        yield cast("BinaryIO", data.file)
        return
    with tempfile.TemporaryFile() as file:
        for start in range(0, size, _PIECE_BYTES):
            check()
            piece = np.empty(min(_PIECE_BYTES, size - start), np.uint8)
            data.read_into(start, piece.data)
            file.write(piece.data)
        file.flush()
        yield file
