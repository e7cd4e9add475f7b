"""`show`: what is in a checkpoint, as a tree."""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flax_partial.cli import places, selection, text
from flax_partial.cli.command import add_command
from flax_partial.cli.commands.show import tree
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.tables import STRONG, Column, Row, Table
from flax_partial.format.model import Leaf
from flax_partial.loading import checkpoint as loading
from flax_partial.reports import CheckpointMetadata, LeafMetadata

_COLUMNS = (
    Column("NAME"),
    Column("SHAPE"),
    Column("DTYPE", dispensable=2),
    Column("SHARDING", dispensable=3),
    Column("SIZE", is_number=True, dispensable=1),
    Column("SHARE", is_number=True, dispensable=4),
)


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        run,
        "show",
        "PATH",
        summary="show what is in a checkpoint, as a tree",
        description="Show what is in a checkpoint, or was saved so far into an unfinished one.",
    )
    parser.add_argument("--depth", type=int, metavar="N", help="go down N levels only")
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Shows a checkpoint."""
    if options.depth is not None and options.depth < 1:
        raise WrongUseError(f"--depth is at least 1, not {options.depth}")
    where = places.resolve(options.path)
    contents, state = places.read_contents(options.path)
    leaves = selection.chosen(contents.leaves, options.only, options.skip)
    described = loading.described(where, contents)
    if out.is_json:
        shown = [described.leaves[leaf.name] for leaf in leaves]
        writer = places.OURS if state == places.UNFINISHED else places.written_by(contents)
        out.json(_as_json(described, state, writer, shown))
        return False
    path = where.final if state == places.FINALIZED else where.session
    out.line(str(path), STRONG)
    out.line(_summary(described, state))
    metadata = text.custom_metadata(contents.custom_metadata)
    if metadata:
        out.line(f"custom metadata: {metadata}")
    out.line("")
    guides = tree.LINES if out.can_write(tree.LINES.child + tree.LINES.last) else tree.ASCII
    out.table(Table(_COLUMNS, _rows(leaves, described, options.depth, guides)))
    return False


def _summary(described: CheckpointMetadata, state: str) -> str:
    amount = f"{text.leaves(len(described.leaves))}, {text.size(described.bytes)}"
    if state == places.UNFINISHED:
        return f"{state}: {text.counted(described.parts, 'part')}, {amount}"
    written = text.age(time.time() - described.committed_at)
    made = text.counted(described.parts, "part") if described.parts else "written by Orbax"
    return f"{state} {written}: {made}, {amount}"


def _rows(
    leaves: Sequence[Leaf],
    described: CheckpointMetadata,
    depth: int | None,
    guides: tree.Guides,
) -> list[Row]:
    root = tree.build(leaves)
    if root.leaf is not None:
        return [_leaf_row("''", root.leaf, described)]
    rows = []
    for guide, key, node in tree.lines(root, depth, guides):
        label = guide + text.name(key)
        if node.leaf is not None:
            rows.append(_leaf_row(label, node.leaf, described))
        else:
            rows.append(_subtree_row(label, node, described.bytes))
    rows.append(_subtree_row("total", root, described.bytes))
    return rows


def _leaf_row(label: str, leaf: Leaf, described: CheckpointMetadata) -> Row:
    metadata = described.leaves[leaf.name]
    return Row(
        (
            label,
            text.shape(metadata.shape) if leaf.is_array else text.plain_value(leaf),
            metadata.dtype,
            text.sharding(metadata.sharding),
            text.size(leaf.bytes) if leaf.is_array else "",
            text.share(leaf.bytes, described.bytes) if leaf.is_array else "",
        )
    )


def _subtree_row(label: str, node: tree.Node, whole_bytes: int) -> Row:
    dtypes = "" if len(node.dtypes) != 1 else next(iter(node.dtypes))
    return Row(
        (
            label,
            text.leaves(node.leaves),
            dtypes,
            "",
            text.size(node.bytes),
            text.share(node.bytes, whole_bytes),
        ),
        style=STRONG,
    )


def _as_json(
    described: CheckpointMetadata, state: str, written_by: str, leaves: Sequence[LeafMetadata]
) -> dict[str, Any]:
    return {
        "path": str(described.path),
        "state": state,
        "format": written_by,
        "started_at": described.started_at,
        "written_at": described.committed_at,
        "parts": described.parts,
        "bytes": described.bytes,
        "custom_metadata": described.custom_metadata,
        "leaves": [_leaf_as_json(leaf) for leaf in leaves],
    }


def _leaf_as_json(leaf: LeafMetadata) -> Mapping[str, Any]:
    return {
        "name": leaf.name,
        "kind": leaf.kind,
        "shape": list(leaf.shape),
        "dtype": leaf.dtype,
        "bytes": leaf.bytes,
        "sharding": leaf.sharding,
    }
