"""Stacked leaves: which of a state's leaves are, and how one is cut into its layers.

Scanned and pipelined models (MaxText, Praxis) keep all layers in one leaf, `[layers, ...]` or
`[repeats, stages, ...]`. Such a leaf is saved a row at a time (`rows.py`). A row is cut out when it
is its turn to be saved: the leaf is never assembled, and no more of it is held twice than waits to
be written. Of a leaf that is spread over several processes, each cuts and saves what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax_partial.callbacks import _groups
from flax_partial.callbacks._rows import Axes, Index, Row, is_cuttable, rows_here

Stacked = Mapping[str, int | tuple[int, ...]]
"""Name of a leaf, or of a subtree of leaves, to the axis or axes along which they stack layers."""


def check(stacked: Stacked) -> dict[str, Axes]:
    """Checks what a user gives, and copies it.

    Raises:
      TypeError: Something is no name of a leaf, or no number of an axis, nor several.
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
    """Refuses what is the name of no leaf or subtree.

    Raises:
      ValueError: It names all that is not there.
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


def spread(leaves: _groups.Leaves, stacked: Mapping[str, Axes]) -> _groups.Leaves:
    """Puts its rows in the place of each stacked leaf: those that this process has to save."""
    axes = _axes(leaves, stacked) if stacked else {}
    return [
        (path, value if row is None else Row(value, row, axes[names]))
        for path, value in leaves
        for names in (_groups.texts(path),)
        for row in (rows_here(value, axes[names]) if names in axes else (None,))
    ]


def by_row(groups: Mapping[str, _groups.Leaves]) -> dict[str, _groups.Leaves]:
    """Splits groups: row 3 of what is stacked in group "x" comes into group "x.3", in order.

    Along two axes it is "x.3.0", and so on.
    """
    split: dict[str, _groups.Leaves] = {}
    rows: dict[tuple[str, Index], _groups.Leaves] = {}
    for group, leaves in groups.items():
        for path, leaf in leaves:
            if isinstance(leaf, Row):
                rows.setdefault((group, leaf.start), []).append((path, leaf))
            else:
                split.setdefault(group, []).append((path, leaf))
    for group, row in sorted(rows):  # a group of that name may be there already
        split.setdefault(".".join((group, *map(str, row))), []).extend(rows[group, row])
    return split


def cut(leaves: _groups.Leaves) -> _groups.Leaves:
    """Cuts out the rows among some leaves."""
    return [(path, leaf.cut() if isinstance(leaf, Row) else leaf) for path, leaf in leaves]


def _axes(
    leaves: Iterable[tuple[_groups.KeyPath, Any]], stacked: Mapping[str, Axes]
) -> dict[tuple[str, ...], Axes]:
    """The axes of each leaf that is stacked, by its path as text.

    That is those that `stacked` names, and those that end in the path of one of them, as Optax's
    moments do, and have as many rows.
    """
    values = {_groups.texts(path): value for path, value in leaves}
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
    """The axes of a leaf that `stacked` names; None if it names none, or the leaf lacks one."""
    stack = _groups.innermost(names, stacked)
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
