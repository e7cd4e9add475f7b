"""`finalize`: merging many parts, which is linear in them.

Orbax `v1.partial` is measured on 50 parts, beside ours on the same 50: its saves take time
quadratic in their number, so that 1,000 would take hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAVES = 10
_GIB = 1 << 30


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 1,000 parts x 10 leaves, half, ten times that (small: a twentieth)."""
    full, few = (50, 5) if small else (1_000, 50)
    half, tenfold = full // 2, full * 10
    groups = by.make_groups(tenfold, leaves=_LEAVES, shape=(64,))
    ours_few, ours_half, ours_full, ours_tenfold = (
        Figure(_label(by.OURS, count), "finalize") for count in (few, half, full, tenfold)
    )
    return Scenario(
        name="finalize",
        work=f"parts of {_LEAVES} leaves of 64 float32, saved one by one, then finalized",
        contenders=(
            _contender(by.OURS, groups[:few]),
            _contender(by.OURS, groups[:half]),
            _contender(by.OURS, groups[:full]),
            # Orbax would read these 100,000 leaves for minutes to check them.
            _contender(by.OURS, groups, max_rounds=1, is_checked=False),
            _contender(by.PARTIAL, groups[:few], max_rounds=1),
            _contender(by.WHOLE, groups[:full], max_rounds=1),
            _contender(by.SAFETENSORS, groups[:full], max_rounds=1),
            _contender(by.PLAIN, groups[:full], max_rounds=1),
        ),
        targets=(
            Target.below(ours_full, 1.5, "s"),
            Target.linear(ours_half, ours_full),
            Target.below(ours_tenfold, 15, "s"),
            Target.below(Figure(ours_tenfold.contender, "memory"), 1, "GiB", unit=_GIB),
            Target.faster(ours_few.contender, than=_label(by.PARTIAL, few), metric="finalize"),
            Target.faster(ours_full.contender, than=_label(by.WHOLE, full)),
        ),
    )


def _label(name: str, parts: int) -> str:
    return f"{name}, {parts:,} parts"


def _contender(name: str, groups: Sequence[by.Group], **options: Any) -> Contender:
    return by.contender(name, groups, label=_label(name, len(groups)), **options)
