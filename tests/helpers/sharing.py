"""What processes of `cluster` do with arrays that several of them hold replicas of."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from things import assert_sharded, counted, one_step, targets

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

SHARED = fp.SaveOptions(durable=False, chunk_bytes=64 << 10, share_replicas=True)
P = PartitionSpec
_SMALL = {f"small_{i}": ((64,), P()) for i in range(40)}
_LARGE = {
    "kernel": ((512, 384), P()),
    "embed": ((5003, 96), P()),  # of a prime number of rows
    "wide": ((3, 60_000), P()),
}
_HALVES = {
    "kernel": ((512, 384), P(None, "model")),
    "embed": ((5004, 96), P("model")),
    "both": ((640, 256), P("data", "model")),
}
# Mesh over "data" and "model", with two devices in each of four processes; arrays.
LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, tuple[tuple[int, ...], PartitionSpec]]]] = {
    "replicated": ((8, 1), _LARGE | _SMALL),
    "data x model": ((4, 2), _HALVES),
    "data x model over processes": ((2, 4), _HALVES),
    "even": ((4, 2), {"w": ((4096, 256), P()), "v": ((2048, 512), P(None, "model"))}),
    "mixed": ((4, 2), {f"{name}_": array for name, array in _HALVES.items()} | _LARGE | _SMALL),
}


def values(layout: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(21)
    shapes = {name: shape for name, (shape, _) in LAYOUTS[layout][1].items()}
    return {name: random.random(shape, np.float32) for name, shape in shapes.items()}


def _shardings(layout: str, mesh_shape: Sequence[int]) -> dict[str, NamedSharding]:
    devices = np.array(jax.devices()[: math.prod(mesh_shape)]).reshape(mesh_shape)
    mesh = Mesh(devices, ("data", "model"))
    return {name: NamedSharding(mesh, spec) for name, (_, spec) in LAYOUTS[layout][1].items()}


def _arrays(layout: str) -> dict[str, jax.Array]:
    """Global arrays, still being computed."""
    shardings = _shardings(layout, LAYOUTS[layout][0])
    whole = values(layout)
    return {
        name: _twice(jax.make_array_from_callback(value.shape, shardings[name], value.__getitem__))
        for name, value in whole.items()
    }


_twice = jax.jit(lambda x: 2 * x)
_gone = functools.partial(jax.jit, donate_argnums=0)(
    lambda tree: jax.tree.map(lambda x: 0 * x, tree)
)


def save_shared(
    path: Path, layout: str, *, is_async: bool = False, only: Sequence[str] = (), **options: Any
) -> int:
    """Saves arrays of a layout, some of them only; returns how many bytes this process wrote."""
    arrays = {name: array for name, array in _arrays(layout).items() if not only or name in only}
    options = {"options": SHARED} | options
    if not is_async:
        return fp.save(path, arrays, **options).bytes
    handle = fp.save_async(path, arrays, **options)
    jax.block_until_ready(_gone(arrays))
    return handle.result().bytes


def load_shared(path: Path, layout: str, mesh_shape: Sequence[int]) -> None:
    """Loads onto a mesh of this job, and compares what this process holds."""
    shardings, wanted = _shardings(layout, mesh_shape), values(layout)
    loaded = fp.load(path, targets(wanted, shardings))
    for name, value in wanted.items():
        assert_sharded(loaded[name], shardings[name], 2 * value)


def load_sharing_reads(path: Path, layout: str) -> int:
    """Loads by shares that are handed on; returns how many bytes this process has read."""
    shardings, wanted = _shardings(layout, LAYOUTS[layout][0]), values(layout)
    target = targets(wanted, shardings)
    loaded, read = counted(lambda: fp.load(path, target, share_reads=True))
    for name, value in wanted.items():
        assert_sharded(loaded[name], shardings[name], 2 * value)
    return read


def train_shared(directory: Path, layout: str, **options: Any) -> tuple[int, tuple[str, ...]]:
    """A step with the callback, whose state is donated; the bytes and groups of this process."""
    callback = PartialCheckpointCallback(
        directory,
        finalizer=FinalizeHook(timeout_secs=20),
        **{"options": fp.SaveOptions(durable=False), **options},
    )
    one_step(callback, {"params": _arrays(layout)}, lambda x: jax.block_until_ready(_gone(x)))
    (report,) = callback.reports
    return sum(save.bytes for save in report.saves.values()), report.groups
