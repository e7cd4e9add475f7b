"""`import`: makes a checkpoint of safetensors files, or of a checkpoint that Orbax wrote."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

import flax_partial as fp
from flax_partial.cli import listing, pieces, places, selection, text
from flax_partial.cli.commands.import_.safetensors_files import SafetensorsFiles
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import GOOD, Output
from flax_partial.cli.places import Given
from flax_partial.format.chunks import choose_chunk_shape
from flax_partial.format.metadata import check_metadata
from flax_partial.format.model import Box, Leaf, Region
from flax_partial.saving.describe import Described
from flax_partial.saving.job import SaveJob
from flax_partial.saving.known_trees import KnownTree
from flax_partial.sessions import workers
from flax_partial.storage.place import Place

_SAFETENSORS = "safetensors"


class _Source(NamedTuple):
    """What is imported.

    Attributes:
      format: `safetensors` or `orbax`.
      leaves: Its leaves.
      read: Returns the data of each region of some, or why it cannot be read.
      custom_metadata: Those of the checkpoint to be made.
      training: What it is to record of training.
    """

    format: str
    leaves: Sequence[Leaf]
    read: Callable[[Sequence[Region]], list[np.ndarray | Exception]]
    custom_metadata: dict[str, Any]
    training: dict[str, Any]


EXAMPLES = (
    "import model.safetensors runs/base",
    "import model-00001.safetensors model-00002.safetensors runs/base --skip lm_head",
    "import orbax_run/300 runs/lm/300",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Make a checkpoint of safetensors files, or of a checkpoint that Orbax wrote, whatever its "
        "size in little memory. It appears whole, or not at all."
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a safetensors file, or several that are one model; or a checkpoint that Orbax wrote",
    )
    parser.add_argument("path", metavar="PATH", help="the checkpoint to be made")
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Imports a checkpoint."""
    where = _target(options.path)
    with _opened(options.sources, out) as source:
        leaves = selection.chosen(source.leaves, options.only, options.skip)
        if not leaves:
            raise WrongUseError(f"{options.sources[0]} holds nothing")
        checked = {
            name: check_metadata(getattr(source, name), name)
            for name in ("custom_metadata", "training")
        }
        with _removed_on_failure(where), out.bar("Importing") as progress:
            _copy(source, leaves, where, checked, progress)
            done = fp.finalize(where.final)
    out.json(
        path=done.path,
        sources=options.sources,
        format=source.format,
        leaves=len(done.leaves),
        bytes=done.bytes,
    )
    amount = text.leaves(len(done.leaves), done.bytes)
    out.line(f"imported {done.path}: {amount}, from {source.format}", GOOD)
    return False


def _target(path: Given) -> Place:
    where = places.resolve(path)
    if places.is_there(where) or where.is_session():
        there = where.final if places.is_there(where) else where.session
        raise WrongUseError(f"{there} exists already: remove it, or import to another path")
    if isinstance(where.final, Path) and not where.final.parent.is_dir():
        raise WrongUseError(f"{where.final.parent} is not a directory")
    return where


@contextmanager
def _opened(paths: Sequence[str], out: Output) -> Iterator[_Source]:
    """Opens what is imported.

    Raises:
      WrongUseError: It is nothing that can be imported.
    """
    sources = [*map(places.local, paths)]
    for source in sources:
        if not os.path.lexists(source):
            raise WrongUseError(listing.absent(source))
    directories = [source for source in sources if source.is_dir()]
    if not directories:
        with contextlib.closing(SafetensorsFiles(sources)) as files:
            metadata = files.custom_metadata, files.training
            yield _Source(_SAFETENSORS, files.leaves, files.read, *metadata)
        return
    if len(sources) > 1:
        raise WrongUseError(f"{directories[0]} is a directory: only files can be several")
    path = listing.one_checkpoint(paths[0], out)
    with places.open_finalized(path) as checkpoint:
        if checkpoint.contents.parts:
            raise WrongUseError(f"{path} is a checkpoint of flax_partial already: copy it by cp -r")
        contents = checkpoint.contents
        step = listing.step_in_name(places.given(path).name)
        metadata = contents.custom_metadata, {} if step is None else {"step": step}
        yield _Source(places.ORBAX, contents.leaves, checkpoint.read, *metadata)


@contextmanager
def _removed_on_failure(where: Place) -> Iterator[None]:
    """Drops the session of an import that fails, or is interrupted."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(fp.NoSessionError):  # nothing was saved yet
            fp.abort(where.final)
        raise


def _copy(
    source: _Source,
    leaves: Sequence[Leaf],
    where: Place,
    metadata: Mapping[str, dict[str, Any]],
    progress: Callable[[int, int], None],
) -> None:
    """Reads and saves batch by batch, each as a part.

    Raises:
      CorruptCheckpointError: Some leaf cannot be read.
    """
    targets = {leaf.name: _target_leaf(leaf) for leaf in leaves}
    rest = [leaf for leaf in leaves if not leaf.is_array]
    if rest or any(metadata.values()):
        _save(where, rest, [() for _ in rest], **metadata)
    for batch in pieces.in_batches(leaves, progress):
        by_leaf = _by_leaf(batch, source.read(batch))
        parts = [
            targets[name].with_boxes(tuple(Box(start, data.shape) for start, data in found))
            for name, found in by_leaf.items()
        ]
        _save(where, parts, [[data for _, data in found] for found in by_leaf.values()])


def _by_leaf(
    batch: Sequence[Region], outcomes: Sequence[np.ndarray | Exception]
) -> Mapping[str, list[tuple[tuple[int, ...], np.ndarray]]]:
    """Returns, by name of the leaf, where each piece that was read begins, and the piece."""
    found: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for (leaf, start, _), data in zip(batch, outcomes, strict=True):
        if isinstance(data, Exception):
            raise data
        found.setdefault(leaf.name, []).append((start, data))
    return found


def _target_leaf(leaf: Leaf) -> Leaf:
    """A leaf as it is saved: in chunks that divide those in which it is read."""
    if not leaf.is_array:
        return leaf
    chunk = choose_chunk_shape(
        leaf.shape,
        unit=tuple(map(min, leaf.chunk, leaf.shape)),
        pinned=frozenset(),
        itemsize=leaf.numpy_dtype.itemsize,
        target_bytes=fp.SaveOptions().chunk_bytes,
    )
    return replace(leaf, chunk=chunk)


def _save(
    where: Place,
    leaves: list[Leaf],
    sources: Sequence[Sequence[np.ndarray]],
    *,
    custom_metadata: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Saves boxes of leaves as a part: what `fp.save` does, whose arrays are whole ones of JAX's.

    So a leaf keeps its kind, its keys and its sharding, and no device is started.
    """
    sizes = [sum(array.nbytes for array in arrays) for arrays in sources]
    job = SaveJob(
        where,
        Described(KnownTree(), leaves, [*sources], sizes),
        custom_metadata=custom_metadata or {},
        training=training or {},
        options=fp.SaveOptions(),
        reuse=None,
        started=time.perf_counter(),
    )
    try:
        job.claim(replace=False)
        workers.saving.run(job.task)
    except BaseException:
        job.task.withdraw()
        raise
