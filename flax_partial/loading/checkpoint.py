"""A finalized checkpoint, ours or Orbax's, opened: what it holds, and reads of its data."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_partial.errors import CorruptCheckpointError, NoSessionError
from flax_partial.format.assembly import read_inline
from flax_partial.format.keypaths import KeyPath
from flax_partial.format.model import Contents, Leaf, Region
from flax_partial.loading import catalog, orbax_reader
from flax_partial.loading import data_reader as data_files
from flax_partial.loading.host_memory import HostMemory
from flax_partial.loading.orbax_reader import ONE_TREE, OrbaxCheckpoint
from flax_partial.loading.target import shape_and_dtype
from flax_partial.reports import CheckpointMetadata, LeafMetadata
from flax_partial.storage import places
from flax_partial.storage.paths import STATE, PathLike
from flax_partial.storage.place import Place

_UNSUSPICIOUS_BYTES = 256 << 20  # reading this much takes longer than asking for the files' sizes
_MOST_PACKED = 1 << 15  # bytes that one stands for in zstd: its shortest block is 4, for 128 KiB


class OwnCheckpoint:
    """A checkpoint of this package's; its attributes are those of `OrbaxCheckpoint`."""

    composition = ONE_TREE

    def __init__(self, where: Place, contents: Contents) -> None:
        self.contents = contents
        self._where = where
        self._memory = HostMemory()

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Returns, for each region, its data or a `CorruptCheckpointError` that names the leaf.

        An `OSError` where the system refused to read it.

        Raises:
          NoSessionError: It was removed meanwhile.
        """
        in_runs = [region for region in regions if region[0].runs]
        in_database = [
            region for region in regions if not (region[0].runs or region[0].boxes[0].places)
        ]
        from_runs = iter(self._read(in_runs, has_runs=True))
        from_database = iter(self._read(in_database, has_runs=False))
        outcomes = [
            _read_inline(region)
            if region[0].boxes[0].places
            else next(from_runs if region[0].runs else from_database)
            for region in regions
        ]
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            self._where.require_unremoved()
        return outcomes

    def _read(self, regions: Sequence[Region], *, has_runs: bool) -> list[np.ndarray | Exception]:
        if not regions:
            return []
        lie = self._too_large({leaf.name: leaf for leaf, _, _ in regions}.values())
        if lie:
            return [CorruptCheckpointError(f"Leaf {leaf.name!r}: {lie}") for leaf, _, _ in regions]
        if not has_runs:
            return self._where.read_database(regions)
        found = data_files.read(
            self._where.data_files(), self.contents.data_parts, regions, self._memory
        )
        return [
            _damaged(leaf, outcome) if isinstance(outcome, ValueError) else outcome
            for outcome, (leaf, _, _) in zip(found, regions, strict=True)
        ]

    def _too_large(self, leaves: Iterable[Leaf]) -> str | None:
        """Returns why memory for leaves need not be allocated: the files hold less.

        Where there is not enough tensorstore ends the process, so that a table with false shapes,
        and the right digest, has to be found before.
        """
        sizes = [(leaf.bytes, _MOST_PACKED if leaf.compression else 1) for leaf in leaves]
        total = sum(size for size, _ in sizes)
        if total <= _UNSUSPICIOUS_BYTES:
            return None
        held = self._where.bytes_held()
        if sum(size // most for size, most in sizes) <= held:
            return None
        return (
            f"what is read would be of {total} bytes, and {self._where.final / STATE} holds {held}"
        )


Checkpoint = OwnCheckpoint | OrbaxCheckpoint


def _read_inline(region: Region) -> np.ndarray | Exception:
    try:
        return read_inline(*region)
    except ValueError as error:
        return _damaged(region[0], error)


def _damaged(leaf: Leaf, error: ValueError) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"Leaf {leaf.name!r}: {error}")


def metadata(path: PathLike) -> CheckpointMetadata:
    """Describes a finalized checkpoint, ours or one that Orbax wrote, without reading array data.

    Args:
      path: The checkpoint.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
      CorruptCheckpointError: Its table of contents is damaged.
    """
    where = places.resolve(path)
    with where.reading():
        return describe_checkpoint(where, open_checkpoint(where))


def open_checkpoint(where: Place) -> Checkpoint:
    """Reads the table of contents of a finalized checkpoint.

    Raises:
      NoSessionError: There is none.
      CorruptCheckpointError: It is damaged.
    """
    contents = where.read_contents()
    if contents is not None:
        return OwnCheckpoint(where, contents)
    foreign = orbax_reader.find(where.final) if isinstance(where.final, Path) else None
    if foreign is None:
        raise _nothing_to_load(where)
    return foreign


def chosen(checkpoint: Checkpoint, where: Place, wanted: Sequence[KeyPath]) -> Checkpoint:
    """Returns the checkpoint that a target means: of several items the only tree, or all of them.

    It is the tree where the target, by the paths of its leaves, names no item: a state that is
    saved beside JSON or a key can be loaded without them.
    """
    only, names = checkpoint.composition.only_tree, set(checkpoint.composition.broken)
    if only is None:
        return checkpoint
    names.update(leaf.texts[0] for leaf in checkpoint.contents.leaves)
    if any(path.texts[:1] and path.texts[0] in names for path in wanted):
        return checkpoint
    return open_checkpoint(places.resolve(where.final / only))


def require_items(checkpoint: Checkpoint, wanted: Sequence[KeyPath] | None) -> None:
    """Raises what is wrong with the items that hold these paths of leaves; None means all."""
    for name, error in checkpoint.composition.broken.items():
        if wanted is None or any(path.texts[:1] in ((name,), ()) for path in wanted):
            raise type(error)(
                f"{error}\nOther items can be read: with partial=True and a target that lacks "
                f"{name!r}, or by their own paths."
            ) from error


def _nothing_to_load(where: Place) -> NoSessionError:
    if where.is_session():
        return NoSessionError(
            f"{where.final} is not finalized: its parts are in {where.session}. Finalize it first."
        )
    meant = ""
    if isinstance(where.final, Path):
        meant = catalog.probably_meant(where.final) or catalog.called_alike(where.final)
    return NoSessionError(f"There is no checkpoint at {where.final}.{meant}")


def describe_checkpoint(where: Place, checkpoint: Checkpoint) -> CheckpointMetadata:
    """Returns the public description of an open checkpoint."""
    composition = checkpoint.composition
    left_out = {name: str(why) for name, why in composition.broken.items()}
    left_out.update(composition.others)
    return replace(described(where, checkpoint.contents), left_out=left_out)


def described(where: Place, contents: Contents) -> CheckpointMetadata:
    """Returns the public description of a table of contents."""
    return CheckpointMetadata(
        path=where.final,
        leaves={leaf.name: _describe_leaf(leaf) for leaf in contents.leaves},
        custom_metadata=contents.custom_metadata,
        training=contents.training,
        bytes=sum(leaf.bytes for leaf in contents.leaves),
        started_at=contents.started_ns / 1e9,
        committed_at=contents.committed_ns / 1e9,
        parts=contents.parts,
    )


def _describe_leaf(leaf: Leaf) -> LeafMetadata:
    sharding = None if leaf.sharding is None else leaf.sharding.json
    return LeafMetadata(leaf.name, leaf.kind, *shape_and_dtype(leaf), leaf.bytes, sharding)
