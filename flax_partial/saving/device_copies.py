"""Copies of arrays on the device where they are, so that a donation waits for no transfer.

A copy takes a hundredth of the time of a transfer: a step that donates its state is late by that,
and the copies leave the device while it computes. Small arrays are packed into one buffer, since
each transfer costs more than their bytes do.

`jax.device_put` to the same device need not copy, whatever `may_alias` is. What a compiled
function returns, none of whose arguments is donated, is memory of its own on every platform. The
functions are compiled by another thread, once for each list of shapes; until then there are no
copies.
"""

import functools
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from flax_partial.errors import DeviceMemoryError
from flax_partial.saving.device_room import Device, DeviceRoom
from flax_partial.sessions import workers
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.workers import Task

PINNED_HOST = "pinned_host"
_Form = tuple[tuple[int, ...], np.dtype]  # the shape and dtype of an array
_Program = Callable[[list[list[jax.Array]]], list[list[jax.Array]]]

_PACKED_BYTES = 256 * 1024  # a larger array is copied by itself: its transfer is worth its cost
# What one function copies: bounds how long it takes to compile, and what a device gives back late.
# 4,096 compile in 2.0 s on two busy cores, 1,024 in 0.4: the time is linear, as arrays are joined
# some at a time. All at once, 2,000 took 8.9 s.
_MOST_ARRAYS = 4096
_MOST_BYTES = 256 << 20


@dataclass(eq=False, slots=True)
class Copy:
    """Memory on a device that holds copies of arrays: of one, or packed of many.

    Attributes:
      array: The memory; once its transfer was issued, that on the host.
      device: The device.
      size: In bytes.
      originals: The arrays, each with where its bytes begin; weak, so that they may be freed.
      on_device: The memory on the device while it is being transferred; else None.
      is_lost: Whether the device had no memory for it, which it said once the arrays were gone.
    """

    array: jax.Array
    device: Device
    size: int
    originals: "Sequence[tuple[int, weakref.ref[jax.Array]]]"
    on_device: jax.Array | None = None
    is_lost: bool = False

    def to_host(self) -> np.ndarray:
        """Returns the memory, in C order; waits until it is on the host.

        Raises:
          DeviceMemoryError: The device had no memory for it.
        """
        if self.is_lost:
            raise DeviceMemoryError(
                f"{self.device} had no memory for a copy of {self.size} bytes, and reported that "
                "after the arrays were donated or freed. No copies are made on it any more; "
                "SaveOptions(max_device_bytes=) bounds what they take."
            )
        on_device = self.on_device
        try:
            return np.asarray(self.array, order="C")
        except jax.errors.JaxRuntimeError:
            if on_device is None:
                raise
            return np.asarray(on_device, order="C")

    def read_originals(self) -> np.ndarray | None:
        """Returns the bytes of the arrays themselves; None if some were freed or donated."""
        data = np.empty(self.size, np.uint8)
        for start, original in self.originals:
            array = original()
            if array is None or array.is_deleted():
                return None
            seen = np.asarray(array, order="C").reshape(-1).view(np.uint8)
            data[start : start + seen.size] = seen
        return data


@dataclass(frozen=True, slots=True)
class Packed:
    """An array whose bytes lie in a `Copy` of many.

    Attributes:
      copy: The memory.
      start: Where its bytes begin.
      shape: Its shape.
      dtype: Its dtype.
    """

    copy: Copy
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def to_host(self) -> np.ndarray:
        """Returns the array, a view of the memory; waits until that is computed."""
        data = self.copy.to_host()
        size = math.prod(self.shape) * self.dtype.itemsize
        return data[self.start : self.start + size].view(self.dtype).reshape(self.shape)


Copied = Copy | Packed


@dataclass(slots=True)
class _Bundle:
    """Arrays of one save that are copied at once on one device.

    Attributes:
      save: Position of the save.
      packs: Whether into one buffer; else each into its own.
      positions: Of each among all arrays of the save.
      forms: Shape and dtype of each.
      size: In bytes.
    """

    save: int
    packs: bool
    positions: list[int] = field(default_factory=list)
    forms: list[_Form] = field(default_factory=list)
    size: int = 0


@dataclass(slots=True)
class _Batch:
    """What one function copies: arrays on one device, of one save or of several.

    Attributes:
      device: Where they are.
      bundles: The arrays, by save and by whether they are packed.
      count: Number of arrays.
      size: In bytes.
    """

    device: Device
    bundles: dict[tuple[int, bool], _Bundle] = field(default_factory=dict)
    count: int = 0
    size: int = 0


