"""Reading finalized checkpoints: load, metadata, verify.

What is read is planned first: every leaf of the target is compared with the checkpoint, and all
that does not fit is told in one error, before any array data is read. Then only the boxes that
this process's devices hold are read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax import tree_util

from flax_partial import collector
from flax_partial.errors import CorruptCheckpointError, NoSessionError, TargetMismatchError
from flax_partial.format import keypaths
from flax_partial.format import model as kinds
from flax_partial.format import orbax as orbax_format
from flax_partial.format.digests import digest
from flax_partial.format.merge import merge
from flax_partial.format.model import Contents, Leaf, Region
from flax_partial.format.tables import decode_contents, encode_contents
from flax_partial.loading import data_reader as data_files
from flax_partial.loading import orbax_reader
from flax_partial.loading import target as placing
from flax_partial.loading.batches import batches, region_bytes
from flax_partial.loading.target import Placement
from flax_partial.reports import CheckpointMetadata, LeafMetadata, VerifyReport
from flax_partial.storage import local as storage
from flax_partial.storage import tensorstore_io as arrays
from flax_partial.storage.local import CheckpointPath, PathLike
from flax_partial.storage.parts import read_parts

_VERIFIED_AT_ONCE_BYTES = 256 << 20
_PIECE_BYTES = 96 << 20  # of a load that says how far it is
_UNSUSPICIOUS_BYTES = 256 << 20  # reading this much takes longer than asking for the files' sizes
_MOST_ZSTD = 1 << 15  # bytes that a byte of zstd stands for: its shortest block is 4, for 128 KiB


class Checkpoint(Protocol):
    """A finalized checkpoint, ours or Orbax's."""

    @property
    def contents(self) -> Contents:
        """What it holds."""
        ...

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Returns, for each region, its data or a `CorruptCheckpointError` that names the leaf.

        An `OSError` where the system refused to read it.
        """
        ...


class _OwnCheckpoint:
    def __init__(self, path: Path, contents: Contents) -> None:
        self.contents = contents
        self._state = path / storage.STATE

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        lie = self._too_large({leaf.name: leaf for leaf, _, _ in regions}.values())
        if lie:
            return [CorruptCheckpointError(f"Leaf {leaf.name!r}: {lie}") for leaf, _, _ in regions]
        outcomes: dict[int, np.ndarray | Exception] = {}
        for has_runs in (True, False):
            places = [i for i, (leaf, _, _) in enumerate(regions) if bool(leaf.runs) == has_runs]
            some = [regions[i] for i in places]
            outcomes |= zip(places, self._read(some, has_runs=has_runs), strict=True)
        return [outcomes[i] for i in range(len(regions))]

    def _read(self, regions: Sequence[Region], *, has_runs: bool) -> list[np.ndarray | Exception]:
        if not has_runs:
            return arrays.read_regions(self._state, regions)
        found = data_files.read(self._state, self.contents.data_parts, regions)
        return [
            CorruptCheckpointError(f"Leaf {leaf.name!r}: {outcome}")
            if isinstance(outcome, ValueError)
            else outcome
            for outcome, (leaf, _, _) in zip(found, regions, strict=True)
        ]

    def _too_large(self, leaves: Iterable[Leaf]) -> str | None:
        """Says why there is no use in asking for the memory of leaves: the files hold less.

        Where there is not enough tensorstore ends the process, so that a table that lies about
        shapes, with the right digest, has to be found out before.
        """
        sizes = [(leaf.bytes, _MOST_ZSTD if leaf.compression else 1) for leaf in leaves]
        total = sum(size for size, _ in sizes)
        if total <= _UNSUSPICIOUS_BYTES:
            return None
        held = storage.bytes_below(self._state)
        if sum(size // most for size, most in sizes) <= held:
            return None
        return f"what is read would be of {total} bytes, and {self._state} holds {held}"


def load(
    path: PathLike,
    target: Any = None,
    *,
    partial: bool = False,
    cast: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Reads a finalized checkpoint, ours or Orbax's, and checks the digests of what it reads.

    Args:
      path: The checkpoint.
      target: A pytree of what is wanted: arrays, `jax.ShapeDtypeStruct` (with or without sharding),
        numbers, strings, None. Its leaves are found by their names, so that a dict, a dataclass and
        a Flax state with the same keys are interchangeable. None reads everything.
      partial: Whether `target` may lack leaves of the checkpoint; those are not read.
      cast: Whether a dtype that differs is converted; an error otherwise.
      progress: Called in this thread, before the first and after each piece of some 100 MiB, with
        how many bytes of how many are read.

    Returns:
      Without a target nested dicts and lists, with leaves of the kinds that were saved; a
      `jax.Array` is on the default device. With a target its structure, leaf types, dtypes and
      shardings; where it says nothing of sharding, the default device.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
      TargetMismatchError: Target and checkpoint differ; it lists every difference.
      CorruptCheckpointError: Data on disk is damaged; it names the leaves.
      OSError: The system refused to read it, which says nothing of the data.
    """
    where = storage.resolve(path)
    with collector.paused(), storage.reading(where.final):
        return _load(where, target, partial=partial, cast=cast, progress=progress)


