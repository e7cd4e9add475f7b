"""What is done to the disk while it is watched: all that the package does to it, once.

Two checkpoints of a run are made, one by calls and one by the callback, which then removes the
first; a third is begun and aborted. Each step says into the log when it begins, and how it ended:
what it said is what the promises are about.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from fileops import Plan, Watch

import flax_partial as fp
from flax_partial.callbacks import LatestN, PartialCheckpointCallback, _directory
from flax_partial.callbacks._schedule import Retention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nursery import Job

_RANDOM = np.random.default_rng(5)
_LARGE = _RANDOM.standard_normal(700_000, np.float32)  # two chunks, and most of what is written


def _small(seed: int) -> dict[str, Any]:
    """Leaves that are copied when merged, leaves that are referred to, and those without data."""
    random = np.random.default_rng(seed)
    tree: dict[str, Any] = {f"{i:03}": random.standard_normal(i + 1) for i in range(200)}
    tree["bfloat16"] = random.standard_normal((9, 7)).astype(ml_dtypes.bfloat16)
    tree["grid"] = random.standard_normal((70, 50), np.float32)
    tree["empty"] = np.zeros((0, 3), np.int8)
    tree["text"], tree["count"], tree["rate"], tree["nothing"] = f"ä{seed}", seed, 0.5 + seed, None
    return tree


SAVES: dict[str, dict[str, Any]] = {
    "large": {"large": _LARGE, "step": 1},
    "small": {"small": _small(1), "list": [np.arange(3), np.arange(4)]},
    "replace": {"large": _LARGE[::-1].copy(), "small": {"000": np.ones(1), "text": "new"}},
}
"""What the saves of the first checkpoint hold, in the order in which they come."""

TRAINED: dict[str, Any] = {
    "params": {str(i): {"w": _LARGE[i : i + 30_000], "b": _LARGE[i : i + 9]} for i in range(3)},
    "step": np.int64(2),
}
"""What the callback saves."""

DOOMED: dict[str, Any] = {"a": np.arange(5), "b": _LARGE[:3000]}
"""What is saved and then aborted."""

FIRST, SECOND, THIRD = "1", "2", "9"
"""Names of the checkpoints in the run's directory."""


def run_directory(base: Path) -> Path:
    """The run's directory: neither it nor the one above it exists at the beginning."""
    return base / "runs" / "lm"


def save(base: Path, name: str, *, durable: bool, replace: bool = False) -> None:
    """Saves one of `SAVES`."""
    options = fp.SaveOptions(durable=durable)
    is_new = replace or name == "replace"
    path = run_directory(base) / FIRST
    fp.save(path, SAVES[name], replace=is_new, options=options, custom_metadata={name: True})


def _run(base: Path, step: int, *, durable: bool) -> tuple[PartialCheckpointCallback, Any]:
    """A callback that keeps the newest checkpoint, and a trainer that has come to a step."""
    options = fp.SaveOptions(durable=durable)
    callback = PartialCheckpointCallback(run_directory(base), keep_last=1, options=options)
    trainer = types.SimpleNamespace(
        global_step=step, current_epoch=0, callback_metrics={}, is_last_batch=True, state=TRAINED
    )
    return callback, trainer


def train(base: Path, *, durable: bool) -> None:
    """Goes on from the newest checkpoint to step 2, as a training job would; keeps the newest."""
    callback, trainer = _run(base, 1, durable=durable)
    callback.setup(trainer, None, "fit")
    try:
        _fit(callback, trainer)
    except BaseException as error:
        callback.on_exception(trainer, None, error)
        raise
    finally:
        callback.teardown(trainer, None, "fit")


def _fit(callback: PartialCheckpointCallback, trainer: Any) -> None:
    callback.on_fit_start(trainer, None)
    restored = callback.restore({"step": TRAINED["step"]}, partial=True)
    if restored is None or restored[1] < trainer.global_step + 1:
        callback.on_train_batch_start(trainer, None, None, 0)
        callback.on_layer_ready(trainer, "0", TRAINED["params"]["0"])
        trainer.global_step = 2
        callback.on_train_batch_end(trainer, None, None, None, 0)
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)


def save_doomed(base: Path, *, durable: bool, replace: bool = False) -> None:
    """Begins a checkpoint that is not to be."""
    path = run_directory(base) / THIRD
    fp.save(path, DOOMED, replace=replace, options=fp.SaveOptions(durable=durable))


