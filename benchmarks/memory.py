"""`memory`: saving a state larger than what may be held of it, which is made a layer at a time.

Every contender runs in a fresh process, so that none finds memory that another has used and left.
Counted is what the process holds above its start, what the source itself makes included; the page
cache is not.

With its defaults glibc keeps freed arrays of up to 32 MiB for later use, in an arena for each few
threads. One contender tells how much of ours that is: there, it gives them back at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks import memory_process as process
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_OURS_GIVEN_BACK = f"{by.OURS}, freed arrays given back"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(_MIB)}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 64 layers of 2 x 16 MiB, 2 GiB in all (small: 4 of 2 x 1 MiB)."""
    layers, size = (4, _MIB) if small else (64, 16 * _MIB)

    def run(way: str, path: Path, **options: Any) -> Metrics:
        return child.run("memory_process", way, layers, size, path, **options)

    return Scenario(
        name="memory",
        work=(
            f"{layers} layers of 2 x {size // _MIB} MiB float32, made and saved one after the "
            f"other, {process.MAX_INFLIGHT_BYTES // _MIB} MiB in flight; whole where it must be"
        ),
        contenders=(
            Contender(by.OURS, partial(run, "ours"), partial(_check, layers)),
            Contender(_OURS_GIVEN_BACK, partial(run, "ours", environment=_GIVE_BACK)),
            Contender(by.PARTIAL, partial(run, "orbax_partial")),
            Contender(by.WHOLE, partial(run, "orbax_whole")),
            Contender(by.PLAIN, partial(run, "plain")),
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
