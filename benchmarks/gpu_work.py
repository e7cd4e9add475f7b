"""A state on this machine's accelerators, steps that donate it, and what saving costs them."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_partial as fp
from flax_partial.sessions import workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.harness import Metrics

Tree = Any

_STEPS = 8
_PIECE_BYTES = 64 << 20


class Work:
    """Square float32 matrices, a layer each, and a step that donates them.

    Attributes:
      state: The matrices, each spread over all local devices along its rows. A step needs nothing
        of other devices, so that it takes as long on each.
      bytes: Their size.
      target: What `load` is given to have them as they are.
    """

    def __init__(self, layers: int, side: int, *, products: int = 2) -> None:
        sharding = _sharding(PartitionSpec("devices"))
        make = jax.jit(partial(jax.random.normal, shape=(side, side)), out_shardings=sharding)
        keys = jax.random.split(jax.random.key(0), layers)
        self.state: Tree = {f"layer_{i:03d}": {"w": make(key)} for i, key in enumerate(keys)}
        self.bytes = layers * side * side * 4
        self.target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state
        )
        self._step = jax.jit(partial(_trained, products), donate_argnums=0)
        self._weights = jax.device_put(jnp.full((side, side), 1 / side), _sharding(PartitionSpec()))
        self.step_secs(2)

    def dispatch(self) -> None:
        """Has the devices do a step."""
        self.state = self._step(self.state, self._weights)

    def step_secs(self, count: int) -> list[float]:
        """Trains for some steps; returns how long each took, in seconds."""
        secs = []
        for _ in range(count):
            start = time.perf_counter()
            self.dispatch()
            jax.block_until_ready(self.state)
            secs.append(time.perf_counter() - start)
        return secs

    def saved(
        self, save: Callable[..., list[Any]], path: Path, *, finalize: bool = True
    ) -> Metrics:
        """Saves the state while training goes on, and loads and checks it afterwards.

        Args:
          save: Given a path and the state, begins to save; returns a handle for each call.
          path: Where.
          finalize: Whether `flax_partial` wrote it, and has to finalize it; else Orbax did.

        Returns:
          `blocked`: seconds in the calls; `call`: in each of them. `first step`: by how many it was
          late. `delay`: those that the calls and all late steps took from training; `delay/GB`:
          for each 10^9 bytes. `total`: from the first call until all is finalized. `GB/s`, and
          `load GB/s` onto the devices.

        Raises:
          ValueError: What was loaded is not what was saved.
        """
        alone = self.step_secs(_STEPS)
        expected = jax.device_get(_sums(self.state))
        gigabytes = self.bytes / 1e9
        start = time.perf_counter()
        handles = save(path, self.state)
        blocked = time.perf_counter() - start
        secs = self.step_secs(_STEPS)
        for handle in handles:
            handle.result()
        if finalize:
            fp.finalize(path)
        total = time.perf_counter() - start
        delay = blocked + sum(secs) - sum(alone)
        start = time.perf_counter()
        load = fp.load if finalize else ocp.load
        back = jax.block_until_ready(load(path, self.target))
        load_secs = time.perf_counter() - start
        found = jax.device_get(_sums(back))
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected))):
            raise ValueError(f"{path} does not hold what was saved")
        return {
            "blocked": blocked,
            "call": blocked / len(handles),
            "first step": secs[0] - statistics.median(alone),
            "delay": delay,
            "delay/GB": delay / gigabytes,
            "total": total,
            "GB/s": gigabytes / total,
            "load GB/s": gigabytes / load_secs,
        }


def _sharding(spec: PartitionSpec) -> Any:
    devices = jax.local_devices()
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), ("devices",)), spec)


def _trained(products: int, state: Tree, weights: jax.Array) -> Tree:
    def one(a: jax.Array) -> jax.Array:
        b = jax.lax.fori_loop(0, products, lambda _, b: jnp.tanh(b @ weights), a)
        return a + b * 1e-3

    return jax.tree.map(one, state)


@jax.jit
def _sums(state: Tree) -> Tree:
    """Sums of all bits, row by row of each array."""
    return jax.tree.map(
        lambda a: jax.lax.bitcast_convert_type(a, jnp.uint32).sum(axis=1, dtype=jnp.uint32), state
    )


@contextlib.contextmanager
def writers(count: int) -> Iterator[None]:
    """Has as many threads write saves, and help to, as a machine with more or fewer cores has."""
    usual = workers.MOST_WRITERS
    _set_writers(count)
    try:
        yield
    finally:
        _set_writers(usual)


def _set_writers(count: int) -> None:
    workers.MOST_WRITERS = count
    for pool in (workers.saving, workers.helping):
        pool._most = count  # noqa: SLF001 - no user has a reason to set it
        pool.release_idle()


def whole(path: Path, state: Tree, *, options: fp.SaveOptions | None = None) -> list[Any]:
    """Begins to save everything in one call."""
    return [fp.save_async(path, state, options=options)]


def by_layer(path: Path, state: Tree, *, options: fp.SaveOptions | None = None) -> list[Any]:
    """Begins to save each layer by a call of its own."""
    return [fp.save_async(path, {name: one}, options=options) for name, one in state.items()]


def together(path: Path, state: Tree, *, options: fp.SaveOptions | None = None) -> list[Any]:
    """Begins to save each layer, all by one call."""
    layers = [{name: one} for name, one in state.items()]
    return [*fp.save_each_async(path, layers, options=options)]


def by_orbax(path: Path, state: Tree) -> list[Any]:
    """Begins to save everything in one call of Orbax."""
    return [ocp.save_async(path, state)]


def copied(state: Tree) -> Metrics:
    """Copies the state on its devices."""
    arrays = jax.tree.leaves(state)
    jax.block_until_ready(_copy(arrays))
    start = time.perf_counter()
    jax.block_until_ready(_copy(arrays))
    return {"total": time.perf_counter() - start}


@jax.jit
def _copy(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def fetched(arrays: Sequence[jax.Array]) -> Metrics:
    """Copies arrays to pinned host memory, all of them issued at once."""
    shardings = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
    start = time.perf_counter()
    copies = jax.device_put(list(arrays), shardings, may_alias=False)
    issued = time.perf_counter() - start
    jax.block_until_ready(copies)
    return {"blocked": issued, "total": time.perf_counter() - start}


def sent(arrays: Sequence[jax.Array]) -> Metrics:
    """Copies arrays from pinned host memory to their devices."""
    shardings = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
    pinned = jax.block_until_ready(jax.device_put(list(arrays), shardings, may_alias=False))
    start = time.perf_counter()
    jax.block_until_ready(jax.device_put(pinned, [array.sharding for array in arrays]))
    return {"total": time.perf_counter() - start}


def small_leaves(count: int) -> Tree:
    """Arrays of 4 KiB each, on the default device."""
    return {f"leaf_{i:04d}": jnp.full((1024,), i, jnp.float32) for i in range(count)}


def optimizer_state(layers: int) -> Tree:
    """Layers of ten leaves of mixed sizes and types, from a counter to half a MiB."""
    shapes = [((), jnp.int32), ((768,), jnp.bfloat16), *[((1536,), jnp.float32)] * 4]
    shapes += [
        ((96, 96), jnp.float32),
        ((256, 256), jnp.bfloat16),
        *[((256, 512), jnp.float32)] * 2,
    ]
    return {
        f"layer_{i:03d}": {
            f"leaf_{j}": jnp.full(shape, i % 99, dtype) for j, (shape, dtype) in enumerate(shapes)
        }
        for i in range(layers)
    }


def write_by_threads(
    data: Sequence[memoryview], threads: int, directory: Path, *, direct: bool
) -> Metrics:
    """Writes data, a file from each thread, in pieces of 64 MiB at most; durable."""
    directory.mkdir()

    def write(number: int) -> None:
        _write_file(directory / str(number), data[number::threads], direct=direct)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    secs = time.perf_counter() - start
    return {"total": secs, "GB/s": sum(map(len, data)) / secs / 1e9}


def host_pages(arrays: Sequence[jax.Array]) -> list[memoryview]:
    """Transfers arrays to where saves do, and returns the whole pages that they lie in.

    A disk takes more from memory that fits into the processor's cache, or lies in one piece.
    """
    shardings = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
    found = []
    for array in jax.device_put(list(arrays), shardings, may_alias=False):
        data = np.asarray(array).reshape(-1).view(np.uint8)
        first = -data.__array_interface__["data"][0] % mmap.PAGESIZE
        size = (data.size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        found.append(data[first : first + size].data)
    return found


def _write_file(path: Path, data: Sequence[memoryview], *, direct: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | (getattr(os, "O_DIRECT", 0) if direct else 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        for piece in data:
            left = piece
            while left:
                left = left[os.write(descriptor, left[:_PIECE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_pages(path: Path) -> None:
    """Drops the files below `path` from the page cache, where the system supports it."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
