"""Host memory for what is read: the same again, once nothing refers to what was read into it.

To touch new memory takes longer than to read into it: two threads read 10 GB/s of the page cache
into memory that was used before, and 2.7 into new memory. What goes through in batches, to an
accelerator or to be checked, is therefore read into the same memory. An array that is kept, or that
a device of the CPU has taken over, keeps its memory.
"""

import math
import mmap
import threading
import weakref
from collections import deque

import numpy as np

from flax_partial.format.chunks import Shape

_ALIGNED_BYTES = 64  # alignment of memory that JAX's CPU devices take over
_MAPPED_BYTES = 4 << 20  # smaller memory the C library uses again
_LEAST_USE = 7 / 8  # of memory that is used again, so that an array that is kept keeps little else


class HostMemory:
    """Hands out memory for arrays, and takes it back where it is free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []  # the one that has been free for longest first
        self._returned: deque[mmap.mmap] = deque()  # without the lock, by whatever frees an array

    def empty(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """Returns memory as an array, nothing written, that a CPU device can take over."""
        size = math.prod(shape) * dtype.itemsize
        if size < _MAPPED_BYTES:
            return aligned_empty(shape, dtype)
        mapped = self._take(size) or _mapped(size)
        memory = np.frombuffer(mapped, np.uint8)  # what all views of it refer to
        weakref.finalize(memory, _give_back, weakref.ref(self), mapped).atexit = False
        return memory[:size].view(dtype).reshape(shape)

    def _take(self, size: int) -> mmap.mmap | None:
        """Takes free memory that fits; if there is none, frees as much as will be needed anew."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fitting = [one for one in self._free if _LEAST_USE * len(one) <= size <= len(one)]
            if fitting:
                found = min(fitting, key=len)
                self._free.remove(found)
                return found
            while self._free and size > 0:
                size -= len(self._free.pop(0))
        return None


def _give_back(memory: "weakref.ref[HostMemory]", mapped: mmap.mmap) -> None:
    owner = memory()
    if owner is not None:
        owner._returned.append(mapped)  # noqa: SLF001


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns new memory that a CPU device can take over: as an array, nothing written."""
    size = math.prod(shape) * dtype.itemsize
    if size >= _MAPPED_BYTES:
        return np.frombuffer(_mapped(size), np.uint8)[:size].view(dtype).reshape(shape)
    memory = np.empty(size + _ALIGNED_BYTES, np.uint8)
    first = -memory.__array_interface__["data"][0] % _ALIGNED_BYTES
    return memory[first : first + size].view(dtype).reshape(shape)


def _mapped(size: int) -> mmap.mmap:
    """Maps new memory, as `mmap` does by itself: without huge pages, which NumPy requests.

    Where memory is in pieces they have to be made first, and where a virtual machine gives free
    memory back to its host it is whole huge pages that it gives: 1 GiB then took 0.8 to 1.0 s
    instead of 0.35.
    """
    size += -size % mmap.PAGESIZE
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
