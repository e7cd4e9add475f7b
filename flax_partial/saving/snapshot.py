"""Leaves of a state -> boxes in host memory that survive what the caller does next.

`describe` says what a leaf is and which boxes of it this process has to write, without touching
data. `detach` makes boxes the caller's no longer: after it, arrays may be donated, deleted or
written over. It waits for no computation. `to_host` gives the data, and may wait.

Arrays are taken shard by shard, each box once (the shard that is replica 0): no array is ever
assembled.
"""

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from flax_partial.errors import UnsupportedLeafError
from flax_partial.format import model as kinds
from flax_partial.format.chunks import Shape, choose_chunk_shape
from flax_partial.format.keypaths import KeyPath, is_leaf
from flax_partial.format.model import STORABLE_DTYPES, Box, Leaf

# A copy of a small ready array costs 2-20 us; a view would make a later donation copy instead.
_COPIED_BYTES = 64 * 1024
_PINNED_HOST = "pinned_host"

Source = np.ndarray | jax.Array


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a leaf that is saved piece by piece, such as one layer of a stacked `[layers, ...]`.

    On disk, and when loaded, the leaf is one ordinary array. Where it is cut along several axes,
    `start`, `size` and `axis` are tuples, an item for each: `Slice(x, (2, 0), (4, 3), (0, 1))` is
    stage 0 of repeat 2 of a `[repeats=4, stages=3, ...]`. All pieces of a leaf are cut along the
    same axes.

    Attributes:
      value: `jax.Array` or `np.ndarray`; holds rows `start : start + value.shape[axis]`.
      start: First row that `value` holds.
      size: Number of rows of the whole leaf.
      axis: The axis that is cut; negative counts from the end.
      sharding: That of the whole leaf, where `value` was cut out of its shards: Orbax restores the
        leaf as it was. None if it has none, and `value`'s own is as good.
    """

    value: Any
    start: int | tuple[int, ...]
    size: int | tuple[int, ...]
    axis: int | tuple[int, ...] = 0
    sharding: Sharding | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """A leaf and where the data of its boxes is.

    Attributes:
      leaf: What it is, with the boxes that this process has to write, without digests.
      sources: The data of each box: host arrays, or arrays on a single device.
      is_ours: Whether the sources were made here, so that nobody else can change them.
    """

    leaf: Leaf
    sources: Sequence[Source] = ()
    is_ours: bool = False

    @property
    def bytes(self) -> int:
        """Size of the data of all boxes."""
        return sum(source.nbytes for source in self.sources)


def describe(
    path: KeyPath, value: object, *, chunk_bytes: int, compression: str | None
) -> Described:
    """Says how a leaf is stored; touches no data and waits for nothing.

    Args:
      path: Where it stands in the tree.
      value: The leaf.
      chunk_bytes: Wanted size of a chunk, in bytes.
      compression: Codec of its chunks.

    Raises:
      UnsupportedLeafError: No checkpoint can hold the value.
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic, Slice)):
        return _describe_array(path, value, chunk_bytes, compression)
    if isinstance(value, (bool, int, float, complex)):
        return _describe_scalar(path, value)
    if isinstance(value, str):
        _require_utf8(path, value)
        return Described(Leaf(path, kinds.STRING, text=value))
    if value is None:
        return Described(Leaf(path, kinds.NONE))
    if is_leaf(value):
        return Described(Leaf(path, _empty_kind(value)))
    raise _unsupported(
        path,
        f"is a {type(value).__module__}.{type(value).__qualname__}",
        "Leaves are arrays, numbers, strings and None; convert it, for example with np.asarray(), "
        "or leave it out.",
    )


