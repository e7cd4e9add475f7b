"""Which boxes of a leaf to read, and what to make of them: the wanted type and sharding."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding
from msgspec import structs

from flax_partial import leaf_types
from flax_partial.errors import TargetMismatchError
from flax_partial.format import model as kinds
from flax_partial.format.chunks import Shape
from flax_partial.format.keypaths import KeyPath, is_leaf
from flax_partial.format.model import Leaf, Region
from flax_partial.format.slices import Slice, SliceError, moved, rows_of, whole_shape

BoxRange = tuple[Shape, Shape]
_COMPILED = 64  # arrays that a compiled function takes at once
_WORTH_COMPILING = 512
_SMALL_BYTES = 1024


class OnDevices(NamedTuple):
    """An array in host memory that is to be put on devices, together with others.

    Attributes:
      shards: This process's shards of it, and where to put each; None for the default device,
        uncommitted. None at all where it is on devices of other processes.
      whole: Shape, dtype and sharding of the array that the shards make; None where the only one
        is the array.
      is_weak: Whether its type is weak in JAX, as that of Python's numbers.
    """

    shards: Sequence[tuple[np.ndarray, Sharding | None]]
    whole: tuple[Shape, np.dtype[Any], Sharding] | None = None
    is_weak: bool = False


class Reading(NamedTuple):
    """What to read for one leaf, and what to make of it.

    Attributes:
      regions: Boxes of leaves.
      build: Makes the leaf's value, or an `OnDevices`, of the data of these boxes.
    """

    regions: Sequence[Region]
    build: Callable[[Sequence[np.ndarray]], Any]


def as_saved(leaf: Leaf) -> Reading:
    """Plans to read a leaf as the kind that was saved, on the default device.

    Raises:
      TargetMismatchError: JAX, as it is configured, has no such dtype.
    """
    if not leaf.is_array:
        return _given(_plain_value(leaf))
    if leaf.kind == kinds.PRNG_KEY:
        return _whole(leaf, lambda data: _key(leaf, data[0]))
    if leaf.kind == kinds.JAX_ARRAY:
        problem = _unknown_to_jax(leaf, leaf.numpy_dtype)
        if problem:
            raise TargetMismatchError(problem)
    return _whole(leaf, _BUILDERS[leaf.kind])


def _whole(leaf: Leaf, build: Callable[[Sequence[np.ndarray]], Any]) -> Reading:
    return Reading(((leaf, (0,) * len(leaf.shape), leaf.shape),), build)


def _given(value: Any) -> Reading:
    return Reading((), lambda _: value)


def has_accelerator() -> bool:
    """Whether arrays are put on devices that have memory of their own."""
    return jax.default_backend() != "cpu"


def put_on_devices(values: Sequence[Any]) -> list[Any]:
    """Replaces each `OnDevices` by its array.

    All are put in one call, which costs a tenth of one each.
    """
    waiting = [shard for one in values if isinstance(one, OnDevices) for shard in one.shards]
    free = [array for array, sharding in waiting if sharding is None]
    bound = [(array, sharding) for array, sharding in waiting if sharding is not None]
    put_free = iter(_put_on_default(free))
    put_bound = iter(jax.device_put(*map(list, zip(*bound, strict=True))) if bound else ())

    def put(value: OnDevices) -> jax.Array:
        shards = [next(put_free if at is None else put_bound) for _, at in value.shards]
        if value.whole is None:
            (array,) = shards
        else:
            shape, dtype, sharding = value.whole
            array = jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)
        return _weakened(array) if value.is_weak else array

    return [put(value) if isinstance(value, OnDevices) else value for value in values]


def _put_on_default(arrays: Sequence[np.ndarray]) -> Sequence[jax.Array]:
    """Puts arrays on the default device, uncommitted.

    As an argument of a compiled function each takes 4 us, by `device_put` 25. Compiling takes 20 ms
    on a CPU, so that only many small arrays of one form are put so.
    """
    form = (arrays[0].shape, arrays[0].dtype) if arrays else None
    is_many = len(arrays) >= _WORTH_COMPILING and arrays[0].nbytes <= _SMALL_BYTES
    is_eager: bool = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    is_plain = not (is_eager or has_accelerator()) and jax.sharding.get_abstract_mesh().empty
    if not (is_many and is_plain and all((one.shape, one.dtype) == form for one in arrays)):
        put: Sequence[jax.Array] = jax.device_put(arrays)
        return put
    whole = len(arrays) - len(arrays) % _COMPILED
    with jax.transfer_guard_host_to_device("allow"):  # as for `device_put`
        batches = [_identity(*arrays[i : i + _COMPILED]) for i in range(0, whole, _COMPILED)]
    return [*chain.from_iterable(batches), *jax.device_put(arrays[whole:])]


_identity = jax.jit(lambda *arrays: arrays)


def _weakened(array: jax.Array) -> jax.Array:
    """The same array with JAX's weak type, which computing with it depends on.

    An array takes it over from what it is written into. Only the default dtypes can be weak.
    """
    number = {"f": 1.0, "i": 1, "c": 1j}.get(_family(np.dtype(array.dtype)), 1)

    def weaken(values: jax.Array) -> jax.Array:
        return (jnp.zeros(values.shape, bool) * number).at[...].set(values)

    is_on_one = isinstance(array.sharding, SingleDeviceSharding)
    with jax.numpy_dtype_promotion("standard"):  # strict, it makes no array of a number
        if jax.eval_shape(weaken, array).dtype != array.dtype:
            return array
        weak: jax.Array = jax.jit(weaken, out_shardings=None if is_on_one else array.sharding)(
            array
        )
    return weak


def _plain_value(leaf: Leaf) -> Any:
    values: dict[str, Any] = {
        kinds.NONE: None,
        kinds.DICT: {},
        kinds.LIST: [],
        kinds.STRING: leaf.text,
        kinds.BYTES: leaf.data,
    }
    return values.get(leaf.kind, ())


def as_target(leaf: Leaf, target: Any, *, cast: bool) -> Reading | str:
    """Plans to read a leaf as what stands in the target at its place; a string: why not."""
    if isinstance(target, Slice):
        return _as_rows(leaf, target, cast=cast)
    return _as_value(leaf, target, cast=cast)


def _as_value(leaf: Leaf, target: Any, *, cast: bool) -> Reading | str:
    if isinstance(target, (str, bytes, type(None))) or is_leaf(target):
        return _as_plain(leaf, target)
    if not leaf.is_array:
        return _misfit(leaf, leaf.kind, target)
    if isinstance(target, (bool, int, float, complex)):
        return _as_number(leaf, target, cast=cast)
    if not (hasattr(target, "shape") and hasattr(target, "dtype")):
        return (
            f"{leaf.name!r}: the target has {_said(target)}, which no checkpoint can hold. "
            f"{leaf_types.advice(target)}"
        )
    is_key = jnp.issubdtype(target.dtype, jax.dtypes.prng_key)
    if is_key != (leaf.kind == kinds.PRNG_KEY):
        return _differ(leaf, target)
    return _as_key(leaf, target) if is_key else _as_array(leaf, target, cast=cast)


def _as_rows(leaf: Leaf, target: Slice, *, cast: bool) -> Reading | str:
    """Plans to read some rows of a leaf, as if they were all of it."""
    rank = len(getattr(target.value, "shape", ()))
    if not leaf.is_array or len(leaf.shape) < rank:
        return _misfit(leaf, leaf.summary, target)
    given = (*target.value.shape, *leaf.shape[rank:]) if rank else ()
    try:
        rows = rows_of(target, given, rank)
    except SliceError as error:
        return f"{leaf.name!r} {error.what} in the target. {error.way_out}"
    if whole_shape(given, rows) != leaf.shape:
        return _misfit(leaf, leaf.summary, target)
    reading = as_target(structs.replace(leaf, shape=given), target.value, cast=cast)
    if isinstance(reading, str):
        return reading
    regions = [(leaf, moved(start, rows), shape) for _, start, shape in reading.regions]
    return Reading(regions, reading.build)


def as_it_is(path: KeyPath, target: Any) -> Reading | str:
    """Plans to keep what stands in the target, which the checkpoint lacks."""
    if isinstance(target, Slice):
        target = target.value
    if isinstance(target, jax.ShapeDtypeStruct):
        return f"{path.name!r} is not in the checkpoint, and the target holds no value to keep"
    return _given(target)


def shape_and_dtype(leaf: Leaf) -> tuple[Shape, str]:
    """Shape and dtype name of an array leaf; of PRNG keys those of the array of keys."""
    if leaf.kind != kinds.PRNG_KEY:
        return leaf.shape, leaf.dtype
    try:
        key = abstract(leaf)
    except TargetMismatchError:
        return leaf.shape, f"key<{leaf.text}>"
    return key.shape, str(key.dtype)


def abstract(leaf: Leaf, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
    """Returns the array of JAX's that a leaf is, without its data, and where it is to go.

    Raises:
      TargetMismatchError: It is a PRNG key of an implementation that is not registered here.
    """
    if leaf.kind != kinds.PRNG_KEY:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.numpy_dtype, sharding=sharding)
    try:
        key = jax.eval_shape(
            lambda data: jax.random.wrap_key_data(data, impl=leaf.text),
            jax.ShapeDtypeStruct(leaf.shape, np.uint32),
        )
    except (ValueError, TypeError) as error:
        raise _no_key(leaf, error) from error
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)


def _said(target: object) -> str:
    if isinstance(target, Slice):
        return f"rows of [{target.size}, axis {target.axis}] as {_said(target.value)}"
    if hasattr(target, "shape") and hasattr(target, "dtype"):
        return f"{target.dtype}{list(target.shape)}"
    return repr(target) if is_leaf(target) else type(target).__name__


def _differ(leaf: Leaf, target: Any) -> str:
    shape, dtype = shape_and_dtype(leaf)
    return _misfit(leaf, f"{dtype}{list(shape)}", target)


def _misfit(leaf: Leaf, summary: str, target: Any) -> str:
    return f"{leaf.name!r} is {summary} in the checkpoint, {_said(target)} in the target"


def _as_plain(leaf: Leaf, target: Any) -> Reading | str:
    value = target
    if isinstance(target, str):
        fits, value = leaf.kind == kinds.STRING, leaf.text
    elif isinstance(target, bytes):
        fits, value = leaf.kind == kinds.BYTES, type(target)(leaf.data)
    else:
        fits = _is_same_empty(leaf, target)
    return _given(value) if fits else _misfit(leaf, leaf.kind, target)


def _is_same_empty(leaf: Leaf, target: object) -> bool:
    if target is None or hasattr(target, "_fields"):  # Orbax does not distinguish these two
        return leaf.kind in (kinds.NONE, kinds.NAMED_TUPLE)
    if isinstance(target, (list, tuple)):
        return leaf.kind in (kinds.LIST, kinds.TUPLE)
    return leaf.kind == kinds.DICT


def _as_number(leaf: Leaf, target: complex, *, cast: bool) -> Reading | str:
    wanted = type(target)
    families = {bool: "b", int: "iu", float: "f", complex: "c"}
    family = next(letters for kind, letters in families.items() if isinstance(target, kind))
    kind = _family(leaf.numpy_dtype)
    if leaf.shape or leaf.kind == kinds.PRNG_KEY or (kind not in family and not cast):
        return _differ(leaf, target)
    return _whole(leaf, lambda data: wanted(data[0].item()))


def _family(dtype: np.dtype[Any]) -> str:
    if jnp.issubdtype(dtype, np.floating):
        return "f"
    return "i" if jnp.issubdtype(dtype, np.integer) else dtype.kind


def _as_key(leaf: Leaf, target: Any) -> Reading | str:
    if shape_and_dtype(leaf) != (tuple(target.shape), str(target.dtype)):
        return _differ(leaf, target)
    sharding = _wanted_sharding(leaf, target)
    if isinstance(sharding, str):
        return sharding

    def build(data: Sequence[np.ndarray]) -> jax.Array:
        key = _key(leaf, data[0])
        if sharding is None or sharding.is_fully_addressable:
            return key if sharding is None else jax.device_put(key, sharding)
        indices = sharding.addressable_devices_indices_map(key.shape)
        shards = [jax.device_put(key[index], device) for device, index in indices.items()]
        return jax.make_array_from_single_device_arrays(
            key.shape, sharding, shards, dtype=key.dtype
        )

    return _whole(leaf, build)


def _wanted_sharding(leaf: Leaf, target: Any) -> Sharding | str | None:
    """Returns where a target puts an array; None: the default device; a string: what is wrong."""
    sharding: Sharding | None = getattr(target, "sharding", None)
    if isinstance(target, jax.Array) and not target.committed:
        return None  # JAX moves it to whatever it is computed with; a committed one it does not
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    if sharding.mesh.empty:
        return None
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        return (
            f"{leaf.name!r}: the target's sharding has an abstract mesh, {sharding.mesh}. Load "
            "inside of jax.set_mesh(mesh), with a mesh like it, or give the target a concrete one"
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _key(leaf: Leaf, data: np.ndarray) -> jax.Array:
    try:
        key: jax.Array = jax.random.wrap_key_data(jax.device_put(data), impl=leaf.text)
    except (ValueError, TypeError) as error:
        raise _no_key(leaf, error) from error
    return key


def _no_key(leaf: Leaf, error: Exception) -> TargetMismatchError:
    return TargetMismatchError(f"{leaf.name!r} is no PRNG key that JAX knows: {error}")


_BUILDERS: Mapping[str, Callable[[Sequence[np.ndarray]], Any]] = {
    kinds.JAX_ARRAY: lambda data: OnDevices(((data[0], None),)),
    kinds.NUMPY_ARRAY: lambda data: data[0],
    kinds.NUMPY_SCALAR: lambda data: data[0][()],
    kinds.SCALAR: lambda data: data[0].item(),
}


def _as_array(leaf: Leaf, target: Any, *, cast: bool) -> Reading | str:
    dtype = np.dtype(target.dtype)
    # A number of Python's has no dtype of its own: it fits where JAX would let it be one.
    is_number = leaf.kind == kinds.SCALAR and _family(leaf.numpy_dtype) == _family(dtype)
    is_same = leaf.numpy_dtype == dtype or is_number
    if leaf.shape != tuple(target.shape) or not (is_same or cast):
        return _differ(leaf, target)
    convert = partial(_converted, leaf, dtype, is_exact=not cast)
    if isinstance(target, (np.ndarray, np.generic)):
        make = _BUILDERS[
            kinds.NUMPY_SCALAR if isinstance(target, np.generic) else kinds.NUMPY_ARRAY
        ]
        return _whole(leaf, lambda data: make([convert(data[0])]))
    problem = _unknown_to_jax(leaf, dtype)
    if problem:
        return problem
    sharding = _wanted_sharding(leaf, target)
    if isinstance(sharding, str):
        return sharding
    is_weak = bool(getattr(target, "weak_type", False))
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return _whole(
            leaf, lambda data: OnDevices(((convert(data[0]), sharding),), is_weak=is_weak)
        )
    return _as_sharded(leaf, sharding, dtype, convert, is_weak=is_weak)


def _converted(
    leaf: Leaf, dtype: np.dtype[Any], array: np.ndarray, *, is_exact: bool
) -> np.ndarray:
    """Returns `array` as `dtype`; an integer that does not fit is an error if it is to be exact."""
    converted = array.astype(dtype, copy=False)
    is_integer = leaf.kind == kinds.SCALAR and _family(dtype) == "i"
    if is_exact and is_integer and converted.item() != array.item():
        raise TargetMismatchError(
            f"{leaf.name!r} is {array.item()} in the checkpoint, which does not fit the target's "
            f"{dtype}."
        )
    return converted


def _unknown_to_jax(leaf: Leaf, dtype: np.dtype[Any]) -> str | None:
    known = jax.dtypes.canonicalize_dtype(dtype)
    if known == dtype:
        return None
    return (
        f"{leaf.name!r} is a jax.Array of {dtype}, and JAX would make it {known}: set "
        "jax_enable_x64, or load it into a NumPy array"
    )


def _as_sharded(
    leaf: Leaf,
    sharding: Sharding,
    dtype: np.dtype[Any],
    convert: Callable[[np.ndarray], np.ndarray],
    *,
    is_weak: bool,
) -> Reading | str:
    try:
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        return f"{leaf.name!r}: the target's sharding does not fit: {error}"
    boxes: dict[BoxRange, list[Sharding]] = {}  # replicas of a box are read once
    for device, index in indices.items():
        cuts = [cut.indices(size) for cut, size in zip(index or (), leaf.shape, strict=True)]
        box = tuple(cut[0] for cut in cuts), tuple(cut[1] - cut[0] for cut in cuts)
        at = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        boxes.setdefault(box, []).append(at)

    def build(data: Sequence[np.ndarray]) -> OnDevices:
        replicas = zip(map(convert, data), boxes.values(), strict=True)
        shards = [(array, at) for array, places in replicas for at in places]
        return OnDevices(shards, (leaf.shape, dtype, sharding), is_weak)

    return Reading([(leaf, *box) for box in boxes], build)
