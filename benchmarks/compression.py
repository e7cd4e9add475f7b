"""`compression`: the same weights plain, by zstd and by blosc: times, and what is left of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_CODECS = (None, "zstd", "blosc")
_DTYPES = (jnp.bfloat16, jnp.float32)
_SPREAD = 0.02  # of the weights: as models are initialized


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 256 MiB of weights as bfloat16 and as float32 (small: 8 MiB)."""
    size = (8 if small else 256) * _MIB
    states = {jnp.dtype(dtype).name: _weights(size, dtype) for dtype in _DTYPES}
    targets = []
    for dtype in states:
        blosc, zstd = f"blosc, {dtype}", f"zstd, {dtype}"
        targets += [
            Target.within(Figure(blosc, "left"), of=Figure(zstd, "left"), at_most=1),
            Target.faster(blosc, than=zstd, metric="save", at_least=1),
            Target.faster(blosc, than=zstd, metric="load"),
        ]
    return Scenario(
        name="compression",
        work=f"{size // _MIB} MiB of normally distributed weights of each dtype, on disk",
        contenders=tuple(
            Contender(f"{codec or 'plain'}, {dtype}", partial(_run, state, codec))
            for dtype, state in states.items()
            for codec in _CODECS
        ),
        targets=tuple(targets),
        touched_bytes=2 * size,
    )


def _weights(size: int, dtype: Any) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shape = (size // 16 // 1024 // jnp.dtype(dtype).itemsize, 1024)
    return {
        f"layer_{i}": jnp.asarray(_SPREAD * random.standard_normal(shape, np.float32), dtype)
        for i in range(16)
    }


def _run(state: dict[str, jax.Array], codec: str | None, path: Path) -> Metrics:
    options = fp.SaveOptions(compression=codec)
    save = by.seconds(lambda: fp.save(path, state, options=options))
    fp.finalize(path)
    load = by.seconds(lambda: fp.load(path, state))
    written = sum(file.stat().st_size for file in path.glob("state/part.*/data*"))
    size = sum(leaf.nbytes for leaf in state.values())
    return {
        "save": save,
        "load": load,
        "total": save + load,
        "left": written / size,
        "GB/s": size / save / 1e9,
        "load GB/s": size / load / 1e9,
    }
