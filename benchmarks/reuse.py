"""`reuse`: fine-tuning, of which most is frozen: a checkpoint after another, which holds the same.

Each layer is a group: its base, which is frozen, and what adapts it, with its two moments. The
checkpoint before is there already, and what is trained has changed since.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_MIB = 1 << 20
_REUSING, _WRITING = f"{by.OURS}, reuse", by.OURS
_TRAINED = ("adapter", "mu", "nu")


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 32 layers of 16 MiB, 95 % frozen (small: 4 of 1 MiB)."""
    layers, size = (4, _MIB) if small else (32, 16 * _MIB)
    groups = [_layer(i, size) for i in range(layers)]
    trained = [_with_other_trained(group) for group in groups]
    total = by.count_bytes(groups)
    before: list[Path] = []

    def prepare(directory: Path) -> None:
        before[:] = [directory / "1"]
        by.save_ours(groups, before[0])

    def reusing(path: Path) -> Metrics:
        return by.timed(
            lambda: [fp.save(path, group, reuse=before[0]) for group in trained],
            lambda: fp.finalize(path),
        )

    return Scenario(
        name="reuse",
        work=f"{layers} layers, {total / _MIB:,.0f} MiB, {_frozen_share(groups):.1%} unchanged",
        contenders=(
            _contender(_REUSING, reusing, partial(by.check_ours, trained)),
            _contender(_WRITING, partial(by.save_ours, trained), partial(by.check_ours, trained)),
            _contender(by.WHOLE, partial(by.save_orbax_whole, trained)),
        ),
        targets=(
            Target.within(
                Figure(_REUSING, "written"), of=Figure(_WRITING, "written"), at_most=0.06
            ),
            Target.faster(_REUSING, than=_WRITING, at_least=3),
            Target.faster(_REUSING, than=by.WHOLE, at_least=10),
            Target.faster(_REUSING, than=_WRITING, metric="save"),
            Target.faster(_REUSING, than=_WRITING, metric="finalize"),
        ),
        touched_bytes=2 * total,
        prepare=prepare,
    )


def _contender(
    name: str, save: Callable[[Path], Metrics], check: Callable[[Path], None] | None = None
) -> Contender:
    def run(path: Path) -> Metrics:
        metrics = save(path)
        return metrics | {"written": float(_bytes_of_its_own(path))}

    return Contender(name, run, check)


def _bytes_of_its_own(path: Path) -> int:
    """Size of all files below a path that have no name elsewhere."""
    found = [file.stat() for file in path.rglob("*") if file.is_file()]
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _layer(number: int, size: int) -> by.Group:
    """A layer of `size` bytes, of which a twentieth is trained."""
    random = np.random.default_rng(number)
    trained = size // 20 // len(_TRAINED) // 4
    counts = {"base": size // 4 - len(_TRAINED) * trained, **dict.fromkeys(_TRAINED, trained)}
    arrays = {
        name: jax.numpy.asarray(random.random(count, np.float32)) for name, count in counts.items()
    }
    return {f"layer_{number}": jax.block_until_ready(arrays)}


def _with_other_trained(group: by.Group) -> by.Group:
    def after_a_step(name: str, array: jax.Array) -> jax.Array:
        return array + 1 if name in _TRAINED else jax.numpy.copy(array)

    ((layer, arrays),) = group.items()
    changed = {name: after_a_step(name, array) for name, array in arrays.items()}
    return {layer: jax.block_until_ready(changed)}


def _frozen_share(groups: Sequence[Any]) -> float:
    frozen = sum(layer["base"].nbytes for group in groups for layer in group.values())
    return frozen / by.count_bytes(groups)
