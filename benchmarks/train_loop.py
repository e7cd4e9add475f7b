"""`train_loop`: what checkpoints cost a training loop, which continues while they are written.

The batch is so small that a step takes about a second on two cores. Steps of a real model take
longer for each byte of its state, which leaves more time to write it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks import training
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NONE, _OURS, _ORBAX, _THREAD = "no checkpoints", by.OURS, "Orbax v1, async", "plain thread"
_FULL = training.Size(
    vocabulary=8192, length=16, windows=8, width=768, layers=12, stages=4, every=10
)


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 97.6 M parameters, saved each 10 steps (small: 0.04 M, each 2)."""
    return build_for(training.SMALL if small else _FULL)


def build_for(size: training.Size) -> Scenario:
    """Returns the scenario for another model, or another machine."""
    loop = training.Training(size)
    blocked = Figure(_OURS, "blocked")
    return Scenario(
        name="train_loop",
        work=(
            f"{loop.bytes / 1e6:,.1f} MB in {len(loop.leaves)} arrays, saved each {size.every} "
            f"steps of {size.windows} x {size.length} tokens"
        ),
        contenders=(
            Contender(_NONE, lambda _: loop.run(None)),
            Contender(_OURS, partial(_train, loop, training.ours), partial(_check, size.every)),
            Contender(_ORBAX, partial(_train, loop, training.OrbaxAsync)),
            Contender(_THREAD, partial(_train, loop, training.PlainThread)),
        ),
        targets=(
            Target.within(blocked, of=Figure(_ORBAX, "blocked"), at_most=0.05),
            # Stricter: as if Orbax had not to wait for the step under way.
            Target.within(Figure(_OURS, "own"), of=Figure(_ORBAX, "own")),
            Target.within(blocked, of=Figure(_OURS, "interval"), at_most=0.005),
            Target.keeps("steps/s", _OURS, of=_NONE, at_least=0.95),
            Target.keeps("steps/s", _THREAD, of=_NONE),
            Target.keeps("steps/s", _ORBAX, of=_NONE),
        ),
        touched_bytes=3 * loop.bytes,
        prepare=lambda _: _compile(loop),
        shown="steps/s",
    )


def _train(loop: training.Training, kind: Callable[..., object], path: Path) -> Metrics:
    return loop.run(kind(loop.size.every, path))


def _compile(loop: training.Training) -> None:
    """A turn without checkpoints: its first step compiles."""
    loop.run(None)


def _check(every: int, path: Path) -> None:
    """Verifies the checkpoint, and has Orbax read it."""
    assert fp.steps(path) == [every]
    assert fp.verify(path / str(every)).ok
    by.read_by_orbax(path / str(every))
