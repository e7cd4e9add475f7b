"""`long_session`: a session of thousands of saves, where a save must cost what the first one did.

Orbax `v1.partial` is measured on 50 saves: each takes longer than the one before.

Of a session a process remembers the names of its leaves, so as to refuse one that is saved twice:
name, path, two places in tables. That is about half a KiB a leaf, which bounds its growth.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks import child
from benchmarks import contenders as by
from benchmarks import long_session_process as process
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_KIB = 1 << 10


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 2,000 saves x 10 leaves of 64 floats (small: 40 saves)."""
    count, few = (40, 2) if small else (2_000, 50)
    ours_few, orbax_few = (f"{name}, {few} saves" for name in (by.OURS, by.PARTIAL))
    first, last, save, finalize, growth = (
        Figure(by.OURS, metric)
        for metric in ("first 5 %", "last 5 %", "save", "finalize", "growth")
    )
    grown_leaves = (count - process.edge_of(count)) * process.LEAVES
    return Scenario(
        name="long_session",
        work=f"{count:,} saves x {process.LEAVES} leaves of 64 float32, then finalize, then load",
        contenders=(
            Contender(by.OURS, partial(_run, "ours", count), partial(_check, count)),
            Contender(ours_few, partial(_run, "ours", few)),
            Contender(orbax_few, partial(_run, "orbax", few), max_rounds=1),
        ),
        targets=(
            Target.within(last, of=first, at_most=1.1),
            Target.within(finalize, of=save, at_most=0.2),
            Target.below(growth, 0.5, "KiB a leaf", unit=_KIB * grown_leaves),
            Target.within(Figure(orbax_few, last.metric), of=Figure(orbax_few, first.metric)),
            Target.faster(ours_few, than=orbax_few),
        ),
    )


def _run(way: str, count: int, path: Path) -> Metrics:
    return child.run("long_session_process", way, count, path)


def _check(count: int, path: Path) -> None:
    by.check_ours(list(process.groups_of(count)), path)
