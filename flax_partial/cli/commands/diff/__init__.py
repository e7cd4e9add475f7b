"""`diff`: which leaves of two checkpoints differ, in what, and by how much."""

import argparse
from collections.abc import Callable
from typing import Any

from flax_partial.cli import listing, pieces, places, selection, text
from flax_partial.cli.commands.diff import changes
from flax_partial.cli.commands.diff.changes import Change
from flax_partial.cli.commands.diff.difference import Difference
from flax_partial.cli.output import BAD, GOOD, Column, Output, Row, picked
from flax_partial.format.model import PRNG_KEY, Leaf
from flax_partial.loading.checkpoint import Checkpoint

_COLUMNS = (
    Column("LEAF"),
    Column("CHANGE"),
    Column("A", dispensable=2),
    Column("B", dispensable=1),
    Column("DIFFERENT", is_number=True, dispensable=3),
    Column("LARGEST", is_number=True),
    Column("RELATIVE", is_number=True, dispensable=4),
)
_STYLES = {changes.ADDED: GOOD, changes.REMOVED: BAD, changes.UNREADABLE: BAD}

EXAMPLES = (
    "diff runs/lm/100 runs/lm/300",
    "diff runs/lm/100 runs/lm --only params",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Say which leaves of B were added, removed or changed against A, and by how much. Leaves "
        "whose digests agree are not read."
    )
    selection.add_checkpoints(parser, "a", "b")
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Compares two checkpoints; returns whether they differ."""
    paths = [listing.one_checkpoint(path, out) for path in (options.a, options.b)]
    with places.open_finalized(paths[0]) as a, places.open_finalized(paths[1]) as b:
        names, found = _compare(a, b, options, out)
    ordered = [found[name] for name in names if name in found]
    same = len(names) - len(ordered)
    out.json(a=paths[0], b=paths[1], same=same, changes=[*map(_as_json, ordered)])
    out.table(_COLUMNS, [*map(_row, ordered)])
    for change in ordered:
        if change.problem:
            out.line(change.problem, BAD)
    out.line(f"changed: {text.leaves(len(ordered))}, the same: {text.leaves(same)}")
    return bool(ordered)


def _compare(
    a: Checkpoint, b: Checkpoint, options: argparse.Namespace, out: Output
) -> tuple[list[str], dict[str, Change]]:
    """Returns the names of the chosen leaves of both, and what has changed, by name."""
    in_a, in_b = ({leaf.name: leaf for leaf in one.contents.leaves} for one in (a, b))
    both = list({**in_b, **in_a}.values())  # a pattern has to name something in one of them
    names = {leaf.name for leaf in selection.chosen(both, options.only, options.skip)}
    in_a, in_b = ({n: leaf for n, leaf in one.items() if n in names} for one in (in_a, in_b))
    found = changes.described_changes(in_a, in_b)
    pairs = [
        (leaf, in_b[name])
        for name, leaf in in_a.items()
        if name in in_b and changes.need_reading(leaf, in_b[name])
    ]
    with out.bar("Comparing") as progress:
        differences, problems = _read(a, b, pairs, progress)
    for leaf, other in pairs:
        name, difference = leaf.name, differences[leaf.name]
        if name in problems:
            found[name] = Change(name, changes.UNREADABLE, leaf, other, problem=problems[name])
        elif leaf.dtype != other.dtype:
            found[name] = Change(name, changes.DTYPE, leaf, other, difference)
        elif difference.different or leaf.text != other.text:
            found[name] = Change(name, changes.VALUES, leaf, other, difference)
    return list({**in_a, **in_b}), found


def _read(
    a: Checkpoint,
    b: Checkpoint,
    pairs: list[tuple[Leaf, Leaf]],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Difference], dict[str, str]]:
    """Reads and compares pairs of leaves, batch by batch.

    Returns:
      By name, how far the values of the leaves differ, and why one of them cannot be read.
    """
    others = {leaf.name: other for leaf, other in pairs}
    differences = {name: Difference() for name in others}
    problems: dict[str, str] = {}
    for batch in pieces.in_batches([leaf for leaf, _ in pairs], progress):
        mirrored = [(others[leaf.name], start, shape) for leaf, start, shape in batch]
        for (leaf, _, _), one, other in zip(batch, a.read(batch), b.read(mirrored), strict=True):
            if isinstance(one, Exception):
                problems[leaf.name] = f"A: {one}"
            elif isinstance(other, Exception):
                problems[leaf.name] = f"B: {other}"
            else:
                differences[leaf.name].add(one, other)
    return differences, problems


def _row(change: Change) -> Row:
    is_like_a = change.change == changes.VALUES and change.difference is not None
    cells = (
        text.name(change.name),
        change.change,
        "" if change.a is None else text.leaf(change.a),
        "" if change.b is None or is_like_a else text.leaf(change.b),
        *_numbers(change),
    )
    return Row(cells, _STYLES.get(change.change, ""))


def _numbers(change: Change) -> tuple[str, str, str]:
    """By how much the values differ; of PRNG keys, only how many."""
    difference = change.difference
    if difference is None:
        return "", "", ""
    count = f"{difference.different:,} of {difference.elements:,}"
    if _are_keys(change):
        return count, "", ""
    largest = text.number(difference.largest)
    if difference.not_finite:
        largest += f", {difference.not_finite:,} nan/inf"
    relative = difference.relative
    return count, largest, "" if relative is None else text.number(relative)


def _are_keys(change: Change) -> bool:
    return change.a is not None and change.a.kind == PRNG_KEY


def _as_json(change: Change) -> dict[str, Any]:
    difference, numbers = change.difference, ["elements", "different"]
    if not _are_keys(change):
        numbers += ["not_finite", "largest", "relative"]
    return picked(change, "name", "change", "problem") | {
        "a": _leaf_as_json(change.a),
        "b": _leaf_as_json(change.b),
        "difference": None if difference is None else picked(difference, *numbers),
    }


def _leaf_as_json(leaf: Leaf | None) -> dict[str, Any] | None:
    if leaf is None:
        return None
    return picked(leaf, "kind", "shape", "dtype", *(["text"] if leaf.text else []))
