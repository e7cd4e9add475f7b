"""Processes with replicas of the same data read a share of it each, and hand it on.

Each array is loaded sharded along the axes of its mesh that replicate it over processes, too, and
then gathered by a collective of JAX's: over the network of the devices, not that of the disks.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_partial.loading.batches import batched

_AT_ONCE_BYTES = 1 << 30  # of arrays on a device that are gathered by one program


def spread(value: Any) -> Any:
    """Returns a target for a share of what this one needs, if others read the rest of it."""
    finer = _finer_sharding(value)
    if finer is None:
        return value
    return jax.ShapeDtypeStruct(
        value.shape,
        value.dtype,
        sharding=finer,
        weak_type=bool(getattr(value, "weak_type", False)),
    )


def gathered(values: Sequence[Any], targets: Iterable[Any]) -> list[Any]:
    """Gathers arrays that were loaded by the targets of `spread`, into their own targets.

    All processes that hold some of an array have to call this, in the same order of arrays.
    """
    done = list(values)
    shared = [(at, one) for at, one in enumerate(targets) if _finer_sharding(one) is not None]
    for _, of_one_mesh in groupby(shared, lambda pair: pair[1].sharding.mesh):
        for batch in batched(of_one_mesh, _shard_bytes, most_bytes=_AT_ONCE_BYTES):
            shardings = tuple(target.sharding for _, target in batch)
            same = jax.jit(lambda *arrays: arrays, out_shardings=shardings)
            arrays = same(*(done[at] for at, _ in batch))
            for (at, _), array in zip(batch, arrays, strict=True):
                done[at] = array
    return done


def _shard_bytes(pair: tuple[int, Any]) -> int:
    _, target = pair
    return int(target.dtype.itemsize * math.prod(target.sharding.shard_shape(target.shape)))


def _finer_sharding(value: Any) -> NamedSharding | None:
    sharding = getattr(value, "sharding", None)
    if not isinstance(sharding, NamedSharding) or isinstance(sharding.mesh, AbstractMesh):
        return None
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return None
    return _finer(sharding, tuple(value.shape))


@lru_cache(maxsize=4096)
def _finer(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding | None:
    mesh, spec = sharding.mesh, [_names(entry) for entry in sharding.spec]
    spec += [()] * (len(shape) - len(spec))
    used = {name for names in spec for name in names}
    added = False
    for name in _axes_over_processes(mesh):
        for dim, size in enumerate(shape):
            shards = math.prod(mesh.shape[one] for one in spec[dim])
            if name not in used and size and size % (shards * mesh.shape[name]) == 0:
                spec[dim] = (*spec[dim], name)
                used.add(name)
                added = True
    if not added:
        return None
    finer = PartitionSpec(*(names or None for names in spec))
    return NamedSharding(mesh, finer, memory_kind=sharding.memory_kind)


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


@lru_cache(maxsize=256)
def _axes_over_processes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh along which the process is not everywhere the same."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if (processes != processes.take([0], axis)).any()
    )
