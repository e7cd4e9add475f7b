"""`show`: what is in a checkpoint, as a tree."""

import argparse
import time
from collections.abc import Iterator, Sequence

from flax_partial.cli import listing, places, selection, text
from flax_partial.cli.commands.show import tree
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import BAD, STRONG, Column, Output, Row, picked
from flax_partial.format.model import Leaf
from flax_partial.reports import CheckpointMetadata

_COLUMNS = (
    Column("NAME"),
    Column("SHAPE"),
    Column("DTYPE", dispensable=2),
    Column("SHARDING", dispensable=3),
    Column("SIZE", is_number=True, dispensable=1),
    Column("SHARE", is_number=True, dispensable=4),
)

EXAMPLES = (
    "show runs/lm",
    "show runs/lm/300 --depth 2",
    "show runs/lm/300 --only '*.kernel' --skip head",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "Show what is in a checkpoint, or was saved so far into an unfinished one."
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a checkpoint, finalized or not; a run stands for its newest finalized one",
    )
    parser.add_argument("--depth", type=int, metavar="N", help="go down N levels only")
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Shows a checkpoint."""
    if options.depth is not None and options.depth < 1:
        raise WrongUseError(f"--depth is at least 1, not {options.depth}")
    path = listing.one_checkpoint(options.path, out)
    where = places.resolve(path)
    contents, described, state = places.read_contents(path)
    leaves = selection.chosen(contents.leaves, options.only, options.skip)
    is_finalized = state == places.FINALIZED
    users_own, training = places.shown(contents.custom_metadata), places.shown(contents.training)
    out.json(
        **picked(described, "path", "started_at", "parts", "bytes"),
        custom_metadata=users_own,
        training=training,
        state=state,
        format=places.written_by(described) if is_finalized else places.OURS,
        written_at=described.committed_at,
        leaves=[described.leaves[leaf.name] for leaf in leaves],
        left_out=dict(described.left_out),
    )
    out.line(str(where.final if is_finalized else where.session), STRONG)
    out.line(_summary(described, state))
    for line in text.metadata(users_own, training):
        out.line(line)
    out.line("")
    out.table(_COLUMNS, [*_rows(leaves, described, options.depth)])
    for name, why in described.left_out.items():
        out.line(f"left out: {text.name(name)}: {why}", BAD)
    return False


def _summary(described: CheckpointMetadata, state: str) -> str:
    amount = text.leaves(len(described.leaves), described.bytes)
    made = text.counted(described.parts, "part")
    if state == places.UNFINISHED:
        return f"{state}: {made}, {amount}"
    written = text.age(time.time() - described.committed_at)
    return f"{state} {written}: {made if described.parts else 'written by Orbax'}, {amount}"


def _rows(
    leaves: Sequence[Leaf], described: CheckpointMetadata, depth: int | None
) -> Iterator[Row]:
    root = tree.build(leaves)
    if root.leaf is not None:
        yield _row(text.name(""), root, described)
        return
    for guide, key, node in tree.lines(root, depth):
        yield _row(guide + text.name(key), node, described)
    yield _row("total", root, described)


def _row(label: str, node: tree.Node, described: CheckpointMetadata) -> Row:
    leaf = node.leaf
    sizes = "", ""
    if leaf is None or leaf.is_array:
        share = node.bytes / described.bytes if described.bytes else 0
        sizes = text.size(node.bytes), f"{100 * share:.1f} %"
    if leaf is None:
        dtype = "" if len(node.dtypes) != 1 else next(iter(node.dtypes))
        return Row((label, text.leaves(node.leaves), dtype, "", *sizes), STRONG)
    metadata = described.leaves[leaf.name]
    value = text.shape(metadata.shape) if leaf.is_array else text.plain_value(leaf)
    return Row((label, value, metadata.dtype, text.sharding(metadata.sharding), *sizes))