def copy(
    saves: Sequence[tuple[Hashable, Sequence[jax.Array]]], *, room: DeviceRoom, limit: int | None
) -> list[tuple[dict[int, Copied], list[Copy]]]:
    """Copies arrays of saves on their devices, as far as there is room; waits for nothing.

    Args:
      saves: What holds the room of each save, and its arrays, each on one device.
      room: Where room is taken for the copies.
      limit: As `DeviceRoom.most` has it.

    Returns:
      Of each save: position -> copy of each array that was copied; the memory of the copies, each
      once. What has no room, is of a kind that cannot be copied, or for which the function is not
      compiled yet, is left out; so is what the device takes no memory for after all.
    """
    done: list[tuple[dict[int, Copied], list[Copy]]] = [({}, []) for _ in saves]
    most: dict[Device, int] = {}
    for batch in _batches([arrays for _, arrays in saves]):
        if batch.device not in most:
            most[batch.device] = room.most(batch.device, limit=limit)
        program = _programs.get(batch)
        bundles = [*batch.bundles.values()]
        sizes = [(saves[bundle.save][0], bundle.size) for bundle in bundles]
        if program is None or not room.take(sizes, batch.device, most=most[batch.device]):
            continue
        arrays = [[saves[one.save][1][at] for at in one.positions] for one in bundles]
        try:
            made = program(arrays)
        except Exception as error:  # noqa: BLE001 - any but this is raised by a transfer as well
            if is_out_of_memory(error):  # which the device may have looked for a long time
                room.close(batch.device)
            for owner, size in sizes:
                room.give_back(owner, batch.device, size)
            continue
        for bundle, originals, results in zip(bundles, arrays, made, strict=True):
            _note(done[bundle.save], bundle, originals, results, batch.device)
    return done


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device has no memory for a copy; that of a computation may say the same."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _note(
    done: tuple[dict[int, Copied], list[Copy]],
    bundle: _Bundle,
    arrays: Sequence[jax.Array],
    made: Sequence[jax.Array],
    device: Device,
) -> None:
    """Adds copies that were made to those of a save."""
    copied, copies = done
    known = map(weakref.ref, arrays)
    if not bundle.packs:
        one_each = [
            Copy(array, device, array.nbytes, [(0, original)])
            for array, original in zip(made, known, strict=True)
        ]
        copied.update(zip(bundle.positions, one_each, strict=True))
        copies += one_each
        return
    starts = _starts(bundle.forms)
    whole = Copy(made[0], device, bundle.size, [*zip(starts, known, strict=True)])
    copies.append(whole)
    for at, start, form in zip(bundle.positions, starts, bundle.forms, strict=True):
        copied[at] = Packed(whole, start, *form)


