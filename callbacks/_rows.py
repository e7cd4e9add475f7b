"""Rows of stacked leaves: which of them this process saves, and how one is cut out of its shards.

A row is what lies at one index of each axis along which a leaf stacks layers. It is cut on the
devices of its first replica: nothing is moved between devices or processes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterable

Axes = tuple[int, ...]
"""Axes of a leaf along which it is cut, ascending."""

Index = tuple[int, ...]
"""Which row: its index along each axis that is cut."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a stacked leaf, not cut out yet.

    Attributes:
      value: The whole leaf: `np.ndarray`, or `jax.Array` under a sharding that `is_cuttable`.
      start: Which row.
      axes: The axes along which rows are stacked.
    """

    value: Any
    start: Index
    axes: Axes

    def cut(self) -> fp.Slice:
        """Cuts it out, and waits for no computation. The array may be donated afterwards."""
        size = tuple(self.value.shape[axis] for axis in self.axes)
        if isinstance(self.value, np.ndarray):
            index = [slice(None)] * self.value.ndim
            for axis, at in zip(self.axes, self.start, strict=True):
                index[axis] = slice(at, at + 1)
            return fp.Slice(self.value[tuple(index)], self.start, size, self.axes)
        row = _cut_shards(self.value, self.start, self.axes)
        return fp.Slice(row, self.start, size, self.axes, self.value.sharding)


def is_cuttable(value: Any) -> bool:
    """Whether rows of a leaf can be cut out: not of keys, empty arrays, or unusual shardings."""
    if isinstance(value, jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        is_known = isinstance(value.sharding, NamedSharding | SingleDeviceSharding)
        return value.size > 0 and is_known and not is_key
    return isinstance(value, np.ndarray) and value.size > 0


def rows_of(piece: fp.Slice) -> tuple[Axes, list[Index]]:
    """Returns the axes along which a piece of a leaf was cut, and which rows it has.

    Raises:
      TypeError, AttributeError, IndexError, ValueError: It is no valid slice.
    """
    axes, starts = map(_as_tuple, (piece.axis, piece.start))
    rank = piece.value.ndim
    rows = {
        range(rank)[axis]: range(start, start + piece.value.shape[axis])
        for axis, start in zip(axes, starts, strict=True)
    }
    ascending = tuple(sorted(rows))
    return ascending, [*itertools.product(*(rows[axis] for axis in ascending))]


def rows_here(value: Any, axes: Axes) -> Iterable[Index]:
    """Returns the rows whose first replica is, at least in part, in this process; in order."""
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
    """Returns which rows a shard has, along each axis."""
    return [range(*shard.index[axis].indices(shape[axis])) for axis in axes]


def _cut_shards(value: jax.Array, row: Index, axes: Axes) -> jax.Array:
    """Cuts a row out of the shards of its first replica, each on its own device."""
    pieces = []
    for shard in _first_replicas(value):
        ranges = _ranges_of(shard, value.shape, axes)
        if all(at in rows for at, rows in zip(row, ranges, strict=True)):
            start = [at - rows.start for at, rows in zip(row, ranges, strict=True)]
            pieces.append(_cut_one(shard.data, start, axes))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    if len(pieces) == 1 and pieces[0].shape == shape:
        return pieces[0]
    sharding = _sharding_of_row(value, row, axes)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _cut_one(shard: jax.Array, start: Iterable[int], axes: Axes) -> jax.Array:
    # Under the mesh that a training loop has set, nothing may run on one of its devices alone.
    with jax.set_mesh(_NO_MESH):
        cut: jax.Array = _jit_cut(shard, tuple(map(np.int32, start)), axes)
    return cut


_NO_MESH = Mesh(np.empty((), object), ())


@functools.partial(jax.jit, static_argnums=2)
def _jit_cut(shard: jax.Array, start: tuple[jax.Array, ...], axes: Axes) -> jax.Array:
    """Cuts by an index that is an argument: all rows of leaves of one shape share one program."""
    begin, shape = [jnp.int32(0)] * shard.ndim, list(shard.shape)
    for axis, at in zip(axes, start, strict=True):
        begin[axis], shape[axis] = at, 1
    return jax.lax.dynamic_slice(shard, begin, shape)


def _sharding_of_row(value: jax.Array, row: Index, axes: Axes) -> NamedSharding:
    """Returns the sharding of a row over the devices of its first replica.

    Of the mesh's axes, those that shard the stack are fixed where the row is, those that replicate
    are fixed at their first place, and those that shard the row remain.
    """
    sharding = value.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} is no NamedSharding, and has several shards")
    spec: list[tuple[str, ...]] = [()] * value.ndim
    spec[: len(sharding.spec)] = map(_as_tuple, sharding.spec)
    rows_of_shard = sharding.shard_shape(value.shape)
    at: dict[str, int] = {}
    for axis, start in zip(axes, row, strict=True):
        sizes = tuple(sharding.mesh.shape[name] for name in spec[axis])
        block = np.unravel_index(start // rows_of_shard[axis], sizes) if sizes else ()
        at |= {name: int(place) for name, place in zip(spec[axis], block, strict=True)}
        spec[axis] = ()
    remaining = {name for names in spec for name in names}
    index = tuple(
        slice(None) if name in remaining else at.get(name, 0) for name in sharding.mesh.axis_names
    )
    names = [name for name in sharding.mesh.axis_names if name in remaining]
    mesh = Mesh(sharding.mesh.devices[index], names)
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def _as_tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)
