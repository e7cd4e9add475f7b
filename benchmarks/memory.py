"""`memory`: saving a state larger than what may be held of it, which is made a layer at a time.

Every contender runs in a fresh process, so that none finds memory that another has used and left.
Counted is what the process holds above its start, what the source itself makes included; the page
cache is not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks import memory_process as process
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_WAYS = {
    by.OURS: "ours",
    by.PARTIAL: "orbax_partial",
    by.WHOLE: "orbax_whole",
    by.PLAIN: "plain",
}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 64 layers of 2 x 16 MiB, 2 GiB in all (small: 4 of 2 x 1 MiB)."""
    layers, size = (4, _MIB) if small else (64, 16 * _MIB)
    return Scenario(
        name="memory",
        work=(
            f"{layers} layers of 2 x {size // _MIB} MiB float32, made and saved one after the "
            f"other, {process.MAX_INFLIGHT_BYTES // _MIB} MiB in flight; whole where it must be"
        ),
        contenders=tuple(
            Contender(name, partial(_run, way, layers, size), _CHECKS.get(name))
            for name, way in _WAYS.items()
        ),
        targets=(
            Target.below(Figure(by.OURS, "memory"), 160, "MiB", unit=_MIB),
            Target.within(Figure(by.OURS, "memory"), of=Figure(by.PARTIAL, "memory")),
            Target.within(Figure(by.OURS, "memory"), of=Figure(by.WHOLE, "memory")),
        ),
        touched_bytes=3 * layers * 2 * size,
        shown="memory",
    )


def _run(way: str, layers: int, size: int, path: Path) -> Metrics:
    return child.run("memory_process", way, layers, size, path)


def _check_ours(path: Path) -> None:
    assert fp.verify(path).ok
    ocp.metadata(path)


_CHECKS = {by.OURS: _check_ours}
