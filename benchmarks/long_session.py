"""`long_session`: a session of thousands of saves, where a save must cost what the first one did.

Orbax `v1.partial` is measured on 50 saves: each takes longer than the one before.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_LEAVES = 10
_EDGE = 0.05
_MIB = 1 << 20


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 2,000 saves x 10 leaves of 64 floats (small: 40 saves)."""
    count, few = (40, 2) if small else (2_000, 50)
    groups = by.make_groups(count, leaves=_LEAVES, shape=(64,))
    orbax, few_ours = (f"{name}, {few} saves" for name in (by.PARTIAL, by.OURS))
    last, first = Figure(by.OURS, "last 5 %"), Figure(by.OURS, "first 5 %")
    return Scenario(
        name="long_session",
        work=f"{count:,} saves x {_LEAVES} leaves of 64 float32, then finalize, then load",
        contenders=(
            Contender(by.OURS, partial(_run_ours, groups), partial(by.check_ours, groups)),
            Contender(few_ours, partial(_run_ours, groups[:few])),
            Contender(orbax, partial(_run_orbax, groups[:few]), max_rounds=1),
        ),
        targets=(
            Target.within(last, of=first, at_most=1.1),
            Target.within(Figure(by.OURS, "finalize"), of=Figure(by.OURS, "save"), at_most=0.2),
            Target.below(Figure(by.OURS, "growth"), 20, "MiB", unit=_MIB),
            Target.within(Figure(orbax, last.metric), of=Figure(orbax, first.metric)),
            Target.faster(few_ours, than=orbax),
        ),
    )


def _run_ours(groups: Sequence[by.Group], path: Path) -> Metrics:
    return _run(
        groups,
        save=partial(fp.save, path),
        finalize=partial(fp.finalize, path),
        load=partial(fp.load, path),
    )


def _run_orbax(groups: Sequence[by.Group], path: Path) -> Metrics:
    return _run(
        groups,
        save=partial(ocp.partial.save, path),
        finalize=partial(ocp.partial.finalize, path),
        load=partial(by.read_by_orbax, path),
    )


def _run(
    groups: Sequence[by.Group],
    *,
    save: Callable[[by.Group], object],
    finalize: Callable[[], object],
    load: Callable[[], Any],
) -> Metrics:
    """Saves group by group, finalizes, loads.

    Returns:
      `save`, `finalize`, `load`: in all. `first 5 %`, `last 5 %`: the median save of those.
      `growth`: of the resident memory between them, in bytes.
    """
    secs = []
    edge = max(1, round(_EDGE * len(groups)))
    for number, group in enumerate(groups):
        if number == edge:
            resident = resident_bytes()
        start = time.perf_counter()
        save(group)
        secs.append(time.perf_counter() - start)
    growth = resident_bytes() - resident
    finalized = _timed(finalize)
    loaded = _timed(load)
    return {
        "first 5 %": statistics.median(secs[:edge]),
        "last 5 %": statistics.median(secs[-edge:]),
        "save": sum(secs),
        "finalize": finalized,
        "load": loaded,
        "total": sum(secs) + finalized + loaded,
        "growth": growth,
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = work()
    secs = time.perf_counter() - start
    del kept
    return secs
