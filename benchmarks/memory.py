"""`memory`: saving a state larger than what may be held of it, which is made a layer at a time.

Every contender runs in a fresh process, so that none finds memory that another has used and left.
Counted is what the process holds above its start, what the source itself makes included; the page
cache is not.

With its defaults glibc keeps freed arrays of up to 32 MiB for later use, in an arena for each few
threads. In one contender it gives them back at once, which shows how much of our figure that is.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MIB = 1 << 20
_MAX_INFLIGHT_BYTES = 64 * _MIB
_OURS_GIVEN_BACK = f"{by.OURS}, freed arrays given back"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(_MIB)}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 64 layers of 2 x 16 MiB, 2 GiB in all (small: 4 of 2 x 1 MiB)."""
    layers, size = (4, _MIB) if small else (64, 16 * _MIB)

    def run(way: str, path: Path, **options: Any) -> Metrics:
        return child.run(measure, way, layers, size, path, **options)

    return Scenario(
        name="memory",
        work=(
            f"{layers} layers of 2 x {size // _MIB} MiB float32, made and saved one after the "
            f"other, {_MAX_INFLIGHT_BYTES // _MIB} MiB in flight; whole where it must be"
        ),
        contenders=(
            Contender(by.OURS, partial(run, by.OURS), partial(_check, layers)),
            Contender(_OURS_GIVEN_BACK, partial(run, by.OURS, environment=_GIVE_BACK)),
            *(Contender(name, partial(run, name)) for name in (by.PARTIAL, by.WHOLE, by.PLAIN)),
        ),
        targets=(
            Target.below(Figure(by.OURS, "memory"), 160, "MiB", unit=_MIB),
            Target.within(Figure(by.OURS, "memory"), of=Figure(by.PARTIAL, "memory")),
            Target.within(Figure(by.OURS, "memory"), of=Figure(by.WHOLE, "memory")),
        ),
        touched_bytes=2 * layers * 2 * size,
        shown="memory",
    )


def _check(layers: int, path: Path) -> None:
    assert fp.verify(path).ok
    # What Orbax sees of it: to read it all would take what this scenario saves.
    assert len(ocp.metadata(path).metadata) == layers


def measure(way: str, count: int, size: int, path: str) -> Metrics:
    """Makes and saves `count` layers of two float32 arrays of `size` bytes.

    Returns:
      `total`: seconds. `memory`: growth of the resident memory at its peak, in bytes.
    """
    jax.block_until_ready(list(_layers(1, size)))  # compiles, and is dropped
    save = partial(_WAYS[way], _layers(count, size), Path(path))
    return measured(lambda: {"total": by.seconds(save)})


@functools.partial(jax.jit, static_argnums=1)
def _make_layer(number: int, size: int) -> dict[str, jax.Array]:
    values = jnp.arange(size // 4, dtype=jnp.float32).reshape(by.shape_of(size))
    return {"kernel": values + number, "moment": values * number}


def _layers(count: int, size: int) -> Iterator[by.Group]:
    for number in range(count):
        yield {f"layer_{number}": _make_layer(number, size)}


def _save_ours(layers: Iterable[by.Group], path: Path) -> None:
    options = fp.SaveOptions(max_inflight_bytes=_MAX_INFLIGHT_BYTES)
    for layer in layers:
        fp.save_async(path, layer, options=options)
    fp.finalize(path)


_WAYS: dict[str, Callable[[Iterable[by.Group], Path], object]] = {
    by.OURS: _save_ours,
    by.PARTIAL: by.save_orbax_partial,
    by.WHOLE: lambda layers, path: by.save_orbax_whole(list(layers), path),
    by.PLAIN: by.save_plainly,
}