def _unsupported(path: KeyPath, what: str, way_out: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(f"Leaf {path.name!r} {what}, which cannot be saved. {way_out}")


def _empty_kind(value: object) -> str:
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


def _describe_scalar(path: KeyPath, value: complex) -> Described:
    try:
        array = _scalar_array(value)
    except OverflowError as error:
        raise _unsupported(
            path, f"is {value}", "Integers go from -2**63 to 2**64 - 1; save a string instead."
        ) from error
    leaf = Leaf(path, kinds.SCALAR, array.dtype.name, boxes=(Box((), ()),))
    return Described(leaf, (array,), is_ours=True)


def _scalar_array(value: complex) -> np.ndarray:
    if isinstance(value, bool):
        return np.array(value)
    if isinstance(value, int):
        return np.array(value, np.int64 if value < 2**63 else np.uint64)
    return np.array(value, np.float64 if isinstance(value, float) else np.complex128)


def _describe_array(
    path: KeyPath, value: Any, chunk_bytes: int, compression: str | None
) -> Described:
    cut = None
    if isinstance(value, Slice):
        cut, value = value, value.value
    rank = np.ndim(value)  # a key's data has more axes than the key
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
    shape = _whole(value.shape, rows)
    axes = frozenset(rows)
    placed, unit, sharding = _boxes(value, axes)
    if cut is not None and cut.sharding is not None:
        sharding = _sharding_json(cut.sharding, frozenset())
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
    leaf = Leaf(
        path,
        kind,
        dtype,
        shape,
        chunk,
        compression=compression,
        sharding=sharding,
        text=text,
        boxes=tuple(Box(_moved(start, rows), source.shape) for start, source in placed),
    )
    return Described(leaf, tuple(source for _, source in placed))


def _jax_kind(path: KeyPath, value: jax.Array) -> tuple[str, str, jax.Array]:
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where a piece lies along an axis that is cut: its first row, of how many."""

    start: int
    size: int


def _rows_of(path: KeyPath, shape: Shape, cut: Slice, rank: int) -> dict[int, _Rows]:
    """Returns where a piece of that shape lies, by axis, each one of the leaf's first `rank`."""
    rows = _rows_given(cut, rank)
    if not rows:
        raise _unsupported(
            path,
            f"is a Slice with start={cut.start!r}, size={cut.size!r}, axis={cut.axis!r} of an "
            f"array of shape {shape}",
            "start and size are integers, and axis is one of the array's; or all three are tuples "
            "of the same length, of different axes.",
        )
    for axis, held in rows.items():
        if held.start < 0 or held.start + shape[axis] > held.size or not shape[axis]:
            raise _unsupported(
                path,
                f"is a Slice of rows {held.start} to {held.start + shape[axis]} of {held.size} "
                f"along axis {axis}",
                "Give at least one row, all of them inside the leaf.",
            )
    return rows


def _rows_given(cut: Slice, rank: int) -> dict[int, _Rows]:
    """What a slice says, by axis; nothing if it makes no sense."""
    try:
        starts, sizes, given = map(_integers, (cut.start, cut.size, cut.axis))
        axes = [range(rank)[axis] for axis in given]
    except (TypeError, IndexError):
        return {}
    if not len(set(axes)) == len(axes) == len(starts) == len(sizes):
        return {}
    return dict(zip(axes, map(_Rows, starts, sizes), strict=True))


def _integers(given: int | tuple[int, ...]) -> list[int]:
    return [*map(operator.index, given if isinstance(given, tuple) else (given,))]


def _whole(shape: Shape, rows: Mapping[int, _Rows]) -> Shape:
    if not rows:
        return shape
    return tuple(rows[axis].size if axis in rows else size for axis, size in enumerate(shape))


def _moved(start: Shape, rows: Mapping[int, _Rows]) -> Shape:
    if not rows:
        return start
    return tuple(at + rows[axis].start if axis in rows else at for axis, at in enumerate(start))


def _boxes(
    value: Source, axes: frozenset[int]
) -> tuple[list[tuple[Shape, Source]], Shape, dict[str, Any] | None]:
    """Returns the boxes to write, each its start and data; the shape of a shard; the sharding."""
    origin = (0,) * value.ndim
    if isinstance(value, np.ndarray):
        return [(origin, value)], value.shape, None
    sharding = value.sharding
    if isinstance(sharding, SingleDeviceSharding):
        return [(origin, value)], value.shape, _sharding_json(sharding, axes)
    shards = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    placed = [(tuple(cut.start or 0 for cut in shard.index), shard.data) for shard in shards]
    return placed, sharding.shard_shape(value.shape), _sharding_json(sharding, axes)


@lru_cache(maxsize=1024)
def _sharding_json(sharding: Sharding, cut: frozenset[int]) -> dict[str, Any]:
    """Returns a sharding in Orbax's terms; axes that are cut are not sharded as a whole."""
    devices: set[Any] = sharding.device_set
    if not isinstance(sharding, NamedSharding):
        device = min(devices, key=lambda device: device.id)
        number = _device_number(device, is_local=True)
        return {
            "sharding_type": "SingleDeviceSharding",
            "device_str": f"{device.platform}:{number}",
        }
    mesh = sharding.mesh
    is_local = len({device.process_index for device in devices}) == 1
    numbers = np.vectorize(lambda device: {"id": _device_number(device, is_local=is_local)})
    spec = [None if i in cut else _axes_json(axes) for i, axes in enumerate(sharding.spec)]
    return {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.devices.shape),
        "axis_names": list(mesh.axis_names),
        "axis_types": [f"AxisType.{axis_type.name}" for axis_type in mesh.axis_types],
        "partition_spec": spec,
        "device_mesh": {"mesh": numbers(mesh.devices).tolist()},
    }


