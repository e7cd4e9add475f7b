"""`many_small`: many saves of small arrays, where what counts is the cost of a save itself."""

from __future__ import annotations

from benchmarks import contenders as by
from benchmarks.harness import Scenario, Target


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 128 saves x 16 leaves of 64 floats, then finalize (small: 8 saves)."""
    count = 8 if small else 128
    groups = by.make_groups(count, leaves=16, shape=(64,))
    return Scenario(
        name="many_small",
        work=f"{count} saves x 16 leaves of 64 float32, then finalize",
        contenders=tuple(
            # Orbax's partial saves grow with all before them and take minutes, so once is all.
            by.contender(way, groups, max_rounds=1 if way == by.PARTIAL else None)
            for way in by.WAYS
        ),
        targets=(
            Target.faster(by.OURS, than=by.PARTIAL, metric="save", at_least=200),
            Target.faster(by.OURS, than=by.PARTIAL, metric="finalize", at_least=500),
            Target.faster(by.OURS, than=by.WHOLE, at_least=1),
            Target.faster(by.OURS, than=by.SAFETENSORS),
            Target.faster(by.OURS, than=by.PLAIN),
        ),
    )