def _batches(saves: Sequence[Sequence[jax.Array]]) -> Iterator[_Batch]:
    """Sorts arrays into batches, the same for each list of the same shapes on the same devices."""
    open_: dict[tuple[Device, bool], _Batch] = {}
    for save, arrays in enumerate(saves):
        for at, array in enumerate(arrays):
            form = array.shape, array.dtype
            place, (size, packs) = place_of(array.sharding), _size_of(*form)
            if not size or not place.can_copy:
                continue
            lane = place.device, _is_whole_bytes(array.dtype)
            batch = open_.get(lane)
            if batch is None or batch.count == _MOST_ARRAYS or batch.size + size > _MOST_BYTES:
                if batch is not None:
                    yield batch
                batch = open_[lane] = _Batch(place.device)
            bundle = batch.bundles.get((save, packs))
            if bundle is None:
                bundle = batch.bundles[save, packs] = _Bundle(save, packs)
            bundle.positions.append(at)
            bundle.forms.append(form)
            bundle.size += size
            batch.count += 1
            batch.size += size
    yield from open_.values()


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array on a single device is.

    Attributes:
      device: The device.
      is_cpu: Whether that is a CPU.
      has_pinned_host: Whether the device can have arrays in pinned host memory.
      can_copy: Whether copies of it can be made there, and transferred.
    """

    device: Device
    is_cpu: bool
    has_pinned_host: bool
    can_copy: bool


_places: dict[int, tuple[Sharding, Place]] = {}  # by the sharding's id, which lives as it is here
_MOST_PLACES = 1 << 14


def place_of(sharding: Sharding) -> Place:
    """Where arrays of a sharding with a single device are.

    A training step returns each leaf in a sharding of its own, the same object each time; to hash
    and compare it takes 0.7 us, and looking at its identity 0.1.
    """
    known = _places.get(id(sharding))
    if known is None:
        if len(_places) >= _MOST_PLACES:
            _places.clear()
        known = _places[id(sharding)] = sharding, _place_of(sharding)
    return known[1]


@functools.lru_cache(maxsize=1024)
def _place_of(sharding: Sharding) -> Place:
    device: Device
    (device,) = sharding.device_set
    kinds = [memory.kind for memory in device.addressable_memories()]
    has_pinned_host = PINNED_HOST in kinds
    # A platform without memories to choose from may have no default one either.
    can_copy = has_pinned_host and sharding.memory_kind in (None, device.default_memory().kind)
    return Place(device, device.platform == "cpu", has_pinned_host, can_copy)


@functools.lru_cache(maxsize=4096)
def _size_of(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, bool]:
    """Size of an array, in bytes, and whether it is packed."""
    size = math.prod(shape) * dtype.itemsize
    return size, size <= _PACKED_BYTES and _can_be_packed(dtype)


def _can_be_packed(dtype: np.dtype) -> bool:
    """Whether its bytes on the device are those on the host; complex numbers cannot be cast."""
    return _is_whole_bytes(dtype) and dtype.kind != "c"


@functools.lru_cache(maxsize=256)
def _is_whole_bytes(dtype: np.dtype) -> bool:
    """Whether its numbers take bytes each.

    Others come in two layouts, of which a function takes one: no other arrays are copied by it.
    """
    return not dtype.name.startswith(("int2", "int4", "uint2", "uint4", "float4"))


def _starts(forms: Sequence[_Form]) -> list[int]:
    """Where in a pack each array begins: those of a dtype lie together, in their order."""
    starts = [0] * len(forms)
    end = 0
    for dtype, positions in _by_dtype(forms).items():
        for at in positions:
            starts[at] = end
            end += math.prod(forms[at][0]) * dtype.itemsize
    return starts


def _by_dtype(forms: Sequence[_Form]) -> dict[np.dtype, list[int]]:
    found: dict[np.dtype, list[int]] = {}
    for at, (_, dtype) in enumerate(forms):
        found.setdefault(dtype, []).append(at)
    return found


# What is compiled.

# Of each device. States of 128 GiB need no more; where shapes change all the time, they end there:
# were others dropped for them, those that a step takes in turn would all be compiled in each step.
_MOST_PROGRAMS = 512
_AT_ONCE = 64  # a kernel takes so many arguments at most, and some more


def _copy(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def _pack(arrays: list[jax.Array]) -> list[jax.Array]:
    """One buffer of all bytes, dtype by dtype: joined first, then seen as bytes."""
    forms = [(array.shape, np.dtype(array.dtype)) for array in arrays]
    joined = [
        _bytes_of(_joined([lax.reshape(arrays[at], (arrays[at].size,)) for at in positions]))
        for positions in _by_dtype(forms).values()
    ]
    return [_joined(joined)]


def _joined(arrays: list[jax.Array]) -> jax.Array:
    """Joins vectors, some at a time: a kernel for thousands of arguments may be none at all."""
    while len(arrays) > 1:
        arrays = [
            lax.optimization_barrier(lax.concatenate(arrays[first : first + _AT_ONCE], 0))
            for first in range(0, len(arrays), _AT_ONCE)
        ]
    return arrays[0]


def _bytes_of(vector: jax.Array) -> jax.Array:
    if vector.dtype == np.bool_:
        return vector.astype(np.uint8)
    seen = lax.bitcast_convert_type(vector, np.uint8)
    return lax.reshape(seen, (seen.size,))


class _Programs:
    """Functions that copy and pack, compiled by another thread when they are first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: dict[Hashable, _Program | None] = {}  # None: not yet, or not possible
        self._counts: Counter[Device] = Counter()  # of these, by the device

    def get(self, batch: _Batch) -> _Program | None:
        bundles = batch.bundles.values()
        key = batch.device, *((one.packs, tuple(one.forms)) for one in bundles)
        try:
            return self._compiled[key]
        except KeyError:
            pass
        with self._lock:
            if key in self._compiled:
                return self._compiled[key]
            if self._counts[batch.device] >= _MOST_PROGRAMS:
                return None
            self._counts[batch.device] += 1
            self._compiled[key] = None
        workers.compiling.submit(Task(lambda _: self._compile(key, batch), Handle[None]()))
        return None

    def _compile(self, key: Hashable, batch: _Batch) -> None:
        sharding = SingleDeviceSharding(batch.device)
        bundles = [*batch.bundles.values()]
        ways = [_pack if one.packs else _copy for one in bundles]

        def make(arrays: list[list[jax.Array]]) -> list[list[jax.Array]]:
            return [way(of_one) for way, of_one in zip(ways, arrays, strict=True)]

        wanted = [
            [jax.ShapeDtypeStruct(*form, sharding=sharding) for form in one.forms]
            for one in bundles
        ]
        # The caller may have wide types in its thread alone.
        with jax.enable_x64(new_val=True):
            self._compiled[key] = jax.jit(make).lower(wanted).compile()


_programs = _Programs()


def _forget_all() -> None:
    """A forked child has none of its parent's threads; one of them may hold the lock."""
    global _programs  # noqa: PLW0603
    _programs = _Programs()


os.register_at_fork(after_in_child=_forget_all)
