"""`many_leaves`: one save of 100,000 small leaves, where what counts is the cost of a leaf.

Each run has a fresh process, so that none finds memory that another has used and left. Metadata and
digests are what is written for the most part: a leaf has 64 bytes of data.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured

_ON_DEVICE, _HALF, _ON_HOST = "jax.Array", "jax.Array, half of them", "np.ndarray"
_MOST_MICROSECONDS = {"save": 33, "finalize": 28, "load": 24, "verify": 44}  # a leaf, of NumPy's


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 100,000 leaves of 16 float32, NumPy's and JAX's (small: 1,000)."""
    count = 1_000 if small else 100_000

    def contender(name: str, leaves: int, *, on_device: bool) -> Contender:
        return Contender(name, partial(child.run, measure, leaves, on_device))

    return Scenario(
        name="many_leaves",
        work=f"{count:,} leaves of 16 float32 in one save, then finalize, load and verify",
        contenders=(
            contender(_ON_HOST, count, on_device=False),
            contender(_HALF, count // 2, on_device=True),
            contender(_ON_DEVICE, count, on_device=True),
        ),
        targets=(
            *(
                Target.below(Figure(_ON_HOST, metric), most, "us a leaf", unit=1e-6 * count)
                for metric, most in _MOST_MICROSECONDS.items()
            ),
            Target.linear(Figure(_HALF), Figure(_ON_DEVICE)),
        ),
    )


def measure(count: int, on_device: bool, path: str) -> Metrics:  # noqa: FBT001 - from JSON
    """Saves `count` leaves of 64 bytes, finalizes, loads and verifies, after a few to warm up.

    Returns:
      `save`, `finalize`, `load`, `verify`, `total`: seconds. `memory`: growth of the resident
      memory at its peak, in bytes.
    """
    _measure(_leaves(100, on_device=on_device), Path(f"{path}.warm_up"))
    leaves = _leaves(count, on_device=on_device)
    return measured(partial(_measure, leaves, Path(path)))


def _leaves(count: int, *, on_device: bool) -> dict[str, dict[str, np.ndarray | jax.Array]]:
    random = np.random.default_rng(0)
    names = ((f"layer_{number // 100}", f"leaf_{number % 100}") for number in range(count))
    tree: dict[str, dict[str, np.ndarray | jax.Array]] = {}
    for layer, leaf in names:
        array = random.random(16, np.float32)
        tree.setdefault(layer, {})[leaf] = jax.numpy.asarray(array) if on_device else array
    return jax.block_until_ready(tree)


def _measure(leaves: object, path: Path) -> Metrics:
    metrics = {
        "save": by.seconds(lambda: fp.save(path, leaves)),
        "finalize": by.seconds(lambda: fp.finalize(path)),
        "load": by.seconds(lambda: fp.load(path)),
        "verify": by.seconds(lambda: fp.verify(path)),
    }
    return metrics | {"total": sum(metrics.values())}