def steps(base: Path, *, durable: bool) -> dict[str, Callable[[], object]]:
    """All that is done, by name, in order."""
    return {
        **{name: functools.partial(save, base, name, durable=durable) for name in SAVES},
        "finalize": lambda: fp.finalize(run_directory(base) / FIRST),
        "train": lambda: train(base, durable=durable),
        "doomed": lambda: save_doomed(base, durable=durable),
        "abort": lambda: fp.abort(run_directory(base) / THIRD),
    }


def _mixed(base: Path, *, durable: bool) -> dict[str, Callable[[], object]]:
    """A save that need not be durable, and one after it that must be."""
    return {
        "large": lambda: save(base, "large", durable=False),
        "small": lambda: save(base, "small", durable=durable),
    }


REUSED: dict[str, dict[str, Any]] = {
    name: {"base": _LARGE, "adapter": _LARGE[i : i + 50_000], "step": i}
    for i, name in enumerate((FIRST, SECOND, THIRD))
}
"""What three checkpoints hold that share what did not change, by their names."""


def save_reusing(base: Path, name: str, *, durable: bool) -> None:
    """Saves one of `REUSED`; the second shares data with the first, which the third looks for."""
    path = run_directory(base) / name
    options = fp.SaveOptions(durable=durable)
    fp.save(path, REUSED[name], options=options, reuse=run_directory(base) / FIRST)


def _reusing(base: Path, *, durable: bool) -> dict[str, Callable[[], object]]:
    """A checkpoint that need not be durable, one that shares its data, one that comes too late."""
    path = run_directory(base)
    return {
        "save 1": lambda: save_reusing(base, FIRST, durable=False),
        "finalize 1": lambda: fp.finalize(path / FIRST),
        "save 2": lambda: save_reusing(base, SECOND, durable=durable),
        "finalize 2": lambda: fp.finalize(path / SECOND),
        "remove 1": lambda: fp.remove(path / FIRST),
        "save 9": lambda: save_reusing(base, THIRD, durable=durable),
    }


def remove(base: Path) -> None:
    """Keeps no more than the newest of what is there, as a callback that has finalized it."""
    _directory.prune(run_directory(base), Retention((LatestN(1),)))


def begin(base: Path) -> None:
    """Begins a run and ends it before its first step: what an ended one has left goes."""
    callback, trainer = _run(base, 2, durable=True)
    callback.on_fit_start(trainer, None)
    callback.on_train_end(trainer, None)


OVER: dict[str, Any] = {
    "large": np.arange(1, 300_001, dtype=np.float32),
    "text": "new",
    "rows": np.zeros((2, 2)),
    "added": {"x": 1},
}
"""What is saved over, or into, the session `c`."""


def _save_over(base: Path) -> None:
    fp.save(base / "c", OVER, replace=True, custom_metadata={"second": True})


def _one(call: Callable[[Path], object]) -> Callable[..., dict[str, Callable[[], object]]]:
    """A single call, made durable as it is by default."""
    return lambda base, *, durable: {"call": lambda: call(base)}  # noqa: ARG005


WORKS = {
    "everything": steps,
    "mixed": _mixed,
    "reusing": _reusing,
    "removal": _one(remove),
    "save": _one(_save_over),
    "finalize": _one(lambda base: fp.finalize(base / "c")),
    "abort": _one(lambda base: fp.abort(base / "c")),
}


def run(job: Job) -> None:
    """Does it all, in the process that the job's plan befalls.

    After an error it ends; or tries the same again once the disk is well, and ends when the
    checkpoint in question is finalized.
    """
    watch = Watch()
    watch.arm(job.base, job.log, with_data=job.with_data)
    watch.plan(Plan() if job.step else job.plan)
    has_failed = False
    for name, step in WORKS[job.work](job.base, durable=job.durable).items():
        watch.mark(f"begin {name}")
        if name == job.step:
            watch.plan(job.plan)
        try:
            step()
        except Exception as error:
            watch.mark(f"failed {name}: {describe(error)}")
            if job.exits:
                raise
            has_failed = True
            watch.plan(Plan())
            _again(name, step, error)
        watch.mark(f"done {name}")
        if has_failed and name not in SAVES:
            return


def _again(name: str, step: Callable[[], object], error: Exception) -> None:
    """Tries what failed; where its error's notes say that it has happened all the same, it has."""
    said = " ".join(getattr(error, "__notes__", ()))
    try:
        step()
    except fp.CheckpointExistsError:
        if name != "finalize" or "is there nevertheless" not in said:
            raise
    except fp.NoSessionError:
        if name != "abort" or "is gone" not in said:
            raise


def describe(error: BaseException) -> str:
    """Type, error number and words of an error."""
    number = error.errno if isinstance(error, OSError) else None
    kinds = ",".join(kind.__name__ for kind in type(error).__mro__)
    return f"{kinds} {number} {error}"
