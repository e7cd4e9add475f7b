"""`call`: for how long one `save_async` holds the thread that calls it.

Each call saves new arrays, which have no host copy yet, and the next call waits until that save
has ended. Where writers are busy, two saves of 16 MiB each are started just before the call. The
tree of small leaves is saved to a new checkpoint each time, as in a training loop; its first call,
for which nothing can be cached, is reported apart. Each contender runs in a fresh process, after
three calls with other arrays to warm up.
"""

from __future__ import annotations

import statistics
import time
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
    from collections.abc import Callable

_MIB = 1 << 20
_READY = f"{by.OURS}, 1 MiB"
_BUSY = f"{by.OURS}, 1 MiB, writers busy"
_COMPUTING = f"{by.OURS}, 1 MiB, not computed"
_ORBAX = "Orbax v1, async, 1 MiB"
_LARGE_BYTES = 16 * _MIB
_WIDTH = 512  # of a square float32 matrix of 1 MiB
_PRODUCTS = 40
_WARM_UP_CALLS = 3


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 200 calls of 1 MiB, 30 of 2,000 leaves (small: 3, and 3 of 100)."""
    calls, trees, leaves = (3, 3, 100) if small else (200, 30, 2_000)
    tree = f"{by.OURS}, {leaves:,} leaves"
    return Scenario(
        name="call",
        work=(
            f"{calls} calls of save_async with 1 MiB of float32; {trees} with a tree of "
            f"{leaves:,} leaves of 64 float32, each into a new checkpoint"
        ),
        contenders=(
            *(Contender(way, partial(child.run, measure_arrays, way, calls)) for way in _WAYS),
            Contender(tree, partial(child.run, measure_trees, trees, leaves)),
        ),
        targets=(
            *(
                Target.below(Figure(way, metric), at_most, "ms", unit=1e-3)
                for way in (_READY, _BUSY)
                for metric, at_most in (("median", 0.15), ("95 %", 0.5))
            ),
            Target.below(Figure(tree, "later/leaf"), 5, "us", unit=1e-6),
            Target.faster(_READY, than=_ORBAX, metric="median"),
        ),
        shown="median",
    )


def measure_arrays(way: str, calls: int, path: str) -> Metrics:
    """Saves one array of 1 MiB in each of `calls` calls.

    Returns:
      `median`, `95 %`: of the calls, in seconds. `memory`: growth of the resident memory at its
      peak, in bytes.
    """
    call = _WAYS[way]
    for number in range(_WARM_UP_CALLS):
        call(Path(f"{path}.warm_up"), number)
    metrics = measured(lambda: _quantiles([call(Path(path), number) for number in range(calls)]))
    if way != _ORBAX:
        fp.finalize(path)
        assert len(fp.metadata(path).leaves) >= calls
    return metrics


def measure_trees(calls: int, leaves: int, path: str) -> Metrics:
    """Saves a tree of small leaves in each of `calls` calls, each to a checkpoint of its own.

    Returns:
      As `measure_arrays`, of the calls after the first; and by leaf, in seconds, `first/leaf`,
      `later/leaf` (the median) and `later/leaf 95 %`.
    """
    for number in range(_WARM_UP_CALLS):
        _WAYS[_READY](Path(f"{path}.warm_up"), number)
    return measured(partial(_measure_trees, calls, leaves, Path(path)))


def _measure_trees(calls: int, leaves: int, path: Path) -> Metrics:
    secs = []
    for number in range(calls):
        (tree,) = by.make_groups(1, leaves=leaves, shape=(64,))
        secs.append(_call(partial(fp.save_async, path / str(number), tree)))
        fp.finalize(path / str(number))
    first, *later = secs
    metrics = _quantiles(later)
    return {
        **metrics,
        "first/leaf": first / leaves,
        "later/leaf": metrics["median"] / leaves,
        "later/leaf 95 %": metrics["95 %"] / leaves,
    }


def _quantiles(secs: list[float]) -> Metrics:
    *_, last = statistics.quantiles(secs, n=20, method="inclusive")
    return {"median": statistics.median(secs), "95 %": last}


def _call(save: Callable[[], Any]) -> float:
    """Returns for how long `save` holds this thread, in seconds; waits until the save has ended."""
    start = time.perf_counter()
    handle = save()
    secs = time.perf_counter() - start
    handle.result()
    return secs


def _new_array(number: int, size: int = _MIB) -> jax.Array:
    return jnp.full(by.shape_of(size), number, jnp.float32).block_until_ready()


@jax.jit
def _products(number: int) -> jax.Array:
    """Takes some milliseconds, so that it is still being computed when it is saved."""
    matrix = jnp.full((_WIDTH, _WIDTH), 1 / _WIDTH) + number
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, made: made @ matrix / _WIDTH, matrix)


def _call_ours(path: Path, number: int, *, make: Callable[[int], jax.Array]) -> float:
    return _call(partial(fp.save_async, path, {f"array_{number}": make(number)}))


def _call_busy(path: Path, number: int) -> float:
    large = [{f"large_{number}_{i}": _new_array(number, _LARGE_BYTES)} for i in range(2)]
    state = {f"array_{number}": _new_array(number)}
    writing = [fp.save_async(path, one) for one in large]
    secs = _call(partial(fp.save_async, path, state))
    for handle in writing:
        handle.result()
    return secs


def _call_orbax(path: Path, number: int) -> float:
    state = {"array": _new_array(number)}
    return _call(partial(ocp.save_async, path / str(number), state))


_WAYS: dict[str, Callable[[Path, int], float]] = {
    _READY: partial(_call_ours, make=_new_array),
    _BUSY: _call_busy,
    _COMPUTING: partial(_call_ours, make=_products),
    _ORBAX: _call_orbax,
}
