"""`export`: a checkpoint's arrays in one safetensors file."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flax_partial.cli import listing, pieces, places, safetensors, selection, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import GOOD, Output
from flax_partial.cli.places import Given
from flax_partial.cli.safetensors import Layout
from flax_partial.errors import UnsupportedLeafError, first_few
from flax_partial.format.model import Contents, Leaf
from flax_partial.loading.checkpoint import Checkpoint
from flax_partial.storage import directories, system
from flax_partial.storage.store_path import AnyPath

_MOST_NAMED = 10

EXAMPLES = (
    "export runs/lm lm.safetensors",
    "export runs/lm/300 lm.safetensors --only params",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Write a checkpoint's arrays into one safetensors file, whatever their size in little "
        "memory. The file, or the object in a bucket, appears whole, or not at all."
    )
    selection.add_checkpoints(parser, "path")
    parser.add_argument("out", metavar="OUT", help="the file to be written, which replaces none")
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Exports a checkpoint."""
    target = _target(options.out)
    path = listing.one_checkpoint(options.path, out)
    with places.open_finalized(path) as checkpoint:
        leaves = selection.chosen(checkpoint.contents.leaves, options.only, options.skip)
        arrays = safetensors.ordered(leaves)
        layout = _lay_out(arrays, leaves, checkpoint.contents)
        with directories.new_file(target) as descriptor, out.bar("Exporting") as progress:
            _write(descriptor, layout.header, 0)
            _write_tensors(descriptor, layout, arrays, checkpoint, progress)
    widened = {leaf.name: leaf.dtype for leaf in arrays if leaf.dtype in safetensors.WIDER}
    texts = [leaf.name for leaf in leaves if not leaf.is_array]
    out.json(
        path=path,
        out=target.absolute(),
        tensors=len(arrays),
        bytes=layout.bytes,
        widened=widened,
        in_metadata=texts,
    )
    tensors = text.counted(len(arrays), "tensor")
    out.line(f"wrote {options.out}: {tensors}, {text.size(layout.bytes)}", GOOD)
    if widened:
        some = text.leaves(len(widened))
        kinds = ", ".join(sorted({*widened.values()}))
        out.line(f"{some} of {kinds} became wider: safetensors has no such dtype")
    if texts:
        out.line(f"{text.leaves(len(texts))} without array data went into the header's metadata")
    return False


def _target(path: Given) -> AnyPath:
    target = places.given(path)
    if os.path.lexists(target) if isinstance(target, Path) else target.exists():
        raise WrongUseError(f"{path} exists already: remove it, or write to another path")
    if isinstance(target, Path) and not target.parent.is_dir():
        raise WrongUseError(f"{target.parent} is not a directory")
    return target


def _lay_out(arrays: Sequence[Leaf], leaves: Sequence[Leaf], contents: Contents) -> Layout:
    """Lays the file out.

    Raises:
      UnsupportedLeafError: The format cannot hold some of the leaves.
    """
    problems = safetensors.problems(leaves)
    if problems:
        raise UnsupportedLeafError(
            "safetensors cannot hold these leaves; leave them out with --skip:\n  "
            + "\n  ".join(first_few(problems, most=_MOST_NAMED, count=len(problems)))
        )
    metadata, training = places.shown(contents.custom_metadata), places.shown(contents.training)
    try:
        return safetensors.lay_out(arrays, safetensors.metadata_of(leaves, metadata, training))
    except ValueError as error:
        raise UnsupportedLeafError(f"Too much for one safetensors file: {error}.") from error


def _write_tensors(
    descriptor: int,
    layout: Layout,
    arrays: Sequence[Leaf],
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None],
) -> None:
    """Reads and writes batch by batch.

    Raises:
      CorruptCheckpointError: Some leaf cannot be read.
    """
    for batch in pieces.in_batches(arrays, progress):
        for (leaf, start, _), data in zip(batch, checkpoint.read(batch), strict=True):
            if isinstance(data, Exception):
                raise data
            stored = data.astype(safetensors.stored_dtype(leaf), copy=False)
            for at, index in safetensors.runs(leaf.shape, start, data.shape):
                run = stored[index]
                data_bytes = np.ascontiguousarray(run).reshape(-1).view(np.uint8).data
                _write(descriptor, data_bytes, layout.offsets[leaf.name] + at * run.itemsize)


def _write(descriptor: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left[: system.MOST_BYTES], at)
        left, at = left[written:], at + written
