"""Memory that is read into is used again once it is free, and never before."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
import pytest
import trees
from things import stored

import flax_partial as fp
from flax_partial.loading import host_memory, verify
from flax_partial.loading import load as load_module
from flax_partial.loading.host_memory import HostMemory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIB = 1 << 20
BYTES = np.dtype(np.uint8)
STATE = {f"layer_{i}": np.full((4 * MIB + 8 * i) // 4, i, np.float32) for i in range(9)}


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to all memory that is mapped from here on."""
    found, real = [], host_memory._mapped  # noqa: SLF001

    def noted(size: int) -> Any:
        memory = real(size)
        found.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(host_memory, "_mapped", noted)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("host_memory") / "c"
    stored(where, STATE)
    return where


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_no_view_of_it_lives() -> None:
    memory = HostMemory()
    first = memory.empty((8 * MIB,), BYTES)
    at, view = address(first), first[::2].reshape(2, -1)
    del first
    other = memory.empty((8 * MIB,), BYTES)
    assert address(other) != at
    del view
    assert address(memory.empty((2, 2 * MIB), np.dtype(np.int16))) == at


@pytest.mark.parametrize(
    ("freed", "wanted", "is_used"),
    [(8, 8, True), (8, 7, True), (8, 6, False), (8, 9, False)],
)
def test_memory_that_is_used_again_is_about_as_large(
    freed: int, wanted: int, mapped: list[Any], *, is_used: bool
) -> None:
    memory = HostMemory()
    memory.empty((freed * MIB,), BYTES)
    kept = memory.empty((wanted * MIB,), BYTES)
    assert kept.nbytes == wanted * MIB
    assert (len(mapped) == 1) == is_used


def test_what_is_free_goes_before_more_is_mapped(mapped: list[Any]) -> None:
    """Memory of sizes that never come back is not kept."""
    memory = HostMemory()
    held = [memory.empty((size * MIB,), BYTES) for size in (7, 6, 5)]
    while held:
        held.pop()
    memory.empty((10 * MIB,), BYTES)
    assert [one() is not None for one in mapped] == [True, False, False, True]


def test_memory_goes_with_the_last_array_once_the_operation_is_over(mapped: list[Any]) -> None:
    memory = HostMemory()
    kept, dropped = (memory.empty((5 * MIB,), BYTES) for _ in range(2))
    del memory
    del dropped
    assert [one() is not None for one in mapped] == [True, False]
    kept[:] = 1  # it is there yet
    del kept
    assert [one() for one in mapped] == [None, None]


def test_threads_never_have_the_same_memory() -> None:
    memory = HostMemory()
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(50):
            array = memory.empty((4 * MIB + number,), BYTES)
            array[::4096] = number
            other = memory.empty((4 * MIB + turn,), BYTES)
            other[::4096] = 99
            if (array[::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


# As it is used.


def test_verify_reads_all_into_memory_of_one_batch(
    path: Path, mapped: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_VERIFIED_AT_ONCE_BYTES", 10 * MIB)  # two arrays
    assert fp.verify(path).ok
    assert len(mapped) <= 4


def test_what_is_kept_stays_what_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays in NumPy, arrays that a device has taken over, and converted ones, in small pieces."""
    monkeypatch.setattr(load_module.placing, "has_accelerator", lambda: True)
    monkeypatch.setattr(load_module, "_PIECE_BYTES", 5 * MIB)
    ways = [
        lambda one: one,
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype),
        lambda one: jax.ShapeDtypeStruct(one.shape, ml_dtypes.bfloat16),
    ]
    target = {name: ways[at % 3](STATE[name]) for at, name in enumerate(STATE)}
    loaded = fp.load(path, target, cast=True)
    gc.collect()
    for at, name in enumerate(STATE):
        assert (np.asarray(loaded[name], np.float32) == at).all()
    trees.assert_whole(path, STATE)


class _Accelerator:
    """Takes arrays when it is waited for; what stands for them holds the host's memory until then.

    Attributes:
      waiting: How many bytes it has yet to take.
      most: The most that these ever were.
    """

    def __init__(self) -> None:
        self.waiting = self.most = 0

    def put(self, values: Sequence[Any]) -> list[Any]:
        return [_OnTheWay(self, value.shards[0][0]) for value in values]


class _OnTheWay:
    def __init__(self, device: _Accelerator, data: np.ndarray) -> None:
        self._device, self._data, self.taken = device, data, data[:0]
        device.waiting += data.nbytes
        device.most = max(device.most, device.waiting)

    def block_until_ready(self) -> None:
        self.taken = self._data.copy()
        self._device.waiting -= self.taken.nbytes
        del self._data


def test_what_an_accelerator_has_yet_to_take_is_bounded(
    path: Path, mapped: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Accelerator()
    monkeypatch.setattr(load_module.placing, "has_accelerator", lambda: True)
    monkeypatch.setattr(load_module.placing, "put_on_devices", device.put)
    monkeypatch.setattr(load_module, "_PIECE_BYTES", 5 * MIB)
    loaded = fp.load(
        path, {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in STATE.items()}
    )
    pieces = 1 + load_module._MOST_ON_THE_WAY  # noqa: SLF001
    assert device.most <= pieces * 5 * MIB
    assert len(mapped) < len(STATE)
    for name in list(STATE)[: -pieces + 1]:  # the last ones have not been waited for
        np.testing.assert_array_equal(loaded[name].taken, STATE[name])