def _axes_json(axes: object) -> object:
    return list(axes) if isinstance(axes, tuple) else axes if isinstance(axes, str) else None


def _device_number(device: Any, *, is_local: bool) -> int:
    """A device of one process among several has a number that no other run would know."""
    if is_local and jax.process_count() > 1:
        return int(device.local_hardware_id)
    return int(device.id)


def lasting(value: object) -> "weakref.ref[jax.Array] | None":
    """Refers to an array that nothing can change as long as it lives; None for any other leaf."""
    if isinstance(value, jax.Array) and _is_on_accelerator(value.sharding):
        return weakref.ref(value)
    return None


@lru_cache(maxsize=1024)
def _is_on_accelerator(sharding: Sharding) -> bool:
    """Whether memory is an array's alone: on a CPU it may be that of a NumPy array, and change."""
    devices: set[Any] = sharding.device_set
    return all(device.platform != "cpu" for device in devices)


def detach(described: Sequence[Described]) -> list[Described]:
    """Makes the sources safe from donation, deletion and overwriting, without waiting for them.

    Small arrays that are ready are copied. On a CPU, a large one that is ready is viewed, which is
    free, and makes a donation that comes while it lives copy. Everything else is transferred to
    pinned host memory, a true copy that is issued at once and done when the array is computed.
    """
    slots = [list(one.sources) for one in described]
    transfers: list[tuple[int, int]] = []
    for i, one in enumerate(described):
        for j, source in enumerate(one.sources):
            if isinstance(source, np.ndarray):
                slots[i][j] = source if one.is_ours else source.copy(order="C")
            elif not _taken_on_host(source):
                transfers.append((i, j))
            else:
                view = np.asarray(source)
                slots[i][j] = view.copy() if view.nbytes <= _COPIED_BYTES else view
    for (i, j), copy in zip(
        transfers, _transferred([slots[i][j] for i, j in transfers]), strict=True
    ):
        slots[i][j] = copy
    return [
        Described(one.leaf, tuple(sources), is_ours=True)
        for one, sources in zip(described, slots, strict=True)
    ]


def _taken_on_host(source: jax.Array) -> bool:
    """Whether NumPy can take the array without waiting for a computation or a transfer."""
    device = _device_of(source)
    if not _has_pinned_host(device):
        return True
    return _is_ready(source) and device.platform == "cpu"


def _transferred(sources: list[Any]) -> list[jax.Array]:
    if not sources:
        return []
    targets = [_pinned_host(_device_of(source)) for source in sources]
    # An array that lives in pinned memory already would otherwise be passed on as it is.
    return list(jax.device_put(sources, targets, may_alias=False))


@lru_cache(maxsize=1024)
def _pinned_host(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=_PINNED_HOST)


def _device_of(source: jax.Array) -> Any:
    (device,) = source.sharding.device_set
    return device


@lru_cache(maxsize=1024)
def _has_pinned_host(device: Any) -> bool:
    return any(memory.kind == _PINNED_HOST for memory in device.addressable_memories())


def is_computed(described: Sequence[Described]) -> bool:
    """Whether `wait_until_computed` would not wait."""
    try:
        return all(map(_is_ready, _arrays(described)))
    except RuntimeError:  # of the computation, or the device: waiting raises it
        return True


def wait_until_computed(described: Sequence[Described]) -> None:
    """Waits until all arrays are computed and, if they are in pinned host memory, transferred."""
    for array in _arrays(described):
        if not _is_ready(array):  # asking takes half the time of waiting for nothing
            array.block_until_ready()


def _arrays(described: Sequence[Described]) -> list[jax.Array]:
    return [
        source for one in described for source in one.sources if not isinstance(source, np.ndarray)
    ]


def _is_ready(array: jax.Array) -> bool:
    is_ready: bool = array.is_ready()  # type: ignore[attr-defined] # of every concrete array
    return is_ready


def to_host(source: Source) -> np.ndarray:
    """Returns a box's data in C order; waits until it is computed and transferred."""
    return np.asarray(source, order="C")
