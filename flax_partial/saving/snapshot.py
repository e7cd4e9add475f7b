"""Boxes wherever they are -> boxes in host memory that survive what the caller does next.

`detach` makes boxes the caller's no longer: after it, arrays may be donated, deleted or written
over. It waits for no computation. `to_host` gives the data, and may wait.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from flax_partial.saving.describe import Source

# A copy of a small ready array costs 2-20 us; a view would make a later donation copy instead.
_COPIED_BYTES = 64 * 1024
_PINNED_HOST = "pinned_host"


def detach(sources: Sequence[Sequence[Source]]) -> list[Sequence[Source]]:
    """Makes boxes safe from donation, deletion and overwriting, without waiting for them.

    Small arrays that are ready are copied. On a CPU, a large one that is ready is viewed, which is
    free, and makes a donation that comes while it lives copy. Everything else is transferred to
    pinned host memory, a true copy that is issued at once and done when the array is computed.
    """
    detached: list[Sequence[Source]] = []
    transfers: list[tuple[list[Any], int]] = []
    for boxes in sources:
        ours: list[Any] = []
        for source in boxes:
            if isinstance(source, np.ndarray):
                ours.append(source.copy(order="C"))
            elif _taken_on_host(source):
                view = np.asarray(source)
                ours.append(view.copy() if view.nbytes <= _COPIED_BYTES else view)
            else:
                transfers.append((ours, len(ours)))
                ours.append(source)
        detached.append(ours)
    copies = _transferred([ours[at] for ours, at in transfers])
    for (ours, at), copy in zip(transfers, copies, strict=True):
        ours[at] = copy
    return detached


def _taken_on_host(source: jax.Array) -> bool:
    """Whether NumPy can take the array without waiting for a computation or a transfer."""
    is_cpu, has_pinned_host = _memory_of(source.sharding)
    return not has_pinned_host or (is_cpu and _is_ready(source))


@lru_cache(maxsize=1024)
def _memory_of(sharding: Sharding) -> tuple[bool, bool]:
    """Whether its one device is a CPU, and whether that device has pinned host memory."""
    device: Any
    (device,) = sharding.device_set
    kinds = [memory.kind for memory in device.addressable_memories()]
    return device.platform == "cpu", _PINNED_HOST in kinds


def _transferred(sources: list[Any]) -> list[jax.Array]:
    if not sources:
        return []
    targets = [_pinned_host(source.sharding) for source in sources]
    # An array that lives in pinned memory already would otherwise be passed on as it is.
    return list(jax.device_put(sources, targets, may_alias=False))


@lru_cache(maxsize=1024)
def _pinned_host(sharding: Sharding) -> SingleDeviceSharding:
    (device,) = sharding.device_set
    return SingleDeviceSharding(device, memory_kind=_PINNED_HOST)


def is_computed(sources: Sequence[Sequence[Source]]) -> bool:
    """Whether `wait_until_computed` would not wait."""
    try:
        return all(map(_is_ready, _arrays(sources)))
    except RuntimeError:  # of the computation, or the device: waiting raises it
        return True


def wait_until_computed(sources: Sequence[Sequence[Source]]) -> None:
    """Waits until all arrays are computed and, if they are in pinned host memory, transferred."""
    for array in _arrays(sources):
        if not _is_ready(array):  # asking takes half the time of waiting for nothing
            array.block_until_ready()


def _arrays(sources: Sequence[Sequence[Source]]) -> list[jax.Array]:
    return [source for boxes in sources for source in boxes if not isinstance(source, np.ndarray)]


def _is_ready(array: jax.Array) -> bool:
    is_ready: bool = array.is_ready()  # type: ignore[attr-defined] # of every concrete array
    return is_ready


def to_host(source: Source) -> np.ndarray:
    """Returns a box's data in C order; waits until it is computed and transferred."""
    return np.asarray(source, order="C")
