"""`diff`: which leaves of two checkpoints differ, in what, and by how much."""

import argparse
from collections.abc import Callable
from typing import Any

from flax_partial.cli import places, selection, text
from flax_partial.cli.command import add_command
from flax_partial.cli.commands.diff import changes
from flax_partial.cli.commands.diff.changes import Change
from flax_partial.cli.commands.diff.difference import Difference
from flax_partial.cli.output import Output
from flax_partial.cli.tables import BAD, GOOD, Column, Row, Table
from flax_partial.format import model as kinds
from flax_partial.format.model import Leaf
from flax_partial.loading.batches import batches, region_bytes
from flax_partial.loading.checkpoint import Checkpoint

_AT_ONCE_BYTES = 64 << 20  # of A, and as much of B; reading takes about as much again
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

Leaves = dict[str, Leaf]


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        run,
        "diff",
        "A",
        "B",
        summary="compare two checkpoints, leaf by leaf",
        description="Say which leaves of B were added, removed or changed against A, and by how "
        "much. Leaves whose digests agree are not read.",
    )
    selection.add_options(parser)


def run(options: argparse.Namespace, out: Output) -> bool:
    """Compares two checkpoints; returns whether they differ."""
    with places.open_finalized(options.a) as a, places.open_finalized(options.b) as b:
        return _report(options, out, a, b)


def _report(options: argparse.Namespace, out: Output, a: Checkpoint, b: Checkpoint) -> bool:
    leaves_a, leaves_b = _chosen(a, b, options)
    found = changes.described_changes(leaves_a, leaves_b)
    with out.bar("Comparing") as progress:
        found |= _changes_of_values(a, b, leaves_a, leaves_b, progress)
    names = list({**leaves_a, **leaves_b})
    ordered = [found[name] for name in names if name in found]
    same = len(names) - len(ordered)
    out.json({"a": options.a, "b": options.b, "same": same, "changes": [*map(_as_json, ordered)]})
    out.table(Table(_COLUMNS, [*map(_row, ordered)]))
    for change in ordered:
        if change.problem:
            out.line(change.problem, BAD)
    out.line(f"changed: {text.leaves(len(ordered))}, the same: {text.leaves(same)}")
    return bool(ordered)


def _chosen(a: Checkpoint, b: Checkpoint, options: argparse.Namespace) -> tuple[Leaves, Leaves]:
    """Returns the chosen leaves of both; a pattern has to name something in one of them."""
    of_a, of_b = ({leaf.name: leaf for leaf in one.contents.leaves} for one in (a, b))
    every = list({**of_b, **of_a}.values())
    names = {leaf.name for leaf in selection.chosen(every, options.only, options.skip)}
    return (
        {name: leaf for name, leaf in of_a.items() if name in names},
        {name: leaf for name, leaf in of_b.items() if name in names},
    )


def _changes_of_values(
    a: Checkpoint,
    b: Checkpoint,
    leaves_a: Leaves,
    leaves_b: Leaves,
    progress: Callable[[int, int], None],
) -> dict[str, Change]:
    """Reads and compares what only reading tells apart."""
    pairs = [
        (leaf, leaves_b[name])
        for name, leaf in leaves_a.items()
        if name in leaves_b and changes.have_values_to_compare(leaf, leaves_b[name])
    ]
    differences, problems = _compare(a, b, pairs, progress)
    return {
        one.name: change
        for one, other in pairs
        if (change := _change(one, other, differences[one.name], problems.get(one.name, "")))
    }


def _change(a: Leaf, b: Leaf, difference: Difference, problem: str) -> Change | None:
    if problem:
        return Change(a.name, changes.UNREADABLE, a, b, problem=problem)
    if a.dtype != b.dtype:
        return Change(a.name, changes.DTYPE, a, b, difference)
    is_same = not difference.different and a.text == b.text
    return None if is_same else Change(a.name, changes.VALUES, a, b, difference)


def _compare(
    a: Checkpoint,
    b: Checkpoint,
    pairs: list[tuple[Leaf, Leaf]],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Difference], dict[str, str]]:
    """Compares the data of pairs of leaves, batch by batch.

    Returns:
      Name of each leaf to its difference, and of each that cannot be read to why.
    """
    others = {one.name: other for one, other in pairs}
    differences = {one.name: Difference() for one, _ in pairs}
    problems: dict[str, str] = {}
    done, total = 0, sum(one.bytes for one, _ in pairs)
    for batch in batches([one for one, _ in pairs], most_bytes=_AT_ONCE_BYTES):
        mirrored = [(others[leaf.name], start, shape) for leaf, start, shape in batch]
        read_a, read_b = a.read(batch), b.read(mirrored)
        for (leaf, _, _), one, other in zip(batch, read_a, read_b, strict=True):
            if isinstance(one, Exception):
                problems[leaf.name] = f"A: {one}"
            elif isinstance(other, Exception):
                problems[leaf.name] = f"B: {other}"
            else:
                differences[leaf.name].add(one, other)
        done += sum(map(region_bytes, batch))
        progress(done, total)
    return differences, problems


def _row(change: Change) -> Row:
    is_other = change.change != changes.VALUES or change.difference is None
    return Row(
        (
            text.name(change.name),
            change.change,
            "" if change.a is None else text.leaf(change.a),
            text.leaf(change.b) if change.b is not None and is_other else "",
            *_numbers(change),
        ),
        _STYLES.get(change.change, ""),
    )


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
    return change.a is not None and change.a.kind == kinds.PRNG_KEY


def _as_json(change: Change) -> dict[str, Any]:
    return {
        "name": change.name,
        "change": change.change,
        "a": _leaf_as_json(change.a),
        "b": _leaf_as_json(change.b),
        "difference": _difference_as_json(change),
        "problem": change.problem or None,
    }


def _leaf_as_json(leaf: Leaf | None) -> dict[str, Any] | None:
    if leaf is None:
        return None
    described = {"kind": leaf.kind, "shape": list(leaf.shape), "dtype": leaf.dtype}
    return described | ({"text": leaf.text} if leaf.text else {})


def _difference_as_json(change: Change) -> dict[str, Any] | None:
    difference = change.difference
    if difference is None:
        return None
    counts = {"elements": difference.elements, "different": difference.different}
    if _are_keys(change):
        return counts
    return counts | {
        "not_finite": difference.not_finite,
        "largest": difference.largest,
        "relative": difference.relative,
    }
