"""Rows of stacked leaves: which of them this process saves, and how one is cut out of its shards.

A row is what lies at one index of each axis along which a leaf stacks layers. It is cut on the
devices of one replica: nothing is moved between devices or processes. Where processes share
replicas, rows take turns in which one that is.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp
from flax_partial import cutting

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
      replica: Number of the replica that it is cut out of, as shards have it.
    """

    value: Any
    start: Index
    axes: Axes
    replica: int = 0

    def cut(self) -> fp.Slice:
        """Cuts it out, and waits for no computation. The array may be donated afterwards."""
        size = tuple(self.value.shape[axis] for axis in self.axes)
        if isinstance(self.value, np.ndarray):
            index = [slice(None)] * self.value.ndim
            for axis, at in zip(self.axes, self.start, strict=True):
                index[axis] = slice(at, at + 1)
            return fp.Slice(self.value[tuple(index)], self.start, size, self.axes)
        row = _cut_shards(self.value, self.start, self.axes, self.replica)
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


def rows_here(value: Any, axes: Axes, name: str, *, share_replicas: bool) -> list[Row]:
    """Returns the rows that this process saves, at least in part, in order.

    Args:
      value: The leaf.
      axes: The axes along which it is cut.
      name: Its name: leaves of few rows begin with different replicas.
      share_replicas: Whether processes that hold replicas take turns; else the first one saves all.
    """
    if isinstance(value, np.ndarray):
        ranges = [range(value.shape[axis]) for axis in axes]
        return [Row(value, index, axes) for index in itertools.product(*ranges)]
    replicas = _replicas(value.sharding) if share_replicas else (0,)
    turn = zlib.crc32(name.encode(errors="surrogatepass"))
    sizes = [value.shape[axis] for axis in axes]
    found = {}
    for shard in value.addressable_shards:
        for index in itertools.product(*_ranges_of(shard, value.shape, axes)):
            number = int(np.ravel_multi_index(index, sizes))
            replica = replicas[(turn + number) % len(replicas)]
            if shard.replica_id == replica:
                found[index] = Row(value, index, axes, replica)
    return [found[index] for index in sorted(found)]


@functools.lru_cache(maxsize=1024)
def _replicas(sharding: jax.sharding.Sharding) -> tuple[int, ...]:
    """Returns replicas that are, at least in part, in different processes; the first is 0."""
    if not isinstance(sharding, NamedSharding):
        return (0,)
    unused = set(sharding.mesh.axis_names) - set(_names(sharding.spec))
    index = tuple(slice(None) if name in unused else 0 for name in sharding.mesh.axis_names)
    first: dict[int, int] = {}
    for number, device in enumerate(np.atleast_1d(sharding.mesh.devices[index]).flat):
        first.setdefault(device.process_index, number)
    return tuple(first.values())


def _names(spec: Iterable[Any]) -> list[str]:
    """Returns the axes of a mesh that a partition spec names."""
    return [name for names in spec for name in _as_tuple(names)]


def _ranges_of(shard: Any, shape: tuple[int, ...], axes: Axes) -> list[range]:
    """Returns which rows a shard has, along each axis."""
    return [range(*shard.index[axis].indices(shape[axis])) for axis in axes]


def _cut_shards(value: jax.Array, row: Index, axes: Axes, replica: int) -> jax.Array:
    """Cuts a row out of the shards of one replica, each on its own device."""
    pieces = []
    for shard in value.addressable_shards:
        ranges = _ranges_of(shard, value.shape, axes)
        is_there = all(at in rows for at, rows in zip(row, ranges, strict=True))
        if shard.replica_id == replica and is_there:
            begin, size = [0] * value.ndim, list(shard.data.shape)
            for axis, at, rows in zip(axes, row, ranges, strict=True):
                begin[axis], size[axis] = at - rows.start, 1
            pieces.append(cutting.cut(shard.data, begin, tuple(size)))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    if len(pieces) == 1 and pieces[0].shape == shape:
        return pieces[0]
    sharding = _sharding_of_row(value, row, axes, replica)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _sharding_of_row(value: jax.Array, row: Index, axes: Axes, replica: int) -> NamedSharding:
    """Returns the sharding of a row over the devices of one replica.

    Of the mesh's axes, those that shard the stack are fixed where the row is, those that replicate
    are fixed where the replica is, and those that shard the row remain.
    """
    sharding = value.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} is no NamedSharding, and has several shards")
    mesh: Any = sharding.mesh
    spec: list[tuple[str, ...]] = [()] * value.ndim
    spec[: len(sharding.spec)] = map(_as_tuple, sharding.spec)
    rows_of_shard = sharding.shard_shape(value.shape)
    unused = [name for name in mesh.axis_names if name not in _names(spec)]
    at = _unraveled(replica, mesh, unused)
    for axis, start in zip(axes, row, strict=True):
        at |= _unraveled(start // rows_of_shard[axis], mesh, spec[axis])
        spec[axis] = ()
    names = [name for name in mesh.axis_names if name not in at]
    index = tuple(at.get(name, slice(None)) for name in mesh.axis_names)
    return NamedSharding(
        Mesh(mesh.devices[index], names), PartitionSpec(*(names or None for names in spec))
    )


def _unraveled(number: int, mesh: Any, names: Sequence[str]) -> dict[str, Any]:
    """Returns where along each of a mesh's axes the block of that number is, in C order."""
    if not names:
        return {}
    block = np.unravel_index(number, tuple(mesh.shape[name] for name in names))
    return {name: int(place) for name, place in zip(names, block, strict=True)}


def _as_tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)
