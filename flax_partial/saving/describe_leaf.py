"""One leaf of a state -> how it is stored, and where the data of its boxes is; touches no data.

Arrays are described shard by shard, each box once (the shard that is replica 0): no array is ever
assembled.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding

from flax_partial import leaf_types
from flax_partial.errors import UnsupportedLeafError
from flax_partial.format import model as kinds
from flax_partial.format.chunks import Shape, choose_chunk_shape
from flax_partial.format.keypaths import KeyPath, is_leaf
from flax_partial.format.model import STORABLE_DTYPES, Box, Leaf
from flax_partial.format.slices import Rows, Slice, SliceError, moved, rows_of, whole_shape
from flax_partial.saving.shares import Shares, shares_of

Source = np.ndarray | jax.Array
How = tuple[int, str | None, bool]
"""Wanted size of a chunk, in bytes; the chunks' codec; whether processes share replicas."""


def describe_leaf(path: KeyPath, value: object, how: How) -> tuple[Leaf, Sequence[Source]]:
    """Describes how a leaf is stored.

    Returns:
      The leaf, with the boxes that this process has to write, without digests; their data.

    Raises:
      UnsupportedLeafError: No checkpoint can hold it.
    """
    if isinstance(value, str):  # np.str_ too
        _require_utf8(path, value)
        text = str.__str__(value)  # as for a key
        return Leaf(path.texts, path.key_kinds, kinds.STRING, text=text), ()
    if isinstance(value, bytes):  # np.bytes_ too
        return Leaf(path.texts, path.key_kinds, kinds.BYTES, data=bytes(value)), ()
    if isinstance(value, (np.ndarray, np.generic, jax.Array, Slice)):
        return _describe_array(path, value, how)
    if isinstance(value, (bool, int, float, complex)):
        return _describe_scalar(path, value)
    if value is None:
        return Leaf(path.texts, path.key_kinds, kinds.NONE), ()
    if is_leaf(value):
        return Leaf(path.texts, path.key_kinds, _empty_kind(value), placeholder=True), ()
    raise _unsupported(
        path,
        f"is a {type(value).__module__}.{type(value).__qualname__}",
        leaf_types.advice(value),
    )


def shards_written(path: KeyPath, value: jax.Array, how: How) -> tuple[int, ...] | None:
    """Positions of the shards that this process writes; None where it writes pieces of them."""
    shares = _shares_of(path, value, how)
    if shares is None:
        shards = enumerate(value.addressable_shards)
        return tuple(number for number, shard in shards if shard.replica_id == 0)
    if not all(piece.is_whole for piece in shares.pieces):
        return None
    return tuple(piece.shard for piece in shares.pieces)


def _shares_of(
    path: KeyPath, value: object, how: How, rows: Mapping[int, Rows] = MappingProxyType({})
) -> Shares | None:
    """What this process writes of an array whose replicas processes share, if they do."""
    if not (how[2] and isinstance(value, jax.Array)):
        return None
    start = moved((0,) * value.ndim, rows)
    return shares_of(value, path.name, rows_at=start, pinned=frozenset(rows), chunk_bytes=how[0])


