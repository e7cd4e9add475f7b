"""`stream`: large groups saved one after the other, on disk and where no disk hides the CPU."""

from __future__ import annotations

from benchmarks import contenders as by
from benchmarks.harness import Figure, Scenario, Target

_MIB = 1 << 20
_OURS_TMPFS, _PLAIN_TMPFS = f"{by.OURS}, tmpfs", f"{by.PLAIN}, tmpfs"


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 32 saves of 2 x 16 MiB, then finalize (small: 4 of 2 x 1 MiB)."""
    count, size = (4, _MIB) if small else (32, 16 * _MIB)
    groups = by.make_groups(count, leaves=2, shape=(size // 4096, 1024))
    return Scenario(
        name="stream",
        work=f"{count} synchronous saves of 2 x {size // _MIB} MiB float32, then finalize",
        contenders=(
            *(by.contender(way, groups) for way in by.WAYS),
            by.contender(by.OURS, groups, label=_OURS_TMPFS, medium="tmpfs"),
            by.contender(by.PLAIN, groups, label=_PLAIN_TMPFS, medium="tmpfs"),
        ),
        targets=(
            Target.faster(by.OURS, than=by.PARTIAL, at_least=5),
            Target.faster(by.OURS, than=by.WHOLE, at_least=4),
            Target.faster(by.OURS, than=by.SAFETENSORS, at_least=2),
            Target.within(Figure(by.OURS), of=Figure(by.PLAIN), at_most=1.2),
            Target.within(Figure(_OURS_TMPFS), of=Figure(_PLAIN_TMPFS), at_most=1.5),
        ),
        touched_bytes=2 * by.count_bytes(groups),
    )
