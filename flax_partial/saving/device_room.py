"""How much of each device's memory copies of what is saved may take.

A training step needs as much as it has used at most before. What a device has beyond that, less a
reserve, is free for copies: as soon as two whole steps have been seen, and where the device reports
its memory.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

Device = Any  # a jax.Device
_WHOLE_STEPS = 2
_RESERVE_SHARE = 16  # of the limit: memory in pieces, and steps that differ a little
_MOST_SAVES = 4096  # by which steps are counted


@dataclass(slots=True)
class _Saved:
    """How leaves were saved last, and how many steps have gone by since they first were."""

    session: "weakref.ref[Any]"
    arrays: "list[weakref.ref[Any]]"
    steps: int = 0

    def holds(self, arrays: Sequence[object]) -> bool:
        """Whether these very arrays were saved last."""
        if len(arrays) != len(self.arrays):
            return False
        return all(one() is array for one, array in zip(self.arrays, arrays, strict=True))


@dataclass(slots=True)
class _OnDevice:
    """One device's memory, in bytes.

    Attributes:
      held: What copies take of it, by their owners.
      total: The sum of that.
      most: The most that this was since the device was asked last.
      peak: The most that was in use without copies; None until whole steps have been seen.
      seen: The most that was in use with them, as far as the device was asked.
      saved: The leaves that were saved from it, by the name of the first of a save.
      has_seen_steps: Whether whole steps have been seen.
      has_failed: Whether it had no memory for a copy that it had room for.
    """

    held: dict[Hashable, int] = field(default_factory=dict)
    total: int = 0
    most: int = 0
    peak: int | None = None
    seen: int = 0
    saved: OrderedDict[Hashable, _Saved] = field(default_factory=OrderedDict)
    has_seen_steps: bool = False
    has_failed: bool = False


class DeviceRoom:
    """Memory of this process's devices that copies hold; nothing waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, for an instant at a time
        self._devices: dict[Device, _OnDevice] = {}

    def note_save(
        self, device: Device, name: Hashable, *, session: object, arrays: Sequence[object]
    ) -> None:
        """Records that leaves are saved from a device: steps are counted by that.

        A step lies between two saves of them if some are different arrays, as not all need be
        trained, and if they go into different checkpoints.

        Args:
          device: The device.
          name: Identifies the first of them in the process; the same in each checkpoint of a run.
          session: Stands for the checkpoint; held weakly, as are the arrays.
          arrays: What they are now.
        """
        with self._lock:
            known = self._devices.setdefault(device, _OnDevice())
            saved = known.saved.get(name)
            if saved is None:
                known.saved[name] = _Saved(weakref.ref(session), [*map(weakref.ref, arrays)])
                if len(known.saved) > _MOST_SAVES:
                    known.saved.popitem(last=False)
            elif saved.session() is not session and not saved.holds(arrays):
                saved.session, saved.arrays = weakref.ref(session), [*map(weakref.ref, arrays)]
                saved.steps += 1
                if saved.steps >= _WHOLE_STEPS:
                    known.has_seen_steps = True
                    known.saved.clear()

    def has_seen_steps(self, device: Device) -> bool:
        """Whether as many whole steps were seen as its peak has to count."""
        known = self._devices.get(device)
        return known is not None and known.has_seen_steps

    def most(self, device: Device, *, limit: int | None) -> int:
        """What all copies on a device may take, in bytes; asks it, which takes long.

        Args:
          device: The device.
          limit: What they may take, if it is given; None for what training leaves.
        """
        if limit is not None:
            return limit
        with self._lock:
            return _room_beside_training(device, self._devices.setdefault(device, _OnDevice()))

    def take(self, sizes: Sequence[tuple[Hashable, int]], device: Device, *, most: int) -> bool:
        """Takes memory for copies, if there is room for all of them; returns whether.

        Args:
          sizes: What holds some of it until it is given back, and how much, in bytes.
          device: The device.
          most: What all copies on it may take, in bytes.
        """
        size = sum(size for _, size in sizes)
        with self._lock:
            known = self._devices.setdefault(device, _OnDevice())
            if known.has_failed or known.total + size > most:
                return False
            for owner, part in sizes:
                known.held[owner] = known.held.get(owner, 0) + part
            known.total += size
            known.most = max(known.most, known.total)
            return True

    def close(self, device: Device) -> None:
        """Grants nothing on a device any more: it turned out to have no memory for a copy."""
        with self._lock:
            self._devices.setdefault(device, _OnDevice()).has_failed = True

    def give_back(self, owner: Hashable, device: Device, size: int) -> None:
        """Gives back some of what an owner holds on a device, unless all was given back."""
        with self._lock:
            known = self._devices[device]
            if owner in known.held:
                known.held[owner] -= size
                known.total -= size

    def release(self, owner: Hashable) -> None:
        """Gives back all that an owner holds, if anything."""
        with self._lock:
            for known in self._devices.values():
                known.total -= known.held.pop(owner, 0)

    def held(self, device: Device) -> int:
        """What copies take of a device's memory, in bytes."""
        with self._lock:
            known = self._devices.get(device)
            return 0 if known is None else known.total


def may_have_room(device: Device, *, limit: int | None) -> bool:
    """Whether copies may ever be made on a device."""
    return bool(limit) if limit is not None else _tells(device)


def _room_beside_training(device: Device, known: _OnDevice) -> int:
    """What the device has left where it was fullest, in bytes.

    Its peak counts our own copies, too. As long as it can be explained by what training took before
    there were any, and by the most that they held while it rose, training is taken to need no more
    than then.
    """
    stats = _stats(device) if known.has_seen_steps else None
    if stats is None:
        return 0
    limit, peak = stats
    if known.peak is None or peak > max(known.seen, known.peak + known.most):
        known.peak = peak
    known.seen, known.most = peak, known.total
    return limit - known.peak - limit // _RESERVE_SHARE


@lru_cache(maxsize=1024)
def _tells(device: Device) -> bool:
    """Whether a device reports its memory; the query takes longer than all else in a call."""
    return _stats(device) is not None


def _stats(device: Device) -> tuple[int, int] | None:
    """The limit of a device's memory and the most that was in use, in bytes, if it reports them."""
    try:
        stats = device.memory_stats() or {}
    except Exception:  # noqa: BLE001 - of a platform that does not have the query
        return None
    limit, peak = stats.get("bytes_limit"), stats.get("peak_bytes_in_use")
    return (limit, peak) if limit and peak is not None else None
