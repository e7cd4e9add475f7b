"""`import_time`: what importing the package adds to a program that has JAX and tensorstore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_CALLBACKS = "flax_partial.callbacks"
_ORBAX = "Orbax v1"
_PACKAGES = {
    by.OURS: "flax_partial",
    _CALLBACKS: "flax_partial.callbacks",
    _ORBAX: "orbax.checkpoint.experimental.v1",
}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: imports in fresh processes (small: the same)."""
    del small
    return Scenario(
        name="import_time",
        work="import after jax and tensorstore, each in a fresh process",
        contenders=tuple(_contender(name, package) for name, package in _PACKAGES.items()),
        targets=(
            Target.below(Figure(by.OURS), 50, "ms", unit=1e-3),
            Target.faster(by.OURS, than=_ORBAX),
        ),
    )


def _contender(name: str, package: str) -> Contender:
    def run(_: Path) -> Metrics:
        return child.run("import_process", package)

    return Contender(name, run)
