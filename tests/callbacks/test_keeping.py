"""Which checkpoints are kept and which one is chosen; what is read or resumed from stays."""

from __future__ import annotations

import itertools
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_trainer import EVERYTHING, StubTrainer, begun, end_step, fitted, new_state, restored
from test_callback import assert_is_step, names_in

import flax_partial as fp
from flax_partial.callbacks import (
    EveryInterval,
    EveryNSteps,
    LatestN,
    PartialCheckpointCallback,
)
from flax_partial.callbacks._clock import Clock
from flax_partial.callbacks._schedule import Retention
from flax_partial.callbacks.policies import SavedStep

if TYPE_CHECKING:
    from pathlib import Path

    from flax_partial.callbacks.policies import Policy

HOUR = timedelta(hours=1)
LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 9.0, 10: 5.0}


def run(directory: Path, epochs: int = 5, **options: Any) -> PartialCheckpointCallback:
    losses = lambda step: {"loss": jnp.float32(LOSSES.get(step, 0))}  # noqa: E731
    return fitted(directory, monitor="loss", epochs=epochs, metrics=losses, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"keep_every_n_steps": 0}, ValueError, "keep_every_n_steps is 0"),
        ({"keep_time_interval": timedelta(0)}, ValueError, "keep_time_interval is 0:00:00"),
        ({"keep_time_interval": 3600}, TypeError, "must be a datetime.timedelta"),
        ({"train_time_interval": timedelta(-1)}, ValueError, "train_time_interval is -1 day"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_without_a_meaning_are_refused(options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        PartialCheckpointCallback("run", **options)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({"keep_every_n_steps": 4}, [4, 8, 10], id="multiples"),
        pytest.param({"keep_every_n_steps": 3}, [4, 6, 10], id="the first at or after a multiple"),
        pytest.param(
            {"keep_every_n_steps": 4, "save_initial": True}, [0, 4, 8, 10], id="the initial state"
        ),
        pytest.param({"keep_every_n_steps": 4, "keep_last": 2}, [4, 8, 10], id="and the newest"),
        pytest.param({"keep_every_n_steps": 8, "save_top_k": 1}, [4, 8, 10], id="and the best"),
        pytest.param({"keep_time_interval": HOUR}, [2, 10], id="all within an hour"),
        pytest.param(
            {"keep_time_interval": timedelta(microseconds=1)}, [2, 4, 6, 8, 10], id="all later"
        ),
    ],
)
def test_checkpoints_that_are_kept(tmp_path: Path, options: Any, kept: list[int]) -> None:
    run(tmp_path, **options)
    assert names_in(tmp_path) == sorted(map(str, kept))


