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
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from flax_partial.saving.device_room import Device, DeviceRoom
from flax_partial.sessions import workers
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.workers import Task

PINNED_HOST = "pinned_host"
_Form = tuple[tuple[int, ...], np.dtype]  # the shape and dtype of an array
_Program = Callable[[list[jax.Array]], list[jax.Array]]

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
      array: The memory; once it was transferred, that on the host.
      device: The device.
      size: In bytes.
      originals: The arrays, each with where its bytes begin; weak, so that they may be freed.
    """

    array: jax.Array
    device: Device
    size: int
    originals: "Sequence[tuple[int, weakref.ref[jax.Array]]]"

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
        data = np.asarray(self.copy.array)
        size = math.prod(self.shape) * self.dtype.itemsize
        return data[self.start : self.start + size].view(self.dtype).reshape(self.shape)


Copied = Copy | Packed


@dataclass(slots=True)
class _Batch:
    """Arrays on one device that are copied at once.

    Attributes:
      device: Where they are.
      packs: Whether into one buffer.
      positions: Of each among all arrays.
      forms: Shape and dtype of each.
      size: In bytes.
    """

    device: Device
    packs: bool
    positions: list[int] = field(default_factory=list)
    forms: list[_Form] = field(default_factory=list)
    size: int = 0


def copy(
    owner: Hashable, arrays: Sequence[jax.Array], *, room: DeviceRoom, limit: int | None
) -> tuple[dict[int, Copied], list[Copy]]:
    """Copies arrays on their devices, as far as there is room; waits for nothing.

    Args:
      owner: Holds the room.
      arrays: Each on one device.
      room: Where room is taken for the copies.
      limit: As `DeviceRoom.take` has it.

    Returns:
      Position -> copy of each array that was copied; the memory of the copies, each once. What has
      no room, is of a kind that cannot be copied, or for which the function is not compiled yet, is
      left out; so is what the device takes no memory for after all.
    """
    copied: dict[int, Copied] = {}
    copies: list[Copy] = []
    for batch in _batches(arrays):
        program = _programs.get(batch)
        if program is None or not room.take(owner, batch.device, batch.size, limit=limit):
            continue
        try:
            made = program([arrays[at] for at in batch.positions])
        except Exception:  # noqa: BLE001 - out of memory; any other error is raised by a transfer as well
            room.give_back(owner, batch.device, batch.size)
            continue
        if batch.packs:
            starts = _starts(batch.forms)
            originals = [
                (start, weakref.ref(arrays[at]))
                for start, at in zip(starts, batch.positions, strict=True)
            ]
            (whole,) = one = [Copy(made[0], batch.device, batch.size, originals)]
            for at, start, form in zip(batch.positions, starts, batch.forms, strict=True):
                copied[at] = Packed(whole, start, *form)
        else:
            one = [
                Copy(array, batch.device, array.nbytes, [(0, weakref.ref(arrays[at]))])
                for array, at in zip(made, batch.positions, strict=True)
            ]
            copied |= zip(batch.positions, one, strict=True)
        copies += one
    return copied, copies


def _batches(arrays: Sequence[jax.Array]) -> Iterator[_Batch]:
    """Sorts arrays into batches, the same for each list of the same shapes on the same devices."""
    open_: dict[tuple[Device, bool], _Batch] = {}
    for at, array in enumerate(arrays):
        form = array.shape, array.dtype
        place, (size, packs) = place_of(array.sharding), _size_of(*form)
        if not size or not place.can_copy:
            continue
        key = place.device, packs
        batch = open_.get(key)
        if batch is None or len(batch.forms) == _MOST_ARRAYS or batch.size + size > _MOST_BYTES:
            if batch is not None:
                yield batch
            batch = open_[key] = _Batch(place.device, packs)
        batch.positions.append(at)
        batch.forms.append(form)
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
    is_own_memory = sharding.memory_kind in (None, device.default_memory().kind)
    is_cpu = device.platform == "cpu"
    return Place(device, is_cpu, has_pinned_host, has_pinned_host and is_own_memory)


@functools.lru_cache(maxsize=4096)
def _size_of(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, bool]:
    """Size of an array, in bytes, and whether it is packed."""
    size = math.prod(shape) * dtype.itemsize
    return size, size <= _PACKED_BYTES and _can_be_packed(dtype)


def _can_be_packed(dtype: np.dtype) -> bool:
    """Whether its bytes on the device are those on the host; complex numbers cannot be cast."""
    is_whole_bytes = not dtype.name.startswith(("int2", "int4", "uint2", "uint4", "float4"))
    return is_whole_bytes and dtype.kind != "c"


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

_MOST_PROGRAMS = 1024
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

    def get(self, batch: _Batch) -> _Program | None:
        key = batch.device, batch.packs, tuple(batch.forms)
        try:
            return self._compiled[key]
        except KeyError:
            pass
        with self._lock:
            if key in self._compiled:
                return self._compiled[key]
            self._compiled[key] = None
            if len(self._compiled) > _MOST_PROGRAMS:
                del self._compiled[next(iter(self._compiled))]
        workers.compiling.submit(Task(lambda _: self._compile(key, batch), Handle[None]()))
        return None

    def _compile(self, key: Hashable, batch: _Batch) -> None:
        sharding = SingleDeviceSharding(batch.device)
        wanted = [jax.ShapeDtypeStruct(*form, sharding=sharding) for form in batch.forms]
        function = jax.jit(_pack if batch.packs else _copy)
        self._compiled[key] = function.lower(wanted).compile()


_programs = _Programs()


def _forget_all() -> None:
    """A forked child has none of its parent's threads; one of them may hold the lock."""
    global _programs  # noqa: PLW0603
    _programs = _Programs()


os.register_at_fork(after_in_child=_forget_all)
