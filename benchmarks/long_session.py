"""`long_session`: a session of thousands of saves, where a save must cost what the first one did.

Orbax `v1.partial` is measured on 50 saves: each takes longer than the one before.

A process remembers the names of the leaves of a session, so that it can refuse one that is saved
twice: name, path and two table entries, about half a KiB a leaf, which bounds its growth.

Each run has a fresh process: memory that an earlier session has freed would be used again without
showing.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_KIB = 1 << 10
_LEAVES = 10
_WARM_UP_SAVES = 5
_WAYS = {
    "ours": (fp.save, fp.finalize, fp.load),
    "orbax": (ocp.partial.save, ocp.partial.finalize, by.read_by_orbax),
}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 2,000 saves x 10 leaves of 64 floats (small: 40 saves)."""
    count, few = (40, 2) if small else (2_000, 50)
    ours_few, orbax_few = (f"{name}, {few} saves" for name in (by.OURS, by.PARTIAL))
    first, last, save, finalize, growth = (
        Figure(by.OURS, metric)
        for metric in ("first 5 %", "last 5 %", "save", "finalize", "growth")
    )
    grown_leaves = (count - _twentieth(count)) * _LEAVES
    return Scenario(
        name="long_session",
        work=f"{count:,} saves x {_LEAVES} leaves of 64 float32, then finalize, then load",
        contenders=(
            Contender(by.OURS, partial(child.run, measure, "ours", count), partial(_check, count)),
            Contender(ours_few, partial(child.run, measure, "ours", few)),
            Contender(orbax_few, partial(child.run, measure, "orbax", few), max_rounds=1),
        ),
        targets=(
            Target.within(last, of=first, at_most=1.1),
            Target.within(finalize, of=save, at_most=0.2),
            Target.below(growth, 0.5, "KiB a leaf", unit=_KIB * grown_leaves),
            Target.within(Figure(orbax_few, last.metric), of=Figure(orbax_few, first.metric)),
            Target.faster(ours_few, than=orbax_few),
        ),
    )


def _check(count: int, path: Path) -> None:
    by.check_ours(list(_groups(count)), path)


def _twentieth(count: int) -> int:
    return max(1, count // 20)


def _groups(count: int) -> Iterator[by.Group]:
    """Yields what is saved, one group at a time: a saved array keeps a NumPy view of itself."""
    return by.each_group(count, leaves=_LEAVES, shape=(64,))


def measure(way: str, count: int, path: str) -> Metrics:
    """Saves `count` groups, finalizes and loads, after a few saves elsewhere to warm up.

    Returns:
      `save`, `finalize`, `load`, `total`: seconds. `first 5 %`, `last 5 %`: the median save of
      those. `growth`: of the resident memory from the end of the first 5 % to that of the last
      save, in bytes. `memory`: its growth at the peak.
    """
    _measure(way, _WARM_UP_SAVES, Path(f"{path}.warm_up"))
    return measured(partial(_measure, way, count, Path(path)))


def _measure(way: str, count: int, path: Path) -> Metrics:
    save, finalize, load = _WAYS[way]
    secs: list[float] = []
    edge = _twentieth(count)
    resident = 0
    for number, group in enumerate(_groups(count)):
        if number == edge:
            resident = resident_bytes()
        secs.append(by.seconds(lambda group=group: save(path, group)))
    growth = resident_bytes() - resident
    metrics = {
        "save": sum(secs),
        "finalize": by.seconds(lambda: finalize(path)),
        "load": by.seconds(lambda: load(path)),
    }
    return {
        "first 5 %": statistics.median(secs[:edge]),
        "last 5 %": statistics.median(secs[-edge:]),
        **metrics,
        "total": sum(metrics.values()),
        "growth": growth,
    }
