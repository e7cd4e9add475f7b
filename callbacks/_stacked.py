"""Stacked leaves: which of a state's leaves are stacked, and into which rows they are cut.

Scanned and pipelined models (MaxText, Praxis) keep all layers in one leaf, `[layers, ...]` or
`[repeats, stages, ...]`. Such a leaf is saved a row at a time (`_rows.py`). A row is cut out when
it is its turn to be saved: the leaf is never assembled, and only rows that wait to be written take
memory twice. Of a leaf that is sharded over several processes, each cuts and saves its own shards.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from flax_partial.callbacks import _leaves
from flax_partial.callbacks._rows import Axes, Index, Row, is_cuttable, rows_here

_Texts = tuple[str, ...]

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
      ValueError: Some are not; it lists them, and where else there are such.
    """
    known = list(names)
    unknown = [stack for stack in stacked if not any(_is_in(name, stack) for name in known)]
    if unknown:
        ends = {name[:at] for name in known for at, text in enumerate(f"{name}.") if text == "."}
        close = [one for stack in unknown for one in difflib.get_close_matches(stack, ends)]
        inner = [name[: at + 1 + len(stack)] for stack in unknown for name in known
                 if (at := f"{name}.".find(f".{stack}.")) >= 0]  # fmt: skip
        like = list(dict.fromkeys([*inner, *close])) or known
        raise ValueError(
            f"stacked names {', '.join(map(repr, unknown))}, and the state has no such leaf or "
            f"subtree. It has such as {', '.join(map(repr, like[:3]))}."
        )


def _is_in(name: str, stack: str) -> bool:
    return name == stack or name.startswith(f"{stack}.")


def spread(
    leaves: _leaves.Leaves, stacked: Mapping[str, Axes], *, share_replicas: bool = False
) -> _leaves.Leaves:
    """Replaces each stacked leaf by the rows that this process has to save.

    Stacked are the leaves that `stacked` names, and those that end as the path of one of them does,
    from the last key of that name on at least, and have as many rows, as Optax's moments.
    """
    if not stacked:
        return leaves
    values, named, followed = _matched(leaves, stacked)
    axes = {names: axes for names, axes in named.items() if axes is not None}
    axes |= {
        names: axes[model]
        for names, model in followed.items()
        if _has_rows_of(values[names], values[model], axes[model])
    }
    spread_out: _leaves.Leaves = []
    for path, value in leaves:
        names = _leaves.texts(path)
        if names in axes:
            name = ".".join(names)
            rows = rows_here(value, axes[names], name, share_replicas=share_replicas)
            spread_out += [(path, row) for row in rows]
        else:
            spread_out.append((path, value))
    return spread_out


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


def not_cut(leaves: _leaves.Leaves, stacked: Mapping[str, Axes]) -> list[str]:
    """Returns, in words, what is saved whole and was probably meant to be cut."""
    if not stacked:
        return []
    values, named, followed = _matched(leaves, stacked)
    can_be_cut: dict[str, bool] = {}
    for names, axes in named.items():
        stack = _leaves.innermost(names, stacked) or ""
        can_be_cut[stack] = can_be_cut.get(stack, False) or axes is not None
    said = [
        f"stacked names {stack!r} along {stacked[stack]}, and no leaf of it can be cut so"
        for stack, can in can_be_cut.items()
        if not can
    ]
    for names, model in followed.items():
        value, axes = values[names], named[model] or ()
        if getattr(value, "size", 0) > 1 and not _has_rows_of(value, values[model], axes):
            said.append(
                f"{'.'.join(names)!r}, of shape {value.shape}, is called like the stacked "
                f"{'.'.join(model)!r}, and has not as many rows along {axes}"
            )
    return said


def _matched(
    leaves: Iterable[tuple[_leaves.KeyPath, Any]], stacked: Mapping[str, Axes]
) -> tuple[dict[_Texts, Any], dict[_Texts, Axes | None], dict[_Texts, _Texts]]:
    """Returns the leaves by path, the axes of the named ones, and what others are called like.

    The axes are None where a leaf cannot be cut so. Another leaf is called like the stacked
    parameter that has the longest end of its path.
    """
    values = {_leaves.texts(path): value for path, value in leaves}
    named: dict[_Texts, Axes | None] = {}
    by_end: dict[_Texts, _Texts] = {}
    for names, value in values.items():
        if (stack := _leaves.innermost(names, stacked)) is not None:
            named[names] = axes = _named_axes(value, stacked[stack])
            starts = range(1, max(stack.count(".") + 1, 2)) if axes else ()
            for start in starts:
                by_end.setdefault(names[start:], names)
    by_end.pop((), None)
    followed = {}
    for names in (one for one in values if one not in named):
        ends = (names[start:] for start in range(1, len(names)))
        if model := next((by_end[end] for end in ends if end in by_end), None):
            followed[names] = model
    return values, named, followed


def _named_axes(value: Any, axes: Axes) -> Axes | None:
    """Returns the axes of a leaf along which it is to be cut; None if it lacks one of them."""
    if not is_cuttable(value):
        return None
    rank = value.ndim
    if not all(-rank <= axis < rank for axis in axes):
        return None
    return tuple(sorted({axis % rank for axis in axes}))


def _has_rows_of(value: Any, model: Any, axes: Axes) -> bool:
    return (
        is_cuttable(value)
        and value.ndim > axes[-1]
        and all(value.shape[axis] == model.shape[axis] for axis in axes)
    )