def _unsupported(path: KeyPath, what: str, way_out: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(f"Leaf {path.name!r} {what}, which cannot be saved. {way_out}")


def _empty_kind(value: object) -> kinds.Kind:
    if isinstance(value, Mapping):
        return kinds.DICT
    if isinstance(value, list):
        return kinds.LIST
    return kinds.NAMED_TUPLE if hasattr(value, "_fields") else kinds.TUPLE


def _require_utf8(path: KeyPath, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _unsupported(path, "holds a lone surrogate", "Encode the text first.") from error


def _describe_scalar(path: KeyPath, value: complex) -> tuple[Leaf, Sequence[Source]]:
    try:
        array = _scalar_array(value)
    except OverflowError as error:
        raise _unsupported(
            path, f"is {value}", "Integers go from -2**63 to 2**64 - 1; save a string instead."
        ) from error
    leaf = Leaf(
        path.texts,
        path.key_kinds,
        kinds.SCALAR,
        dtype=array.dtype.name,  # type: ignore[arg-type] # one of those above
        boxes=_whole_box(()),
    )
    return leaf, (array,)


def _scalar_array(value: complex) -> np.ndarray:
    if isinstance(value, bool):
        return np.array(value)
    if isinstance(value, int):
        return np.array(value, np.int64 if value < 2**63 else np.uint64)
    return np.array(value, np.float64 if isinstance(value, float) else np.complex128)


def _describe_array(path: KeyPath, value: Any, how: How) -> tuple[Leaf, Sequence[Source]]:
    chunk_bytes, compression, _ = how
    cut = None
    if isinstance(value, Slice):
        cut, value = value, value.value
    rank = getattr(value, "ndim", 0)  # a key's data has more axes than the key
    kind: kinds.Kind
    if isinstance(value, jax.Array):
        kind, text, value = _jax_kind(path, value)
    elif isinstance(value, (np.ndarray, np.generic)):
        kind = kinds.NUMPY_ARRAY if isinstance(value, np.ndarray) else kinds.NUMPY_SCALAR
        text, value = "", _native(path, value)
    else:
        raise _unsupported(path, f"is a Slice of a {type(value).__name__}", "Slice arrays only.")
    dtype = _dtype_name(value.dtype)
    if dtype not in STORABLE_DTYPES:
        raise _unsupported(
            path,
            f"has dtype {dtype}",
            f"Convert it to one of: {', '.join(sorted(STORABLE_DTYPES))}.",
        )
    if value.ndim > kinds.MOST_AXES:
        raise _unsupported(
            path, f"has {value.ndim} axes, more than {kinds.MOST_AXES}", "Reshape it to fewer."
        )
    rows = {} if cut is None else _rows_of(path, value.shape, cut, rank)
    shape = whole_shape(value.shape, rows)
    if math.prod(size or 1 for size in shape) * value.dtype.itemsize > kinds.MOST_BYTES:
        raise _unsupported(path, f"is of shape {list(shape)}", "No array can be as large.")
    axes = frozenset(rows)
    shares = _shares_of(path, value, how, rows)
    placed, unit, sharding = _boxes(value, axes, shares)
    if cut is not None and cut.sharding is not None:
        _require_devices(path, cut.sharding)
        sharding = _in_orbax_terms(cut.sharding, frozenset())
    if cut is None and unit == shape and value.nbytes <= chunk_bytes and value.size:
        chunk = shape
    else:
        chunk = choose_chunk_shape(
            shape,
            unit=unit,
            pinned=axes,
            itemsize=value.dtype.itemsize,
            target_bytes=chunk_bytes,
        )
    boxes: tuple[Box, ...] = _whole_box(shape)
    if len(placed) != 1 or placed[0][1].shape != shape:
        boxes = tuple(Box(moved(start, rows), source.shape) for start, source in placed)
    leaf = Leaf(
        path.texts,
        path.key_kinds,
        kind,
        text=text,
        dtype=dtype,  # type: ignore[arg-type] # one of `STORABLE_DTYPES`
        shape=shape,
        chunk=chunk,
        boxes=boxes,
        compression=compression,  # type: ignore[arg-type] # as `SaveOptions` checks it
        sharding=sharding,
        writers=() if shares is None else shares.writers,
    )
    return leaf, tuple(source for _, source in placed)


@lru_cache(maxsize=4096)  # most leaves have one of a few shapes
def _whole_box(shape: Shape) -> tuple[Box]:
    return (Box((0,) * len(shape), shape),)


def _jax_kind(path: KeyPath, value: jax.Array) -> tuple[kinds.Kind, str, jax.Array]:
    if isinstance(value, jax.core.Tracer):
        raise _unsupported(path, "is being traced", "Save outside of jit, grad and vmap.")
    if value.is_deleted():
        raise _unsupported(
            path, "was deleted or donated", "Save it before the call that donates it."
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return kinds.PRNG_KEY, str(jax.random.key_impl(value)), jax.random.key_data(value)
    return kinds.JAX_ARRAY, "", value


@lru_cache(maxsize=256)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    """NumPy works it out each time: 4 us."""
    return dtype.name


def _native(path: KeyPath, value: np.ndarray | np.generic) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        raise _unsupported(path, "is a masked array", "Save its data and its mask.")
    array = np.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def _require_devices(path: KeyPath, sharding: object) -> None:
    is_abstract = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)
    if is_abstract or not isinstance(sharding, Sharding):
        raise _unsupported(
            path,
            f"is a Slice with sharding={sharding!r}",
            "Give the sharding of the whole array, which names devices; or None.",
        )


def _rows_of(path: KeyPath, shape: Shape, cut: Slice, rank: int) -> dict[int, Rows]:
    try:
        return rows_of(cut, shape, rank)
    except SliceError as error:
        raise _unsupported(path, error.what, error.way_out) from error


def _boxes(
    value: Source, axes: frozenset[int], shares: Shares | None
) -> tuple[list[tuple[Shape, Source]], Shape, kinds.Sharding | None]:
    """Returns the boxes to write, each its start and data; that of the smallest; the sharding."""
    origin = (0,) * value.ndim
    if isinstance(value, np.ndarray):
        return [(origin, value)], value.shape, None
    sharding = value.sharding
    if isinstance(sharding, SingleDeviceSharding):
        here: list[tuple[Shape, Source]] = [(origin, value)]
        if not value.is_fully_addressable:  # another process holds it
            here = []
        return here, value.shape, _in_orbax_terms(sharding, axes)
    if shares is not None:
        shared = [(piece.start, piece.data_of(value)) for piece in shares.pieces]
        return shared, shares.unit, _in_orbax_terms(sharding, axes)
    shards = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    placed = [(tuple(cut.start or 0 for cut in shard.index), shard.data) for shard in shards]
    return placed, sharding.shard_shape(value.shape), _in_orbax_terms(sharding, axes)


@lru_cache(maxsize=1024)
def _in_orbax_terms(sharding: Sharding, cut: frozenset[int]) -> kinds.Sharding:
    """Returns a sharding in Orbax's terms; axes that are cut are not sharded as a whole."""
    devices: set[Any] = sharding.device_set
    if not isinstance(sharding, NamedSharding):
        (platform,) = {device.platform for device in devices}
        first = _first_device(platform)
        return kinds.Sharding({"sharding_type": "SingleDeviceSharding", "device_str": first})
    mesh = sharding.mesh
    is_local = len({device.process_index for device in devices}) == 1
    numbers = np.vectorize(lambda device: {"id": _device_number(device, is_local=is_local)})
    spec = [None if i in cut else _axes_json(axes) for i, axes in enumerate(sharding.spec)]
    return kinds.Sharding(
        {
            "sharding_type": "NamedSharding",
            "shape": list(mesh.devices.shape),
            "axis_names": list(mesh.axis_names),
            "axis_types": [f"AxisType.{axis_type.name}" for axis_type in mesh.axis_types],
            "partition_spec": spec,
            "device_mesh": {"mesh": numbers(mesh.devices).tolist()},
        }
    )


def _first_device(platform: str) -> str:
    """The first device of all processes, in Orbax's terms: a reader may have no more than one.

    Orbax finds a device by its text in JAX: `cuda:0`, `TPU_0(process=0,(0,0,0,0))`, `TFRT_CPU_0`.
    That of a TPU says where it stands, as another process's first one does elsewhere.
    """
    return _as_first(str(min(jax.devices(platform), key=lambda device: device.id)))


def _as_first(device: str) -> str:
    """The text of a device with the numbers of the first one, where the first here has others."""
    return re.sub(r"process=\d+", "process=0", re.sub(r"(?<=[:_])\d+", "0", device, count=1))


def _axes_json(axes: object) -> object:
    return list(axes) if isinstance(axes, tuple) else axes if isinstance(axes, str) else None


def _device_number(device: Any, *, is_local: bool) -> int:
    """A device of one process among several has a number that means nothing in another run."""
    if not is_local or jax.process_count() == 1:
        return int(device.id)
    beside = [
        other.id
        for other in jax.devices(device.platform)
        if other.process_index == device.process_index
    ]
    return sorted(beside).index(device.id)
