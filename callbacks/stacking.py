"""Stacked leaves: which of a state's leaves are, and how one is cut into its layers.

Scanned and pipelined models (MaxText, Praxis) keep all layers in one leaf, `[layers, ...]` or
`[repeats, stages, ...]`. Such a leaf is saved a row at a time. A row is cut out when it is its turn
to be saved, on the devices that hold it, out of their own shards: the leaf is never assembled, and
no more of it is held twice than waits to be written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp
from flax_partial.callbacks import grouping

Stacked = Mapping[str, int]
"""Name of a leaf, or of a subtree of leaves, to the axis along which they stack layers."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a stacked leaf that is not cut out yet.

    Attributes:
      value: The whole leaf: `np.ndarray`, or `jax.Array` under a sharding that `_is_cuttable`.
      start: Which row.
      axis: The axis along which rows are stacked.
    """

    value: Any
    start: int
    axis: int

    def cut(self) -> fp.Slice:
        """Cuts it out; waits for no computation. A `jax.Array` may be donated afterwards."""
        size = self.value.shape[self.axis]
        if isinstance(self.value, np.ndarray):
            index = (slice(None),) * self.axis + (slice(self.start, self.start + 1),)
            return fp.Slice(self.value[index], self.start, size, self.axis)
        row = _cut_shards(self.value, self.start, self.axis)
        return fp.Slice(row, self.start, size, self.axis, self.value.sharding)


def check(stacked: Stacked) -> dict[str, int]:
    """Checks what a user gives, and copies it.

    Raises:
      TypeError: Something is no name of a leaf, or no number of an axis.
    """
    given: Mapping[Any, Any] = stacked
    for name, axis in given.items():
        if not isinstance(name, str) or not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(
                f"stacked has {name!r}: {axis!r}; it maps names of leaves or subtrees, such as "
                "'params.layers', to the number of an axis."
            )
    return dict(stacked)


def check_known(stacked: Stacked, names: Iterable[str]) -> None:
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


def spread(leaves: grouping.Leaves, stacked: Stacked) -> grouping.Leaves:
    """Puts its rows in the place of each stacked leaf: those that this process has to save."""
    axes = _axes(leaves, stacked) if stacked else {}
    return [
        (path, value if row is None else Row(value, row, axes[names]))
        for path, value in leaves
        for names in (grouping.texts(path),)
        for row in (_rows_here(value, axes[names]) if names in axes else (None,))
    ]


def by_row(groups: Mapping[str, grouping.Leaves]) -> dict[str, grouping.Leaves]:
    """Splits groups: row 3 of what is stacked in group "x" comes into group "x.3", in order."""
    whole: dict[str, grouping.Leaves] = {}
    rows: dict[tuple[str, int], grouping.Leaves] = {}
    for group, leaves in groups.items():
        for path, leaf in leaves:
            if isinstance(leaf, Row):
                rows.setdefault((group, leaf.start), []).append((path, leaf))
            else:
                whole.setdefault(group, []).append((path, leaf))
    return whole | {f"{group}.{row}": rows[group, row] for group, row in sorted(rows)}


def cut(leaves: grouping.Leaves) -> grouping.Leaves:
    """Cuts out the rows among some leaves."""
    return [(path, leaf.cut() if isinstance(leaf, Row) else leaf) for path, leaf in leaves]


def _axes(
    leaves: Iterable[tuple[grouping.KeyPath, Any]], stacked: Stacked
) -> dict[tuple[str, ...], int]:
    """The axis of each leaf that is stacked, by its path as text.

    That is those that `stacked` names, and those that end in the path of one of them, as Optax's
    moments do, and have as many rows.
    """
    values = {grouping.texts(path): value for path, value in leaves}
    named = {
        names: axis
        for names, value in values.items()
        if (axis := _named_axis(names, value, stacked)) is not None
    }
    by_end = {names[1:]: names for names in named if names[1:]}
    axes = dict(named)
    for names, value in values.items():
        if names in named:
            continue
        ends = (names[start:] for start in range(1, len(names)))
        model = next((by_end[end] for end in ends if end in by_end), None)
        if model is not None and _has_rows_of(value, values[model], axis=named[model]):
            axes[names] = named[model]
    return axes


def _named_axis(names: tuple[str, ...], value: Any, stacked: Stacked) -> int | None:
    stack = grouping.innermost(names, stacked)
    if stack is None or not _is_cuttable(value):
        return None
    axis = stacked[stack]
    return axis % value.ndim if -value.ndim <= axis < value.ndim else None


def _has_rows_of(value: Any, model: Any, *, axis: int) -> bool:
    return _is_cuttable(value) and value.ndim > axis and value.shape[axis] == model.shape[axis]


def _is_cuttable(value: Any) -> bool:
    """Whether rows of a leaf can be cut out; keys are too small to, and other shardings unheard of.

    An axis without rows leaves nothing to save in pieces.
    """
    if isinstance(value, jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        is_known = isinstance(value.sharding, NamedSharding | SingleDeviceSharding)
        return value.size > 0 and is_known and not is_key
    return isinstance(value, np.ndarray) and value.size > 0


def _rows_here(value: Any, axis: int) -> Iterable[int]:
    """The rows of which this process holds the first replica, or some of it."""
    if isinstance(value, np.ndarray):
        return range(value.shape[axis])
    shards = (shard for shard in value.addressable_shards if shard.replica_id == 0)
    return sorted({row for shard in shards for row in _range_of(shard, value.shape, axis)})


def _range_of(shard: Any, shape: tuple[int, ...], axis: int) -> range:
    return range(*shard.index[axis].indices(shape[axis]))


def _cut_shards(value: jax.Array, row: int, axis: int) -> jax.Array:
    """Cuts a row out of the shards that hold its first replica, each on its own device."""
    pieces = [
        _cut_one(shard.data, row - rows.start, axis)
        for shard in value.addressable_shards
        if shard.replica_id == 0 and row in (rows := _range_of(shard, value.shape, axis))
    ]
    shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
    if len(pieces) == 1 and pieces[0].shape == shape:
        return pieces[0]
    sharding = _sharding_of_row(value, row, axis)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _cut_one(shard: jax.Array, row: int, axis: int) -> jax.Array:
    # The mesh that a training loop has set would forbid what runs on one of its devices.
    with jax.set_mesh(_NO_MESH):
        cut: jax.Array = _jit_cut(shard, np.int32(row), axis)
    return cut


_NO_MESH = Mesh(np.empty((), object), ())


@functools.partial(jax.jit, static_argnums=2)
def _jit_cut(shard: jax.Array, row: jax.Array, axis: int) -> jax.Array:
    """With the row as an argument, all rows of all leaves of one shape share one program."""
    return jax.lax.dynamic_slice_in_dim(shard, row, 1, axis)


def _sharding_of_row(value: jax.Array, row: int, axis: int) -> NamedSharding:
    """The sharding of a row over the devices that hold its first replica.

    Of the mesh's axes, those that shard the stack are fixed where the row is, those that replicate
    are fixed at their first place, and those that shard the row remain.
    """
    sharding = value.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} is no NamedSharding, and has several shards")
    spec = [*map(_as_tuple, sharding.spec), *((),) * (value.ndim - len(sharding.spec))]
    block = row // sharding.shard_shape(value.shape)[axis]
    sizes = tuple(sharding.mesh.shape[name] for name in spec[axis])
    at = dict(zip(spec[axis], np.unravel_index(block, sizes) if sizes else (), strict=True))
    spec[axis] = ()
    remaining = {name for names in spec for name in names}
    index = tuple(
        slice(None) if name in remaining else at.get(name, 0) for name in sharding.mesh.axis_names
    )
    names = [name for name in sharding.mesh.axis_names if name in remaining]
    mesh = Mesh(sharding.mesh.devices[index], names)
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def _as_tuple(axes: Any) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)
