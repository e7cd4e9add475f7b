"""Trees of every kind of node, leaf and dtype, for Hypothesis; and what makes two of them the same.

Data is drawn as bits, not as numbers, so that every NaN payload and -0.0 takes part.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.core import FrozenDict
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp

# What tensorstore's zarr3 stores.
DTYPES = (
    *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
WIDE = frozenset(("int64", "uint64", "float64", "complex128"))  # JAX has them with x64 only
KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
_BITS = {"bool": 1, "int2": 2, "int4": 4, "float4_e2m1fn": 4}  # of a byte that NumPy holds
_AXES = {"x": (8,), "xy": (4, 2), "xyz": (2, 2, 2)}


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    kernel: Any
    bias: Any


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of any bits that the dtype can have."""
    wanted = numpy_dtype(dtype)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * wanted.itemsize)
    bits = np.frombuffer(raw, np.uint8)
    if dtype in ("int2", "int4"):  # NumPy holds them sign-extended
        half = 1 << (_BITS[dtype] - 1)
        return ((bits % (2 * half)).astype(np.int8) - half).astype(wanted).reshape(shape)
    if dtype in _BITS:
        bits = bits % (1 << _BITS[dtype])
    return bits.view(wanted).reshape(shape)


def fingerprint(value: object) -> tuple[Any, ...]:
    """Kind, dtype, shape and bits of a leaf: equal for two leaves that are the same."""
    if isinstance(value, jax.Array):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(value))
            return "key", str(value.dtype), value.shape, data.tobytes()
        return "jax", value.dtype.name, value.shape, np.asarray(value).tobytes()
    if isinstance(value, (np.ndarray, np.generic)):
        kind = "array" if isinstance(value, np.ndarray) else "generic"
        native = value.astype(value.dtype.newbyteorder("="))
        return kind, native.dtype.name, value.shape, native.tobytes()
    if isinstance(value, float):
        return "float", struct.pack("d", value)
    if isinstance(value, complex):
        return "complex", struct.pack("dd", value.real, value.imag)
    assert value is None or isinstance(value, (bool, int, str)), value
    return type(value).__name__, value


def is_empty(node: object) -> bool:
    return node is None or (isinstance(node, (list, tuple, Mapping)) and not node)


def flat(tree: object) -> tuple[list[tuple[Any, Any]], Any]:
    """Paths and leaves of a tree, None and empty containers among them; and its structure."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)


def assert_same(got: object, want: object) -> None:
    """Same structure, and every leaf the same to the bit."""
    (got_leaves, got_structure), (want_leaves, want_structure) = flat(got), flat(want)
    assert got_structure == want_structure
    for (path, one), (_, other) in zip(got_leaves, want_leaves, strict=True):
        where = jax.tree_util.keystr(path)
        if is_empty(other):
            assert type(one) is type(other), where
            assert not one, where
        else:
            assert fingerprint(one) == fingerprint(other), where


def assert_whole(path: Path, state: Any, **how: Any) -> None:
    """A finalized checkpoint holds a state, to the bit, and no damage."""
    report = fp.verify(path)
    assert report.ok, report.bad
    assert_same(fp.load(path, **how), state)


def emptied(leaf: Any) -> Any:
    """A leaf of a target: of the wanted type, and with other content."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype.newbyteorder("="))
    if isinstance(leaf, np.generic):
        return np.zeros((), leaf.dtype)[()]
    return leaf if is_empty(leaf) else type(leaf)()


def as_nested(tree: Any) -> Any:
    """What a tree comes back as without a target: dicts, and lists."""
    if isinstance(tree, Block):
        return {"kernel": as_nested(tree.kernel), "bias": as_nested(tree.bias)}
    if isinstance(tree, Mapping):
        return {key: as_nested(value) for key, value in tree.items()}
    if isinstance(tree, Pair):
        return {"left": as_nested(tree.left), "right": as_nested(tree.right)}
    if isinstance(tree, (list, tuple)) and tree:
        return [as_nested(value) for value in tree]
    return tree


def mesh(name: str) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(_AXES[name]), tuple(name))


@st.composite
def shardings(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """A sharding over local devices that an array of this shape can have."""
    if draw(st.booleans()):
        return SingleDeviceSharding(draw(st.sampled_from(jax.devices())))
    chosen = mesh(draw(st.sampled_from(sorted(_AXES))))
    left = list(draw(st.permutations(chosen.axis_names)))
    spec: list[Any] = []
    for size in shape:
        take = draw(st.integers(0, len(left)))
        axes = tuple(left[:take])
        if size % math.prod(chosen.shape[axis] for axis in axes):
            spec.append(None)
            continue
        spec.append(axes or None)
        left = left[take:]
    return NamedSharding(chosen, PartitionSpec(*spec))


shapes = st.lists(st.sampled_from((0, 1, 2, 3, 7, 8, 13, 16)), max_size=3).map(tuple)
_seeds = st.integers(0, 2**32 - 1)


@st.composite
def jax_arrays(draw: st.DrawFn) -> jax.Array:
    """Arrays on one device, sharded, or replicated over all."""
    dtype = draw(st.sampled_from([name for name in DTYPES if name not in WIDE]))
    shape = draw(shapes)
    return jax.device_put(random_bits(dtype, shape, draw(_seeds)), draw(shardings(shape)))


@st.composite
def numpy_arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays in any memory layout and byte order."""
    array = random_bits(draw(st.sampled_from(DTYPES)), draw(shapes), draw(_seeds))
    layout = draw(st.sampled_from(("C", "F", "reversed", "strided", "swapped", "broadcast")))
    match layout:
        case "F":
            return np.asfortranarray(array)
        case "reversed":
            return array[(slice(None, None, -1),) * array.ndim]
        case "strided":
            return array[(slice(None, None, 2),) * array.ndim]
        case "swapped" if array.dtype.kind in "iufc" and array.dtype.isbuiltin:
            return array.astype(array.dtype.newbyteorder(">"))
        case "broadcast":
            return np.broadcast_to(array, (3, *array.shape))
    return array


@st.composite
def prng_keys(draw: st.DrawFn) -> jax.Array:
    """A key, or an array of keys, of any implementation."""
    key = jax.random.key(draw(st.integers(0, 2**31 - 1)), impl=draw(st.sampled_from(KEY_IMPLS)))
    shape = draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    return jax.random.split(key, shape) if shape else key


numpy_scalars = st.builds(
    lambda dtype, seed: random_bits(dtype, (1,), seed)[0],
    st.sampled_from([name for name in DTYPES if numpy_dtype(name).isbuiltin == 1]),
    _seeds,
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.builds(dict),
    st.builds(list),
    st.builds(tuple),
)
leaves = st.one_of(jax_arrays(), numpy_arrays(), numpy_scalars, prng_keys(), plain)
# "." joins keys and a trailing "/" does not count: keys that collide so have tests of their own.
names = st.text(st.characters(exclude_characters="./", exclude_categories=["Cs"]), max_size=6)


def _nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(names, children, max_size=4),
        st.dictionaries(st.integers(-5, 40), children, max_size=3),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Block, children, children),
        st.dictionaries(names, children, max_size=3).map(FrozenDict),
    )


trees = st.dictionaries(names, st.recursive(leaves, _nodes, max_leaves=6), min_size=1, max_size=4)
options = st.builds(
    fp.SaveOptions,
    durable=st.booleans(),
    checksum=st.booleans(),
    compression=st.sampled_from((None, None, "zstd", "blosc")),
    chunk_bytes=st.sampled_from((1, 7, 64, 1000, 2 << 20)),
)
