"""`every_step`: a checkpoint after each step that the storage keeps up with.

A step lasts longer than its state takes to leave the device, and less than the storage takes to
write it: the callback skips what is due meanwhile (`when_behind="skip"`), or waits.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from benchmarks import contenders as by
from benchmarks.gpu_work import Work
from benchmarks.harness import Contender, Metrics, Scenario, Target
from flax_partial.callbacks.plain import checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NONE, _ORBAX = "no checkpoints", "Orbax v1, async"
_SKIP, _WAIT = f"{by.OURS}, skip", f"{by.OURS}, wait"


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 16 MiB and 40 steps; on an accelerator 1 GiB (small: 1 MiB, 4)."""
    is_cpu = jax.devices()[0].platform == "cpu"
    work, steps = (
        (Work(4, 256), 4)
        if small
        else (Work(16, 512, products=40), 40)
        if is_cpu
        else (Work(16, 4096, products=20), 20)
    )
    ways: dict[str, Callable[[Path], Metrics]] = {
        _NONE: partial(_train, work, steps, lambda _: None),
        _SKIP: partial(_train_with_ours, work, steps, "skip"),
        _WAIT: partial(_train_with_ours, work, steps, "wait"),
        _ORBAX: partial(_train_with_orbax, work, steps),
    }
    return Scenario(
        name="every_step",
        work=f"{work.bytes / 1e6:,.0f} MB in {len(work.state)} arrays, due at each step of {steps}",
        contenders=tuple(
            Contender(name, way, medium="tmpfs", max_rounds=1 if name == _ORBAX else None)
            for name, way in ways.items()
        ),
        targets=(
            Target.keeps("steps/s", _SKIP, of=_NONE, at_least=0.99),
            Target.keeps("steps/s", _WAIT, of=_NONE),
            Target.keeps("steps/s", _ORBAX, of=_NONE),
        ),
        touched_bytes=2 * work.bytes,
        prepare=None if small else lambda directory: _prepare(work, directory),
        shown="steps/s",
    )


def _prepare(work: Work, directory: Path) -> None:
    """Has the room on the device known, and what copies arrays compiled."""
    for _ in range(2):
        _train_with_ours(work, 4, "wait", directory / "warm")
        shutil.rmtree(directory / "warm")


def _train(work: Work, steps: int, save: Callable[[int], object], _: Path) -> Metrics:
    """Trains; `steps/s` counts until the last step is done, not what is written after it."""
    start = time.perf_counter()
    for step in range(1, steps + 1):
        work.dispatch()
        save(step)
    jax.block_until_ready(work.state)
    secs = time.perf_counter() - start
    return {"steps/s": steps / secs, "total": secs}


def _train_with_ours(work: Work, steps: int, when_behind: Any, path: Path) -> Metrics:
    options: Any = {"every_n_train_steps": 1, "every_n_epochs": None, "when_behind": when_behind}
    with checkpointing(path, **options) as loop:
        metrics = _train(work, steps, lambda _: loop.step(work.state), path)
        return metrics | {"saved": steps - loop.callback.skipped_saves}


def _train_with_orbax(work: Work, steps: int, path: Path) -> Metrics:
    before: list[Any] = []

    def save(step: int) -> None:
        for handle in before:
            handle.result()
        before[:] = [ocp.save_async(path / str(step), work.state)]

    path.mkdir()
    metrics = _train(work, steps, save, path)
    before[0].result()
    return metrics | {"saved": steps}
