"""Stacked leaves: which of a state's leaves are stacked, and into which rows they are cut.

Scanned and pipelined models (MaxText, Praxis) keep all layers in one leaf, `[layers, ...]` or
`[repeats, stages, ...]`. Such a leaf is saved a row at a time (`_rows.py`). A row is cut out when
it is its turn to be saved: the leaf is never assembled, and only rows that wait to be written take
memory twice. Of a leaf that is sharded over several processes, each cuts and saves its own shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax_partial.callbacks import _leaves
from flax_partial.callbacks._rows import Axes, Index, Row, is_cuttable, rows_here

Stacked = Mapping[str, int | tuple[int, ...]]
"""Name of a leaf, or of a subtree of leaves, to the axis or axes along which they stack layers."""


def check(stacked: Stacked) -> dict[str, Axes]:
    """Returns what a user passed, with a tuple of axes for each name.

    Raises:
      TypeError: A key is no string, or a value neither an axis nor a tuple of several.
    """
    given: Mapping[Any, Any] = stacked
    for name, axes in given.items():
        if not (isinstance(name, str) and _are_axes(axes)):
            raise TypeError(
                f"stacked has {name!r}: {axes!r}; it maps names of leaves or subtrees, such as "
                "'params.layers', to the number of an axis, or to a tuple of several."
            )
    return {name: axes if isinstance(axes, tuple) else (axes,) for name, axes in given.items()}


def _are_axes(given: Any) -> bool:
    axes = given if isinstance(given, tuple) else (given,)
    are_numbers = all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
    return are_numbers and len(set(axes)) == len(axes) > 0


def check_known(stacked: Iterable[str], names: Iterable[str]) -> None:
    """Checks that each name is that of a leaf or subtree.

    Raises:
      ValueError: Some are not; it lists them.
    """
    known = list(names)
    unknown = [
        stack
        for stack in stacked
        if not any(name == stack or name.startswith(f"{stack}.") for name in known)
    ]
    if unknown:
        raise ValueError(
            f"stacked names {', '.join(map(repr, unknown))}, and the state has no such leaf or "
            f"subtree. Its leaves are called like {', '.join(map(repr, known[:3]))}."
        )


def spread(leaves: _leaves.Leaves, stacked: Mapping[str, Axes]) -> _leaves.Leaves:
    """Replaces each stacked leaf by the rows that this process has to save."""
    axes = _axes(leaves, stacked) if stacked else {}
    return [
        (path, value if row is None else Row(value, row, axes[names]))
        for path, value in leaves
        for names in (_leaves.texts(path),)
        for row in (rows_here(value, axes[names]) if names in axes else (None,))
    ]


def by_row(groups: Mapping[str, _leaves.Leaves]) -> dict[str, _leaves.Leaves]:
    """Splits groups: row 3 of what is stacked in group "x" comes into group "x.3", in order.

    Along two axes it is "x.3.0", and so on.
    """
    split: dict[str, _leaves.Leaves] = {}
    rows: dict[tuple[str, Index], _leaves.Leaves] = {}
    for group, leaves in groups.items():
        for path, leaf in leaves:
            if isinstance(leaf, Row):
                rows.setdefault((group, leaf.start), []).append((path, leaf))
            else:
                split.setdefault(group, []).append((path, leaf))
    for group, row in sorted(rows):  # a group of that name may be there already
        split.setdefault(".".join((group, *map(str, row))), []).extend(rows[group, row])
    return split


def cut(leaves: _leaves.Leaves) -> _leaves.Leaves:
    """Returns the leaves with their rows cut out of the arrays that hold them."""
    return [(path, leaf.cut() if isinstance(leaf, Row) else leaf) for path, leaf in leaves]


def _axes(
    leaves: Iterable[tuple[_leaves.KeyPath, Any]], stacked: Mapping[str, Axes]
) -> dict[tuple[str, ...], Axes]:
    """Returns the axes of each stacked leaf, by its path as text.

    Stacked are the leaves that `stacked` names, and those that end in the path of one of them, as
    Optax's moments do, and have as many rows.
    """
    values = {_leaves.texts(path): value for path, value in leaves}
    named = {
        names: axes
        for names, value in values.items()
        if (axes := _named_axes(names, value, stacked)) is not None
    }
    by_end = {names[1:]: names for names in named if names[1:]}
    found = dict(named)
    for names, value in values.items():
        if names in named:
            continue
        ends = (names[start:] for start in range(1, len(names)))
        model = next((by_end[end] for end in ends if end in by_end), None)
        if model is not None and _has_rows_of(value, values[model], axes=named[model]):
            found[names] = named[model]
    return found


def _named_axes(names: tuple[str, ...], value: Any, stacked: Mapping[str, Axes]) -> Axes | None:
    """Returns the axes of a leaf that `stacked` names; None if it is not, or lacks one of them."""
    stack = _leaves.innermost(names, stacked)
    if stack is None or not is_cuttable(value):
        return None
    rank = value.ndim
    if not all(-rank <= axis < rank for axis in stacked[stack]):
        return None
    return tuple(sorted({axis % rank for axis in stacked[stack]}))


def _has_rows_of(value: Any, model: Any, *, axes: Axes) -> bool:
    return (
        is_cuttable(value)
        and value.ndim > axes[-1]
        and all(value.shape[axis] == model.shape[axis] for axis in axes)
    )