def _load(
    where: CheckpointPath,
    target: Any,
    *,
    partial: bool,
    cast: bool,
    progress: Callable[[int, int], None] | None,
) -> Any:
    checkpoint = open_checkpoint(where)
    if target is None:
        placements = [placing.as_saved(leaf) for leaf in checkpoint.contents.leaves]
        return _nested(checkpoint.contents.leaves, _read(checkpoint, placements, progress))
    flat, structure = keypaths.flatten(target)
    wanted = [(keypaths.from_jax(path).name, value) for path, value in flat]
    placements = _plan(checkpoint.contents.leaves, wanted, partial=partial, cast=cast)
    return tree_util.tree_unflatten(structure, _read(checkpoint, placements, progress))


def metadata(path: PathLike) -> CheckpointMetadata:
    """Describes a finalized checkpoint, ours or one that Orbax wrote, without reading array data.

    Args:
      path: The checkpoint.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
      CorruptCheckpointError: Its table of contents is damaged.
    """
    where = storage.resolve(path)
    with storage.reading(where.final):
        return described(where, open_checkpoint(where).contents)


def verify(path: PathLike) -> VerifyReport:
    """Reads all of a finalized checkpoint and checks every digest.

    The files that are derived from the parts are derived once more and compared. Of a checkpoint
    that Orbax wrote, which has no digests, it says whether everything can be read.

    Args:
      path: The checkpoint.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
    """
    return verify_with(path, progress=lambda _done, _total: None)


def verify_with(path: PathLike, *, progress: Callable[[int, int], None]) -> VerifyReport:
    """Does what `verify` does, and tells after each batch how many bytes of how many are read."""
    where = storage.resolve(path)
    with storage.reading(where.final):
        return _verify(where, progress)


def _verify(where: CheckpointPath, progress: Callable[[int, int], None]) -> VerifyReport:
    try:
        checkpoint = open_checkpoint(where)
    except CorruptCheckpointError as error:
        return VerifyReport(where.final, 0, 0, {str(where.final): str(error)})
    leaves = checkpoint.contents.leaves
    bad = dict(_derived_problems(where, checkpoint.contents)) if checkpoint.contents.parts else {}
    done, total = 0, sum(leaf.bytes for leaf in leaves)
    # Orbax's shapes have no digest: one of absurd size has to fail whole, not be read forever.
    is_cut = bool(checkpoint.contents.parts)
    for batch in batches(leaves, most_bytes=_VERIFIED_AT_ONCE_BYTES, cut=is_cut):
        for (leaf, _, _), outcome in zip(batch, checkpoint.read(batch), strict=True):
            if isinstance(outcome, Exception):
                bad[leaf.name] = str(outcome)
        done += sum(map(region_bytes, batch))
        progress(done, total)
    return VerifyReport(where.final, len(leaves), total, bad)


