"""A state -> its leaves, and where the data of their boxes is; touches no data, waits for nothing.

Arrays are described shard by shard, each box once (the shard that is replica 0): no array is ever
assembled. How a tree was described is remembered by its structure: the next save of a tree like it
only compares each leaf's type, shape, dtype and sharding.
"""

import math
import operator
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding
from msgspec import Struct, structs

from flax_partial import collector
from flax_partial.distributed import agreement
from flax_partial.errors import UnsupportedLeafError
from flax_partial.format import keypaths
from flax_partial.format import model as kinds
from flax_partial.format.chunks import Shape, choose_chunk_shape
from flax_partial.format.keypaths import KeyPath, is_leaf
from flax_partial.format.model import STORABLE_DTYPES, Box, Leaf

Source = np.ndarray | jax.Array
_How = tuple[int, str | None]
"""Wanted size of a chunk, in bytes; the chunks' codec."""

_MOST_KNOWN_LEAVES = 1 << 17  # of the trees whose description is remembered, beside the last
_MOST_KNOWN_TREES = 1 << 9


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


@dataclass(slots=True)
class Described:
    """The leaves of a state, in order.

    Attributes:
      tree: What is known of trees like it.
      leaves: What each is, with the boxes that this process has to write, without digests.
      sources: The data of each leaf's boxes: host arrays, or arrays on a single device.
      sizes: Size of each leaf's boxes, in bytes.
      arrays: Weak references to those leaves that nothing can change as long as they live.
    """

    tree: "KnownTree"
    leaves: list[Leaf] = field(default_factory=list)
    sources: list[Sequence[Source]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    arrays: "Sequence[weakref.ref[jax.Array] | None]" = ()

    def add(self, leaf: Leaf, sources: Sequence[Source], size: int) -> None:
        """Adds a leaf, the data of its boxes, and their size in bytes."""
        self.leaves.append(leaf)
        self.sources.append(sources)
        self.sizes.append(size)


class _Like(Struct, gc=False):
    """What another value has to be in order to be described the same way.

    Attributes:
      value_type: The value's exact type.
      shape: Its shape.
      dtype: Its dtype.
      sharding: Its sharding; None for a NumPy array.
      leaf: The description; the path is that of one such value.
      shards: Positions of its shards that are written; None where its one shard is the value.
      size: Size of its boxes, in bytes.
    """

    value_type: Any
    shape: Shape
    dtype: Any
    sharding: Sharding | None
    leaf: Leaf
    shards: tuple[int, ...] | None
    size: int


class _Template(Struct, gc=False):
    """How a leaf was described.

    Attributes:
      leaf: The description.
      at: Its position among the values that JAX flattens a tree to; None for what is no value to
        JAX, which is part of the structure: None, and empty containers.
      like: What another value has to be for that to be right again; None where each is to be
        described anew.
    """

    leaf: Leaf
    at: int | None
    like: _Like | None


@dataclass(slots=True)
class KnownTree:
    """What is known of the trees of one structure.

    Attributes:
      templates: How their leaves were described.
      text: The structure as text, where there are integer keys; else empty. To Python `1`, `True`
        and `1.0` are equal, and so are structures that have them as keys; only one can be saved.
      is_tree: Whether their leaves were claimed before: among themselves they have no conflict.
    """

    templates: list[_Template] = field(default_factory=list)
    text: str = ""
    is_tree: bool = False


class _KnownTrees:
    """Trees by structure: those that were described last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, KnownTree] = OrderedDict()
        self._leaves = 0

    def get(self, key: Any) -> KnownTree | None:
        try:
            return self._known.get(key)
        except (TypeError, ValueError):  # a structure that holds what cannot be hashed or compared
            return None

    def put(self, key: Any, tree: KnownTree) -> None:
        with self._lock:
            try:
                replaced = self._known.pop(key, None)
                self._known[key] = tree
            except (TypeError, ValueError):
                return
            self._leaves += len(tree.templates) - (len(replaced.templates) if replaced else 0)
            while len(self._known) > 1 and (
                self._leaves > _MOST_KNOWN_LEAVES or len(self._known) > _MOST_KNOWN_TREES
            ):
                _, dropped = self._known.popitem(last=False)
                self._leaves -= len(dropped.templates)


_known_trees = _KnownTrees()


def describe(
    state: Any, *, chunk_bytes: int, compression: str | None, remember: bool = False
) -> Described:
    """Says how a state is stored.

    Args:
      state: Any pytree of what can be saved.
      chunk_bytes: Wanted size of a chunk, in bytes.
      compression: Codec of the chunks.
      remember: Whether to refer to arrays that live on, weakly.

    Raises:
      UnsupportedLeafError: No checkpoint can hold some leaf or key.
    """
    values, structure = keypaths.values_of(state)
    how = chunk_bytes, compression
    key = _keys_on_the_way(structure), structure, how, agreement.count()
    tree = _known_trees.get(key)
    if tree is None or (tree.text and tree.text != str(structure)):
        with collector.paused():
            described = _anew(state, how)
        if any(keypaths.INT_KEY in one.leaf.key_kinds for one in described.tree.templates):
            described.tree.text = str(structure)
        _known_trees.put(key, described.tree)
    else:
        described = _again(tree, values, how)
    if remember:
        described.arrays = [
            None if one.at is None else _lasting(values[one.at]) for one in described.tree.templates
        ]
    return described


def _keys_on_the_way(structure: Any) -> tuple[object, ...]:
    """The keys of the dicts on the way to the first leaf, and on the way to the last.

    JAX leaves them out of the hash of a structure: without them, those of all layers of a model
    would have the same one.
    """
    found: list[object] = []
    for end in (0, -1):
        inner = structure
        while (node := inner.node_data()) is not None and (children := inner.children()):
            if node[0] is dict:
                found.append(tuple(map(str, node[1])))
            inner = children[end]
    return tuple(found)


def _anew(state: Any, how: _How) -> Described:
    described = Described(KnownTree())
    paths, values, _ = keypaths.flatten(state)
    if len(paths) == 1 and not paths[0].texts and is_leaf(values[0]):
        return described
    likes: dict[Any, _Like] = {}
    count = 0
    for path, value in zip(paths, values, strict=True):
        at = None if is_leaf(value) else count
        count += at is not None
        key = _key_of(value)
        like = likes.get(key)
        if like is None:
            template = _add(described, path, value, at, how)
            if template.like is not None:
                likes[key] = template.like
        else:
            leaf = structs.replace(like.leaf, texts=path.texts, key_kinds=path.key_kinds)
            described.add(leaf, _sources_of(value, like), like.size)
            template = _Template(leaf, at, like)
        described.tree.templates.append(template)
    return described


def _again(tree: KnownTree, values: Sequence[Any], how: _How) -> Described:
    described = Described(tree)
    for number, one in enumerate(tree.templates):
        value = None if one.at is None else values[one.at]
        if one.like is not None and _is_like(value, one.like):
            described.add(one.leaf, _sources_of(value, one.like), one.like.size)
        elif one.at is None:
            described.add(one.leaf, (), 0)
        else:
            tree.templates[number] = _add(described, one.leaf, value, one.at, how)
    return described


def _key_of(value: Any) -> Any:
    """What values that are `_Like` each other have in common; None for what is like nothing."""
    if type(value) is np.ndarray:
        return np.ndarray, value.shape, value.dtype
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return None
    return None if value.is_deleted() else (type(value), value.shape, value.dtype, value.sharding)


def _is_like(value: Any, like: _Like) -> bool:
    if type(value) is not like.value_type or value.shape != like.shape or value.dtype != like.dtype:
        return False
    if like.sharding is None:
        return True
    is_same = value.sharding is like.sharding or value.sharding == like.sharding
    return is_same and not value.is_deleted()


def _sources_of(value: Any, like: _Like) -> Sequence[Source]:
    if like.shards is None:
        return (value,)
    return [value.addressable_data(shard) for shard in like.shards]


def _add(
    described: Described,
    path: KeyPath,
    value: Any,
    at: int | None,
    how: _How,
) -> _Template:
    """Describes a leaf; returns what is to be remembered of it."""
    leaf, sources = _describe(path, value, *how)
    size = sum(source.nbytes for source in sources)
    described.add(leaf, sources, size)
    sharding = shards = None
    if leaf.kind == kinds.JAX_ARRAY and isinstance(value, jax.Array):
        sharding = value.sharding
        if not isinstance(sharding, SingleDeviceSharding):
            shards = tuple(
                number
                for number, shard in enumerate(value.addressable_shards)
                if shard.replica_id == 0
            )
    elif type(value) is not np.ndarray or not value.dtype.isnative:
        return _Template(leaf, at, None)
    like = _Like(type(value), value.shape, value.dtype, sharding, leaf, shards, size)
    return _Template(leaf, at, like)


def _describe(
    path: KeyPath, value: object, chunk_bytes: int, compression: str | None
) -> tuple[Leaf, Sequence[Source]]:
    if isinstance(value, str):  # np.str_ too
        _require_utf8(path, value)
        text = str.__str__(value)  # as for a key
        return Leaf(path.texts, path.key_kinds, kinds.STRING, text=text), ()
    if isinstance(value, bytes):  # np.bytes_ too
        return Leaf(path.texts, path.key_kinds, kinds.BYTES, data=bytes(value)), ()
    if isinstance(value, (np.ndarray, np.generic, jax.Array, Slice)):
        return _describe_array(path, value, chunk_bytes, compression)
    if isinstance(value, (bool, int, float, complex)):
        return _describe_scalar(path, value)
    if value is None:
        return Leaf(path.texts, path.key_kinds, kinds.NONE), ()
    if is_leaf(value):
        return Leaf(path.texts, path.key_kinds, _empty_kind(value), placeholder=True), ()
    raise _unsupported(
        path,
        f"is a {type(value).__module__}.{type(value).__qualname__}",
        "Leaves are arrays, numbers, strings, bytes and None; convert it, for example with "
        "np.asarray(), or leave it out.",
    )


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


def _describe_array(
    path: KeyPath, value: Any, chunk_bytes: int, compression: str | None
) -> tuple[Leaf, Sequence[Source]]:
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
    shape = _whole(value.shape, rows)
    if math.prod(size or 1 for size in shape) * value.dtype.itemsize > kinds.MOST_BYTES:
        raise _unsupported(path, f"is of shape {list(shape)}", "No array can be as large.")
    axes = frozenset(rows)
    placed, unit, sharding = _boxes(value, axes)
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
        boxes = tuple(Box(_moved(start, rows), source.shape) for start, source in placed)
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
) -> tuple[list[tuple[Shape, Source]], Shape, kinds.Sharding | None]:
    """Returns the boxes to write, each its start and data; the shape of a shard; the sharding."""
    origin = (0,) * value.ndim
    if isinstance(value, np.ndarray):
        return [(origin, value)], value.shape, None
    sharding = value.sharding
    if isinstance(sharding, SingleDeviceSharding):
        return [(origin, value)], value.shape, _in_orbax_terms(sharding, axes)
    shards = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    placed = [(tuple(cut.start or 0 for cut in shard.index), shard.data) for shard in shards]
    return placed, sharding.shard_shape(value.shape), _in_orbax_terms(sharding, axes)


@lru_cache(maxsize=1024)
def _in_orbax_terms(sharding: Sharding, cut: frozenset[int]) -> kinds.Sharding:
    """Returns a sharding in Orbax's terms; axes that are cut are not sharded as a whole."""
    devices: set[Any] = sharding.device_set
    if not isinstance(sharding, NamedSharding):
        (platform,) = {device.platform for device in devices}
        first = min(jax.local_devices(backend=platform), key=lambda device: device.id)
        return kinds.Sharding(
            {"sharding_type": "SingleDeviceSharding", "device_str": _as_first(str(first))}
        )
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


def _as_first(device: str) -> str:
    """Names a process's first device as the first of all: a reader has one, and may have no more.

    Orbax finds a device by its text in JAX: `cuda:0`, `TPU_0(process=0,(0,0,0,0))`, `TFRT_CPU_0`.
    """
    return re.sub(r"process=\d+", "process=0", re.sub(r"(?<=[:_])\d+", "0", device, count=1))


def _axes_json(axes: object) -> object:
    return list(axes) if isinstance(axes, tuple) else axes if isinstance(axes, str) else None


def _device_number(device: Any, *, is_local: bool) -> int:
    """A device of one process among several has a number that no other run would know."""
    if not is_local or jax.process_count() == 1:
        return int(device.id)
    beside = [
        other.id
        for other in jax.devices(device.platform)
        if other.process_index == device.process_index
    ]
    return sorted(beside).index(device.id)


def _lasting(value: object) -> "weakref.ref[jax.Array] | None":
    """Refers to an array that nothing can change as long as it lives; None for any other leaf."""
    if isinstance(value, jax.Array) and _is_on_accelerator(value.sharding):
        return weakref.ref(value)
    return None


@lru_cache(maxsize=1024)
def _is_on_accelerator(sharding: Sharding) -> bool:
    """Whether memory is an array's alone: on a CPU it may be that of a NumPy array, and change."""
    devices: set[Any] = sharding.device_set
    return all(device.platform != "cpu" for device in devices)
