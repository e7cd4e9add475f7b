"""A hook waits for nothing longer than its `timeout_secs` says, and training goes on or ends."""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, Any

import jax
import pytest
from stub_trainer import begun, end_step
from test_callback import names_in, wait_for_leaves
from things import locked

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stub_trainer import StubTrainer

SOON_SECS = 0.3
EXTRA = {"w": 1}


@pytest.fixture
def callback(tmp_path: Path) -> PartialCheckpointCallback:
    """One whose hook waits for a moment only."""
    return PartialCheckpointCallback(
        tmp_path,
        every_n_epochs=None,
        every_n_train_steps=1,
        finalizer=FinalizeHook(timeout_secs=SOON_SECS),
    )


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """The session of step 1, made before training gets there."""
    path = tmp_path / "1.partial_save"
    path.mkdir()
    return path


@pytest.fixture
def stuck(session: Path, callback: PartialCheckpointCallback) -> Iterator[StubTrainer]:
    """A trainer after step 1, all of whose saves are stuck until the test ends."""
    trainer = begun(callback)
    session.mkdir(exist_ok=True)  # what training has found there it has dropped
    with locked(session, fcntl.LOCK_EX):
        end_step(callback, trainer, 1)
        yield trainer


def _end_next_step(callback: PartialCheckpointCallback, trainer: StubTrainer) -> None:
    end_step(callback, trainer, 2)
    callback.on_train_batch_start(trainer, None, None, 0)
    callback.on_train_end(trainer, None)


WAYS_TO_END: dict[str, Callable[[PartialCheckpointCallback, StubTrainer], Any]] = {
    "next step": _end_next_step,
    "end of training": lambda callback, trainer: callback.on_train_end(trainer, None),
    "teardown": lambda callback, trainer: callback.teardown(trainer, None, "fit"),
}


@pytest.mark.parametrize("way", WAYS_TO_END)
def test_save_that_is_stuck_is_waited_for_so_long_and_raised(
    callback: PartialCheckpointCallback, stuck: StubTrainer, way: str
) -> None:
    with pytest.raises(fp.IncompleteCheckpointError, match=r"For 0\.3 s no save of this process"):
        WAYS_TO_END[way](callback, stuck)
    assert callback.failed_saves == 1


def test_save_that_is_stuck_does_not_hold_up_the_error_that_ends_training(
    callback: PartialCheckpointCallback, stuck: StubTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    callback.on_exception(stuck, None, KeyboardInterrupt())
    assert "no save of this process has ended" in caplog.text
    assert callback.failed_saves == 1


def test_step_that_is_dropped_waits_so_long_for_its_stuck_saves(
    callback: PartialCheckpointCallback, session: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = begun(callback)
    session.mkdir(exist_ok=True)
    with locked(session, fcntl.LOCK_EX):
        callback.on_layer_ready(trainer, "head", EXTRA)  # of a step that never ends
        with pytest.raises(fp.IncompleteCheckpointError, match=r"For 0\.3 s"):
            callback.on_train_end(trainer, None)
    assert "another process still saves into it" in caplog.text


def test_other_process_that_saves_into_the_step_is_waited_for_so_long(
    tmp_path: Path,
) -> None:
    hook = FinalizeHook(timeout_secs=SOON_SECS)
    callback = PartialCheckpointCallback(
        tmp_path, every_n_epochs=None, every_n_train_steps=1, monitor="loss", finalizer=hook
    )
    trainer = begun(callback)
    end_step(callback, trainer, 1)  # which waits for its score
    wait_for_leaves(tmp_path / "1", len(jax.tree.leaves(trainer.state)))
    with (
        locked(tmp_path / "1.partial_save", fcntl.LOCK_SH),
        pytest.raises(fp.IncompleteCheckpointError, match=r"After 0\.3 s another process"),
    ):
        callback.on_train_end(trainer, None)
    callback.recover()
    assert names_in(callback.directory) == ["1"]  # nothing was lost


@pytest.mark.parametrize("secs", [0, -1, float("nan")])
def test_hook_that_could_not_wait_is_refused(secs: float) -> None:
    with pytest.raises(ValueError, match="timeout_secs"):
        FinalizeHook(timeout_secs=secs)