@given(
    steps=st.sets(st.integers(1, 99), min_size=1),
    every=st.none() | st.integers(1, 30),
    hours=st.none() | st.integers(1, 30),
)
def test_removing_one_by_one_keeps_the_same_as_removing_all_at_once(
    steps: set[int], every: int | None, hours: int | None
) -> None:
    """A checkpoint that was kept once is never given up later because others have gone."""
    policies: list[Policy] = [LatestN(1)]
    policies += [] if every is None else [EveryNSteps(every)]
    policies += [] if hours is None else [EveryInterval(hours * HOUR)]
    retention = Retention(tuple(policies))

    def without_expired(steps: set[int]) -> set[int]:
        saved = [SavedStep(step, finalized_at=3600.0 * step) for step in sorted(steps)]
        return steps - set(retention.expired(saved))

    there: set[int] = set()
    for step in sorted(steps):
        there = without_expired(there | {step})
    assert there == without_expired(steps)
    if every is not None:
        for period in range(1, 99 // every + 1):
            first = min((s for s in steps if s // every == period), default=None)
            assert first is None or first in there
    if hours is not None:
        for step in steps:  # of any hours, no restart loses more than this
            assert any(step - hours < other <= step for other in there) or step in there


def test_best_and_last_are_told_also_after_a_restart(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, monitor="loss")
    assert (callback.best_model_path, callback.last_model_path) == ("", "")
    assert callback.best_model_score is None
    ran = run(tmp_path, save_top_k=1)
    for one in (ran, callback):
        assert one.best_model_path == str(tmp_path / "4")
        assert one.best_model_score == 1.0
        assert one.last_model_path == str(tmp_path / "10")
    largest = PartialCheckpointCallback(tmp_path, monitor="loss", mode="max")
    assert (largest.best_model_path, largest.best_model_score) == (str(tmp_path / "10"), 5.0)
    without = PartialCheckpointCallback(tmp_path)
    assert without.best_model_path == without.last_model_path == str(tmp_path / "10")
    assert without.best_model_score is None


def test_a_score_is_that_of_the_checkpoint_that_is_there_now(tmp_path: Path) -> None:
    for loss in (0.5, 0.25):
        fp.save(tmp_path / "1", {"a": 1}, custom_metadata={"metrics": {"loss": loss}})
        fp.finalize(tmp_path / "1")
        callback = PartialCheckpointCallback(tmp_path, monitor="loss")
        assert callback.best_model_score == loss
        fp.remove(tmp_path / "1")


def test_restore_of_a_step_and_of_parameters_only(tmp_path: Path) -> None:
    run(tmp_path, epochs=3)
    callback = PartialCheckpointCallback(tmp_path)
    state, step = restored(callback, new_state(0), which=4)
    assert state["seen"] == step == 4
    only, _ = restored(callback, {"params": new_state(0)["params"]}, which=2, partial=True)
    assert list(only) == ["params"]
    np.testing.assert_array_equal(only["params"]["head"]["b"], [2, 2])
    with pytest.raises(fp.NoSessionError, match=r"no checkpoint of step 5 in .*are 2, 4, 6\."):
        callback.restore(which=5)
    with pytest.raises(ValueError, match="which=True"):
        callback.restore(which=True)


def test_checkpoint_resumed_from_stays_until_a_newer_one_is_finalized(tmp_path: Path) -> None:
    run(tmp_path)
    callback = PartialCheckpointCallback(tmp_path, keep_last=1)
    restored(callback, new_state(0), which=4)
    trainer = begun(callback)
    callback.finalizer.wait()
    assert fp.steps(tmp_path) == [2, 4, 6, 8, 10]
    end_step(callback, trainer, 11, is_last=True)
    callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert fp.steps(tmp_path) == [11]


def test_checkpoint_that_is_being_loaded_is_removed_later(tmp_path: Path) -> None:
    """Training goes on meanwhile, and the next checkpoint that is finalized has it removed."""
    reads, may_end = threading.Event(), threading.Event()
    loaded: list[Any] = []

    def look(_done: int, _total: int) -> None:
        reads.set()
        assert may_end.wait(250)

    def begin(trainer: StubTrainer) -> None:
        if trainer.global_step == 2:
            while fp.steps(tmp_path) != [2]:
                pause.wait(0.01)
            reader.start()
            assert reads.wait(250)
        if trainer.global_step == 6:
            while fp.steps(tmp_path) != [2, 6]:
                pause.wait(0.01)
            may_end.set()
            reader.join()

    pause = threading.Event()
    reader = threading.Thread(target=lambda: loaded.append(fp.load(tmp_path / "2", progress=look)))
    fitted(tmp_path, keep_last=1, epochs=4, at={"on_train_batch_start": begin})
    assert names_in(tmp_path) == ["8"]
    np.testing.assert_array_equal(loaded[0]["seen"], 2)
    assert_is_step(tmp_path / "8", 8)


# Saving by the clock.


@pytest.mark.parametrize("streamed", [frozenset(), EVERYTHING], ids=["", "streamed"])
def test_saves_when_the_time_has_gone_by(tmp_path: Path, streamed: Any) -> None:
    began = time.monotonic()
    by_time: Any = {"every_n_epochs": None, "train_time_interval": timedelta(seconds=0.2)}
    at = {"ready": lambda _: time.sleep(0.05)}
    fitted(tmp_path, batches=20, streamed=streamed, at=at, **by_time)
    secs = time.monotonic() - began
    steps = fp.steps(tmp_path)
    assert 2 <= len(steps) <= secs / 0.2
    assert min(b - a for a, b in itertools.pairwise(steps)) >= 1
    for step in steps:
        assert_is_step(tmp_path / str(step), step)


def test_clock_counts_from_the_last_save_whatever_its_reason(tmp_path: Path) -> None:
    fitted(tmp_path, every_n_train_steps=2, train_time_interval=timedelta(seconds=30), batches=5)
    assert fp.steps(tmp_path) == [2, 4, 5]


def test_clock_answers_the_same_however_often_it_is_asked() -> None:
    clock = Clock(timedelta(seconds=0.05))
    clock.start("run", 7)
    assert [clock.is_due(8) for _ in range(2)] == [False, False]
    time.sleep(0.06)
    assert [clock.is_due(8), clock.is_due(9), clock.is_due(9)] == [False, True, True]
    clock.saved()
    assert [clock.is_due(9), clock.is_due(10)] == [True, False]
