"""`import_time`: what importing the package adds to a program that has JAX and tensorstore.

The measured process imports this module first, which therefore imports nothing that is measured.
"""

from __future__ import annotations

import importlib
import time

from benchmarks import child
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured

_OURS, _CALLBACKS, _ORBAX = "flax_partial", "flax_partial.callbacks", "Orbax v1"
_PACKAGES = {
    _OURS: "flax_partial._public",  # what its first name that is used imports
    _CALLBACKS: _CALLBACKS,
    _ORBAX: "orbax.checkpoint.experimental.v1",
}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: imports in fresh processes (small: the same)."""
    del small
    return Scenario(
        name="import_time",
        work="import after jax and tensorstore, each in a fresh process",
        contenders=tuple(
            Contender(name, lambda _, package=package: child.run(import_package, package))
            for name, package in _PACKAGES.items()
        ),
        targets=(
            Target.below(Figure(_OURS), 50, "ms", unit=1e-3),
            Target.faster(_OURS, than=_ORBAX),
        ),
    )


def import_package(package: str) -> Metrics:
    """Imports a package in this process, after JAX and tensorstore."""
    import jax  # noqa: F401
    import tensorstore  # noqa: F401

    def timed() -> Metrics:
        start = time.perf_counter()
        importlib.import_module(package)
        return {"total": time.perf_counter() - start}

    return measured(timed)