def open_checkpoint(where: CheckpointPath) -> Checkpoint:
    """Reads the table of contents of a finalized checkpoint.

    Raises:
      NoSessionError: There is none.
      CorruptCheckpointError: It is damaged.
    """
    path = where.final / storage.STATE / storage.CONTENTS
    data = storage.read(path)
    names = storage.part_names_in(where.final / storage.STATE)
    if data is None and names:  # unless it was finalized between these two looks
        data = storage.read(path)
    if data is not None:
        contents = decode_contents(data, where=str(path))
        if contents.first_part not in names:
            raise CorruptCheckpointError(
                f"{path} is of another checkpoint, or {contents.first_part} beside it is lost."
            )
        return _OwnCheckpoint(where.final, contents)
    if names:
        raise CorruptCheckpointError(
            f"{path} is missing, and {where.final} holds parts: it is damaged, or was renamed "
            f"before it was finalized. Rename it to {where.session} and finalize it."
        )
    foreign = orbax_reader.find(where.final)
    if foreign is None:
        raise _nothing_to_load(where)
    return foreign


def _nothing_to_load(where: CheckpointPath) -> NoSessionError:
    if storage.is_session(where):
        return NoSessionError(
            f"{where.final} is not finalized: its parts are in {where.session}. Finalize it first."
        )
    return NoSessionError(f"There is no checkpoint at {where.final}.")


def described(where: CheckpointPath, contents: Contents) -> CheckpointMetadata:
    """Returns the public description of a table of contents."""
    leaves = {leaf.name: _describe_leaf(leaf) for leaf in contents.leaves}
    return CheckpointMetadata(
        path=where.final,
        leaves=leaves,
        custom_metadata=contents.custom_metadata,
        bytes=sum(leaf.bytes for leaf in leaves.values()),
        started_at=contents.started_ns / 1e9,
        committed_at=contents.committed_ns / 1e9,
        parts=contents.parts,
    )


def _describe_leaf(leaf: Leaf) -> LeafMetadata:
    shape, dtype = leaf.shape, leaf.dtype
    if leaf.kind == kinds.PRNG_KEY:
        shape, dtype = placing.key_shape_and_dtype(leaf)
    return LeafMetadata(leaf.name, leaf.kind, shape, dtype, leaf.bytes, leaf.sharding)


def _plan(
    leaves: Sequence[Leaf], wanted: Sequence[tuple[str, Any]], *, partial: bool, cast: bool
) -> list[Placement]:
    by_name = {leaf.name: leaf for leaf in leaves}
    placements: list[Placement] = []
    problems: list[str] = []
    for name, value in wanted:
        leaf = by_name.get(name)
        if leaf is None:
            problems.append(f"{name!r} is not in the checkpoint")
            continue
        placement = placing.as_target(leaf, value, cast=cast)
        if isinstance(placement, str):
            problems.append(placement)
        else:
            placements.append(placement)
    if not partial:
        names = {name for name, _ in wanted}
        problems += [f"{name!r} is not in the target" for name in by_name if name not in names]
    if problems:
        raise TargetMismatchError(
            f"The checkpoint does not fit the target in {len(problems)} places "
            "(partial=True lets the target lack leaves, cast=True converts dtypes):\n  "
            + "\n  ".join(problems)
        )
    return placements


def _read(
    checkpoint: Checkpoint,
    placements: Sequence[Placement],
    progress: Callable[[int, int], None] | None,
) -> list[Any]:
    """Reads the boxes of all placements, in pieces if progress is told, and builds the leaves."""
    regions = [(one.leaf, *box) for one in placements for box in one.boxes]
    if progress is None:
        outcomes = checkpoint.read(regions)
    else:
        outcomes = _read_in_pieces(checkpoint, regions, progress)
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    for error in errors:
        if isinstance(error, OSError):
            raise error
    if errors:
        raise CorruptCheckpointError("\n".join(dict.fromkeys(map(str, errors))))
    data: Iterator[Any] = iter(outcomes)
    values = [one.build([next(data) for _ in one.boxes]) for one in placements]
    return placing.put_on_devices(values)


