"""`reuse`: fine-tuning with most layers frozen: a checkpoint and then another, almost the same.

Each layer is a group: its base, which is frozen, and what adapts it, with its two moments. The
checkpoint before is there already, and what is trained has changed since.
"""

from __future__ import annotations

import os
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
_REUSING_TMPFS, _WRITING_TMPFS = f"{_REUSING}, tmpfs", f"{_WRITING}, tmpfs"
_TRAINED = ("adapter", "mu", "nu")


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 32 layers of 16 MiB, 95 % frozen (small: 4 of 1 MiB)."""
    layers, size = (4, _MIB) if small else (32, 16 * _MIB)
    groups = [_layer(i, size) for i in range(layers)]
    trained = [_with_other_trained(group) for group in groups]
    total = by.count_bytes(groups)
    check = partial(by.check_ours, trained)
    reusing, writing = partial(_reusing, groups, trained), partial(by.save_ours, trained)
    written = Figure(_WRITING, "written")
    return Scenario(
        name="reuse",
        work=f"{layers} layers, {total / _MIB:,.0f} MiB, {_frozen_share(groups):.1%} unchanged",
        contenders=(
            _contender(_REUSING, reusing, check),
            _contender(_WRITING, writing, check),
            _contender(by.WHOLE, partial(by.save_orbax_whole, trained)),
            _contender(_REUSING_TMPFS, reusing, medium="tmpfs"),
            _contender(_WRITING_TMPFS, writing, medium="tmpfs"),
        ),
        targets=(
            Target.within(Figure(_REUSING, "written"), of=written, at_most=0.06),
            Target.faster(_REUSING, than=_WRITING, at_least=2),
            Target.faster(_REUSING, than=by.WHOLE, at_least=5),
            Target.faster(_REUSING_TMPFS, than=_WRITING_TMPFS),
            Target.faster(_REUSING, than=_WRITING, metric="save"),
            Target.faster(_REUSING, than=_WRITING, metric="finalize"),
        ),
        touched_bytes=2 * total,
    )


def _reusing(before: Sequence[by.Group], groups: Sequence[by.Group], path: Path) -> Metrics:
    """Saves, sharing with the checkpoint before; making that one is not measured."""
    earlier = path.with_name("before")
    by.save_ours(before, earlier)
    os.sync()
    return by.timed(
        lambda: [fp.save(path, group, reuse=earlier) for group in groups],
        lambda: fp.finalize(path),
    )


def _contender(name: str, save: Callable[[Path], Metrics], *options: Any, **more: Any) -> Contender:
    def run(path: Path) -> Metrics:
        return save(path) | {"written": float(_bytes_of_its_own(path))}

    return Contender(name, run, *options, **more)


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
