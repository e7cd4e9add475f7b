"""Stacked leaves: which of a state's leaves are, and how one is cut into its layers.

Scanned and pipelined models (MaxText, Praxis) keep all layers in one leaf, `[layers, ...]` or
`[repeats, stages, ...]`. Such a leaf is saved a row at a time: what lies at one index of each axis
that stacks. A row is cut out when it is its turn to be saved, on the devices that hold it, out of
their own shards: the leaf is never assembled, and no more of it is held twice than waits to be
written. Of a leaf that is spread over several processes, each cuts and saves what it holds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp
from flax_partial.callbacks import grouping

Stacked = Mapping[str, int | tuple[int, ...]]
"""Name of a leaf, or of a subtree of leaves, to the axis or axes along which they stack layers."""

Axes = tuple[int, ...]
"""Axes of a leaf along which it is cut, ascending."""

Index = tuple[int, ...]
"""Which row: its place along each axis that is cut."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a stacked leaf that is not cut out yet.

    Attributes:
      value: The whole leaf: `np.ndarray`, or `jax.Array` under a sharding that `_is_cuttable`.
      start: Which row.
      axes: The axes along which rows are stacked.
    """

    value: Any
    start: Index
    axes: Axes

    def cut(self) -> fp.Slice:
        """Cuts it out; waits for no computation. A `jax.Array` may be donated afterwards."""
        size = tuple(self.value.shape[axis] for axis in self.axes)
        if isinstance(self.value, np.ndarray):
            index = [slice(None)] * self.value.ndim
            for axis, at in zip(self.axes, self.start, strict=True):
                index[axis] = slice(at, at + 1)
            return fp.Slice(self.value[tuple(index)], self.start, size, self.axes)
        row = _cut_shards(self.value, self.start, self.axes)
        return fp.Slice(row, self.start, size, self.axes, self.value.sharding)


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


def spread(leaves: grouping.Leaves, stacked: Mapping[str, Axes]) -> grouping.Leaves:
    """Puts its rows in the place of each stacked leaf: those that this process has to save."""
    axes = _axes(leaves, stacked) if stacked else {}
    return [
        (path, value if row is None else Row(value, row, axes[names]))
        for path, value in leaves
        for names in (grouping.texts(path),)
        for row in (_rows_here(value, axes[names]) if names in axes else (None,))
    ]


def by_row(groups: Mapping[str, grouping.Leaves]) -> dict[str, grouping.Leaves]:
    """Splits groups: row 3 of what is stacked in group "x" comes into group "x.3", in order.

    Along two axes it is "x.3.0", and so on.
    """
    whole: dict[str, grouping.Leaves] = {}
    rows: dict[tuple[str, Index], grouping.Leaves] = {}
    for group, leaves in groups.items():
        for path, leaf in leaves:
            if isinstance(leaf, Row):
                rows.setdefault((group, leaf.start), []).append((path, leaf))
            else:
                whole.setdefault(group, []).append((path, leaf))
    return whole | {
        ".".join((group, *map(str, row))): rows[group, row] for group, row in sorted(rows)
    }


def cut(leaves: grouping.Leaves) -> grouping.Leaves:
    """Cuts out the rows among some leaves."""
    return [(path, leaf.cut() if isinstance(leaf, Row) else leaf) for path, leaf in leaves]


def rows_of(piece: fp.Slice) -> tuple[Axes, list[Index]]:
    """The axes along which a piece of a leaf was cut, and which rows it has.

    Raises:
      TypeError, AttributeError, IndexError, ValueError: It cannot be saved.
    """
    axes, starts = map(_as_tuple, (piece.axis, piece.start))
    rank = piece.value.ndim
    rows = {
        range(rank)[axis]: range(start, start + piece.value.shape[axis])
        for axis, start in zip(axes, starts, strict=True)
    }
    ascending = tuple(sorted(rows))
    return ascending, [*itertools.product(*(rows[axis] for axis in ascending))]


def _axes(
    leaves: Iterable[tuple[grouping.KeyPath, Any]], stacked: Mapping[str, Axes]
) -> dict[tuple[str, ...], Axes]:
    """The axes of each leaf that is stacked, by its path as text.

    That is those that `stacked` names, and those that end in the path of one of them, as Optax's
    moments do, and have as many rows.
    """
    values = {grouping.texts(path): value for path, value in leaves}
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
    stack = grouping.innermost(names, stacked)
    if stack is None or not _is_cuttable(value):
        return None
    rank = value.ndim
    if not all(-rank <= axis < rank for axis in stacked[stack]):
        return None
    return tuple(sorted({axis % rank for axis in stacked[stack]}))


def _has_rows_of(value: Any, model: Any, *, axes: Axes) -> bool:
    return (
        _is_cuttable(value)
        and value.ndim > axes[-1]
        and all(value.shape[axis] == model.shape[axis] for axis in axes)
    )


def _is_cuttable(value: Any) -> bool:
    """Whether rows of a leaf can be cut out; keys are too small to, and other shardings unheard of.

    An axis without rows leaves nothing to save in pieces.
    """
    if isinstance(value, jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        is_known = isinstance(value.sharding, NamedSharding | SingleDeviceSharding)
        return value.size > 0 and is_known and not is_key
    return isinstance(value, np.ndarray) and value.size > 0


def _rows_here(value: Any, axes: Axes) -> Iterable[Index]:
    """The rows of which this process holds the first replica, or some of it; in order."""
    if isinstance(value, np.ndarray):
        return itertools.product(*(range(value.shape[axis]) for axis in axes))
    return sorted(
        {
            row
            for shard in _first_replicas(value)
            for row in itertools.product(*_ranges_of(shard, value.shape, axes))
        }
    )


def _first_replicas(value: jax.Array) -> list[Any]:
    return [shard for shard in value.addressable_shards if shard.replica_id == 0]


def _ranges_of(shard: Any, shape: tuple[int, ...], axes: Axes) -> list[range]:
    """Which rows a shard holds, along each axis."""
    return [range(*shard.index[axis].indices(shape[axis])) for axis in axes]


def _cut_shards(value: jax.Array, row: Index, axes: Axes) -> jax.Array:
    """Cuts a row out of the shards that hold its first replica, each on its own device."""
    pieces = []
    for shard in _first_replicas(value):
        held = _ranges_of(shard, value.shape, axes)
        if all(at in rows for at, rows in zip(row, held, strict=True)):
            start = [at - rows.start for at, rows in zip(row, held, strict=True)]
            pieces.append(_cut_one(shard.data, start, axes))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    if len(pieces) == 1 and pieces[0].shape == shape:
        return pieces[0]
    sharding = _sharding_of_row(value, row, axes)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _cut_one(shard: jax.Array, start: Iterable[int], axes: Axes) -> jax.Array:
    # The mesh that a training loop has set would forbid what runs on one of its devices.
    with jax.set_mesh(_NO_MESH):
        cut: jax.Array = _jit_cut(shard, tuple(map(np.int32, start)), axes)
    return cut


_NO_MESH = Mesh(np.empty((), object), ())


@functools.partial(jax.jit, static_argnums=2)
def _jit_cut(shard: jax.Array, start: tuple[jax.Array, ...], axes: Axes) -> jax.Array:
    """With the row as an argument, all rows of all leaves of one shape share one program."""
    begin, shape = [jnp.int32(0)] * shard.ndim, list(shard.shape)
    for axis, at in zip(axes, start, strict=True):
        begin[axis], shape[axis] = at, 1
    return jax.lax.dynamic_slice(shard, begin, shape)


def _sharding_of_row(value: jax.Array, row: Index, axes: Axes) -> NamedSharding:
    """The sharding of a row over the devices that hold its first replica.

    Of the mesh's axes, those that shard the stack are fixed where the row is, those that replicate
    are fixed at their first place, and those that shard the row remain.
    """
    sharding = value.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} is no NamedSharding, and has several shards")
    spec = [*map(_as_tuple, sharding.spec), *((),) * (value.ndim - len(sharding.spec))]
    rows_of_shard = sharding.shard_shape(value.shape)
    at: dict[str, int] = {}
    for axis, start in zip(axes, row, strict=True):
        names, spec[axis] = spec[axis], ()
        sizes = tuple(sharding.mesh.shape[name] for name in names)
        block = np.unravel_index(start // rows_of_shard[axis], sizes) if sizes else ()
        at |= {name: int(place) for name, place in zip(names, block, strict=True)}
    remaining = {name for names in spec for name in names}
    index = tuple(
        slice(None) if name in remaining else at.get(name, 0) for name in sharding.mesh.axis_names
    )
    names = [name for name in sharding.mesh.axis_names if name in remaining]
    mesh = Mesh(sharding.mesh.devices[index], names)
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def _as_tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)