def _read_in_pieces(
    checkpoint: Checkpoint, regions: Sequence[Region], progress: Callable[[int, int], None]
) -> list[np.ndarray | Exception]:
    sizes = [*map(region_bytes, regions)]
    outcomes: list[np.ndarray | Exception] = []
    done, total = 0, sum(sizes)
    while len(outcomes) < len(regions):
        progress(done, total)
        first = end = len(outcomes)
        piece_end = done + _PIECE_BYTES
        while end < len(regions) and (end == first or done + sizes[end] <= piece_end):
            done += sizes[end]
            end += 1
        outcomes += checkpoint.read(regions[first:end])
    progress(done, total)
    return outcomes


def _nested(leaves: Sequence[Leaf], values: Sequence[Any]) -> Any:
    """Builds nested dicts and lists; a list's elements may have been saved in any order."""
    root: dict[Any, Any] = {}
    nodes = {id(root)}  # a leaf may be a dict too
    keys: dict[tuple[int, str], str | int] = {}  # (node, text) -> key: saves may differ in its type
    lists: list[tuple[dict[Any, Any], Any]] = []
    for leaf, value in zip(leaves, values, strict=True):
        node, key = root, None
        for text, kind in zip(leaf.path.texts, leaf.path.kinds, strict=True):
            if key not in node:
                inner: dict[Any, Any] = {}
                node[key] = inner
                nodes.add(id(inner))
                if kind == keypaths.INDEX:
                    lists.append((node, key))
            node = node[key]
            if id(node) not in nodes:
                raise _no_tree(leaf)
            key = keys.setdefault(
                (id(node), text), text if kind in keypaths.TEXT_KEYS else int(text)
            )
        if key in node:
            raise _no_tree(leaf)
        node[key] = value
    for parent, key in reversed(lists):  # the inner ones first
        children = parent[key]
        try:
            parent[key] = [children[i] for i in range(len(children))]
        except KeyError as error:
            raise CorruptCheckpointError(
                f"In the table of contents list {key!r} lacks element {error}"
            ) from None
    return root[None]


def _no_tree(leaf: Leaf) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"Leaf {leaf.name!r}: in the table of contents it is there twice, or a leaf and a subtree"
    )


def _derived_problems(where: CheckpointPath, contents: Contents) -> Iterator[tuple[str, str]]:
    """Derives the root files from the parts once more; yields those that differ, and why."""
    found = read_parts(where.finalized)
    parts, torn, damaged = found.committed, found.torn, found.damaged
    yield from ((f"{storage.STATE}/{name}", why) for name, why in damaged.items())
    yield from ((f"{storage.STATE}/{name}", "it has no table of contents") for name in torn)
    files = orbax_format.root_files(contents)
    if not torn and not damaged:
        plan = merge(parts)
        derived = Contents(
            started_ns=plan.started_ns,
            committed_ns=contents.committed_ns,
            parts=len(parts),
            custom_metadata=plan.custom_metadata,
            leaves=plan.leaves,
            data_parts=plan.data_parts,
            first_part=min(parts, default=""),
        )
        data = encode_contents(derived)
        if data != encode_contents(contents):
            yield f"{storage.STATE}/{storage.CONTENTS}", "it is not what the parts add up to"
        files |= orbax_format.database_files(derived, plan.sources, uuid=database_uuid(data))
    for name, pieces in files.items():
        if not storage.holds(where.final / name, pieces):
            yield name, "it is missing, or not what the parts add up to"


def database_uuid(contents: bytes) -> bytes:
    """What identifies the database of a checkpoint with this `contents.json`."""
    return bytes.fromhex(digest(contents))
