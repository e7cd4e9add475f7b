"""Saves a state that is made a layer at a time, for the scenario `memory`.

Run as `python -m benchmarks.memory_process WAY LAYERS SIZE PATH`: so many layers of two float32
arrays of so many bytes. Prints what it measured, as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks.memory_use import peak_growth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.harness import Metrics

MAX_INFLIGHT_BYTES = 64 << 20


@functools.partial(jax.jit, static_argnums=1)
def _make_layer(number: int, size: int) -> dict[str, jax.Array]:
    values = jnp.arange(size // 4, dtype=jnp.float32).reshape(size // 4096, 1024)
    return {"kernel": values + number, "moment": values * number}


def _layers(count: int, size: int) -> Iterator[by.Group]:
    for number in range(count):
        yield {f"layer_{number}": _make_layer(number, size)}


def _save_ours(count: int, size: int, path: Path) -> None:
    options = fp.SaveOptions(max_inflight_bytes=MAX_INFLIGHT_BYTES)
    for layer in _layers(count, size):
        fp.save_async(path, layer, options=options)
    fp.finalize(path)


def _save_orbax_partial(count: int, size: int, path: Path) -> None:
    for layer in _layers(count, size):
        ocp.partial.save(path, layer)
    ocp.partial.finalize(path)


def _save_orbax_whole(count: int, size: int, path: Path) -> None:
    ocp.save(path, by.merged(list(_layers(count, size))))


def _save_plainly(count: int, size: int, path: Path) -> None:
    by.save_plainly(_layers(count, size), path)


_WAYS = {
    "ours": _save_ours,
    "orbax_partial": _save_orbax_partial,
    "orbax_whole": _save_orbax_whole,
    "plain": _save_plainly,
}


def _measure(way: str, count: int, size: int, path: Path) -> Metrics:
    jax.block_until_ready(list(_layers(1, size)))  # compiles, and is dropped
    with peak_growth() as growth:
        start = time.perf_counter()
        _WAYS[way](count, size, path)
        total = time.perf_counter() - start
    return {"total": total, "memory": growth.bytes}


def main() -> None:
    """Does what the command line says."""
    way, count, size, path = sys.argv[1:]
    print(json.dumps(_measure(way, int(count), int(size), Path(path))))


if __name__ == "__main__":
    main()
