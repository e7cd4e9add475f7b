"""Boxes wherever they are -> boxes in host memory that survive what the caller does next.

`copy` and `detach` make boxes the caller's no longer: after both, arrays may be donated, deleted or
written over. They wait for no computation. `move` brings copies from the devices to the host;
`to_host` gives the data. Both may wait.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from flax_partial.saving import device_copies
from flax_partial.saving.describe_leaf import Source
from flax_partial.saving.device_copies import (
    PINNED_HOST,
    Copied,
    Copy,
    Packed,
    is_out_of_memory,
    place_of,
)
from flax_partial.saving.device_room import Device, DeviceRoom, may_have_room

# A copy of a small ready array costs 2-20 us; a view would make a later donation copy instead.
_COPIED_BYTES = 64 * 1024

Held = Source | Copied
Boxes = Sequence[Sequence[Held]]
"""Of each leaf, the data of each box."""
_Described = Sequence[Sequence[Any]]  # boxes none of which was copied yet


def copying_devices(sources: Iterable[Sequence[Any]], *, limit: int | None) -> frozenset[Device]:
    """Finds the devices with some of the boxes on which copies may be made.

    Args:
      sources: The leaves' boxes.
      limit: Bytes that copies may take on a device; None for what training leaves.
    """
    devices = {
        place_of(source.sharding).device
        for boxes in sources
        for source in boxes
        if not isinstance(source, np.ndarray)
    }
    return frozenset(device for device in devices if may_have_room(device, limit=limit))


def arrays_on_each(
    sources: _Described, devices: frozenset[Device]
) -> Iterator[tuple[Device, int, list[jax.Array]]]:
    """Yields, for each of some devices, the position of the first leaf there, and all arrays."""
    found: dict[Device, tuple[int, list[jax.Array]]] = {}
    for at, boxes in enumerate(sources if devices else ()):
        for source in boxes:
            if isinstance(source, np.ndarray):
                continue
            device = place_of(source.sharding).device
            if device in devices:
                found.setdefault(device, (at, []))[1].append(source)
    for device, (first, arrays) in found.items():
        yield device, first, arrays


def copy(
    saves: Sequence[tuple[Hashable, _Described]], *, room: DeviceRoom, limit: int | None
) -> list[tuple[Boxes, Sequence[Copy]]]:
    """Copies arrays on their devices, as far as there is room, those of all saves at once.

    Args:
      saves: What holds the room of each save, and its leaves' boxes.
      room: What the devices have of it.
      limit: As in `copying_devices`.

    Returns:
      Of each save: the boxes, with copies in place of what was copied; the memory of those copies.
    """
    places = [
        [
            (at, number)
            for at, boxes in enumerate(sources)
            for number, source in enumerate(boxes)
            if not isinstance(source, np.ndarray)
        ]
        for _, sources in saves
    ]
    arrays = [
        (owner, [sources[at][number] for at, number in of_one])
        for (owner, sources), of_one in zip(saves, places, strict=True)
    ]
    done = device_copies.copy(arrays, room=room, limit=limit)
    return [
        (_replaced(sources, {of_one[at]: one for at, one in copied.items()}), copies)
        for (_, sources), of_one, (copied, copies) in zip(saves, places, done, strict=True)
    ]


def _replaced(sources: _Described, copied: dict[tuple[int, int], Copied]) -> Boxes:
    """The boxes, with copies in place of some."""
    ours: list[Sequence[Held]] = list(sources)
    for (at, number), one in copied.items():
        ours[at] = [*ours[at][:number], one, *ours[at][number + 1 :]]
    return ours


def move(
    copies: Sequence[Copy], *, owner: object, room: DeviceRoom, issued: Callable[[], None]
) -> None:
    """Transfers copies to the host, and gives back what they hold of the devices, one by one.

    A device may say only when a copy is waited for that it had no memory for it. The arrays
    themselves are read then, if they live and were not donated, and the device is asked for no
    copies any more.

    Args:
      copies: The copies; those whose transfer fails stay as they are.
      owner: Holds the room.
      room: Where it is given back.
      issued: Called once all transfers are issued: what has arrived can be read.
    """
    made = [one for one in copies if _is_made(one, room)]
    for one, array in zip(made, _transferred([one.array for one in made]), strict=True):
        one.on_device, one.array = one.array, array
    issued()
    for one in made:
        one.array.block_until_ready()
        copied, one.on_device = one.on_device, None
        if copied is not None:
            copied.delete()
        room.give_back(owner, one.device, one.size)


def _is_made(one: Copy, room: DeviceRoom) -> bool:
    """Waits until a copy is made; where it cannot be, has it read from the arrays themselves."""
    try:
        one.array.block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):  # of the computation: the save has that error
            return False
        room.close(one.device)
        data = one.read_originals()
        if data is None:
            one.is_lost = True
        else:
            array = data.view(one.array.dtype).reshape(one.array.shape)
            one.array = jax.device_put(array, _pinned_host(one.array.sharding))
        return False
    return True


def detach(
    sources: Iterable[Sequence[Held]], *, caller_waits: bool = False
) -> list[Sequence[Held]]:
    """Makes boxes that were not copied safe from donation, deletion and overwriting.

    Small arrays that are ready are copied. On a CPU, a large one that is ready is viewed, which is
    free, and makes a donation copy that comes while it exists. Everything else is transferred to
    pinned host memory, a true copy that is issued at once and done when the array is computed.

    Args:
      sources: The leaves' boxes.
      caller_waits: Whether the caller leaves them as they are until they are written: then what is
        in the host's memory is not copied.
    """
    detached: list[Sequence[Held]] = []
    transfers: list[tuple[list[Any], int]] = []
    for boxes in sources:
        ours: list[Any] = []
        for source in boxes:
            if isinstance(source, np.ndarray):
                ours.append(source if caller_waits else source.copy(order="C"))
            elif isinstance(source, (Packed, Copy)):
                ours.append(source)
            elif _taken_on_host(source):
                view = np.asarray(source)
                is_copied = view.nbytes <= _COPIED_BYTES and not caller_waits
                ours.append(view.copy() if is_copied else view)
            else:
                transfers.append((ours, len(ours)))
                ours.append(source)
        detached.append(ours)
    copies = _transferred([ours[at] for ours, at in transfers])
    for (ours, at), copied in zip(transfers, copies, strict=True):
        ours[at] = copied
    return detached


def _taken_on_host(source: jax.Array) -> bool:
    """Whether NumPy can take the array without waiting for a computation or a transfer."""
    place = place_of(source.sharding)
    return not place.has_pinned_host or (place.is_cpu and _is_ready(source))


def _transferred(sources: list[Any]) -> list[jax.Array]:
    if not sources:
        return []
    targets = [_pinned_host(source.sharding) for source in sources]
    # An array that is in pinned memory already would otherwise be passed on as it is.
    return list(jax.device_put(sources, targets, may_alias=False))


@lru_cache(maxsize=1024)
def _pinned_host(sharding: Sharding) -> SingleDeviceSharding:
    (device,) = sharding.device_set
    return SingleDeviceSharding(device, memory_kind=PINNED_HOST)


def is_computed(sources: Boxes) -> bool:
    """Whether `wait_until_computed` would not wait."""
    try:
        return all(map(_is_ready, _arrays(sources)))
    except RuntimeError:  # of the computation, or the device: waiting raises it
        return True


def wait_until_computed(sources: Boxes, *, first: bool = False) -> None:
    """Waits until arrays are computed and, if they are in pinned host memory, transferred.

    Args:
      sources: The leaves' boxes.
      first: Whether to wait for the first one only: a step's arrays are computed all at once, and
        transferred one after the other.
    """
    for array in _arrays(sources):
        if not _is_ready(array):  # asking takes half the time of waiting for nothing
            array.block_until_ready()
        if first:
            return


def _arrays(sources: Boxes) -> Iterator[jax.Array]:
    last: Copy | None = None  # of the packed ones, which follow one another
    for boxes in sources:
        for source in boxes:
            if isinstance(source, np.ndarray):
                continue
            if isinstance(source, Packed):
                if source.copy is not last:
                    yield source.copy.array
                last = source.copy
            else:
                yield source.array if isinstance(source, Copy) else source


def _is_ready(array: jax.Array) -> bool:
    is_ready: bool = array.is_ready()  # type: ignore[attr-defined] # of every concrete array
    return is_ready


def to_host(source: Held) -> np.ndarray:
    """Returns a box's data in C order; waits until it is computed and transferred."""
    if isinstance(source, (Packed, Copy)):
        return source.to_host()
    return np.asarray(source, order="C")


class OnTheWay:
    """The data of a leaf's boxes, each of which is waited for when it is first come to."""

    __slots__ = ("_sources",)

    def __init__(self, sources: Sequence[Held]) -> None:
        self._sources = [to_host(one) if isinstance(one, np.ndarray) else one for one in sources]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the data of each box, in C order."""
        for at, source in enumerate(self._sources):
            if not isinstance(source, np.ndarray):
                self._sources[at] = data = to_host(source)
                yield data
            else:
                yield source
