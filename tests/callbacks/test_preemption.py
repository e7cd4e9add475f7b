"""SIGTERM and exceptions: the last finished step is saved before training ends."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from preloaded import server
from stub_trainer import EVERYTHING, Loop, StoppableTrainer, StubTrainer, begun, fitted
from test_callback import assert_is_step, names_in

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TERMINATED = 143
SELDOM: dict[str, Any] = {"every_n_epochs": None, "every_n_train_steps": 1000}


@pytest.fixture(autouse=True)
def _handler_is_brought_back() -> Iterator[None]:
    gc.collect()  # of callbacks that other tests have left: the last gives the handler back
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


def at_step(step: int, act: Callable[[], object]) -> Callable[[StubTrainer], None]:
    return lambda trainer: act() if trainer.global_step + 1 == step else None  # type: ignore[func-returns-value]


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


AT_STEP_2 = {"ready": at_step(2, terminate)}


def trained(directory: Path, **options: Any) -> PartialCheckpointCallback:
    """Nine steps, of which none is to be saved but for what happens."""
    return fitted(directory, **SELDOM | {"batches": 9} | options)


# In a process of its own.


def train(directory: Path, kind: str) -> None:
    """Waits in the middle of step 3 until it has been told to end."""

    def wait() -> None:
        (directory / "is in step 3").touch()
        while not (directory / "was told").exists():
            time.sleep(0.01)

    def handler(number: int, _: object) -> None:
        (directory / f"handler of {number} saw {fp.steps(directory / 'run')}").touch()
        sys.exit(7)

    if kind == "handler":
        signal.signal(signal.SIGTERM, handler)
    trainer = StoppableTrainer() if kind == "should_stop" else StubTrainer()
    at = {"ready": at_step(3, wait)}
    trained(directory / "run", streamed=EVERYTHING, at=at, trainer=trainer)
    (directory / f"ended at step {trainer.global_step}").touch()


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("nothing", TERMINATED, []),
        ("should_stop", 0, ["ended at step 3"]),
        ("handler", 7, [f"handler of {int(signal.SIGTERM)} saw [3]"]),
    ],
)
def test_step_under_way_is_saved_before_the_process_ends(
    tmp_path: Path, kind: str, status: int, says: list[str]
) -> None:
    process = server().Process(target=train, args=(tmp_path, kind))
    process.start()
    assert process.pid is not None
    while not (tmp_path / "is in step 3").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "was told").touch()
    process.join(250)
    assert process.exitcode == status
    assert names_in(tmp_path / "run") == ["3"]
    assert_is_step(tmp_path / "run" / "3", 3)
    assert set(names_in(tmp_path)) == {"is in step 3", "was told", "run", *says}


# In this one.


def test_signal_between_two_callbacks_saves_the_next_step_in_both(tmp_path: Path) -> None:
    class Between:
        def __getattr__(self, _: str) -> Any:
            return lambda *_: None

        def on_train_batch_end(self, trainer: StubTrainer, *_: Any) -> None:
            if trainer.global_step == 3:
                terminate()

    hook = FinalizeHook()
    one, two = (PartialCheckpointCallback(tmp_path, finalizer=hook, **SELDOM) for _ in range(2))
    streamed, trainer = [("opt_state", "head")], StoppableTrainer()
    Loop(one, Between(), two, batches=9, streamed=streamed, trainer=trainer).fit()
    assert trainer.global_step == 4
    assert names_in(tmp_path) == ["4"]
    assert_is_step(tmp_path / "4", 4)
    assert len(hook.reports) == 1


def test_callbacks_with_hooks_of_their_own_all_save_before_the_exit(tmp_path: Path) -> None:
    one, two = (PartialCheckpointCallback(tmp_path / name, **SELDOM) for name in "ab")
    loop = Loop(one, two, batches=9, at=AT_STEP_2)
    with pytest.raises(SystemExit) as caught:
        loop.fit()
    assert caught.value.code == TERMINATED
    assert [fp.steps(tmp_path / name) for name in "ab"] == [[2], [2]]


def test_another_signal_works_like_sigterm_where_it_is_listened_to(tmp_path: Path) -> None:
    both = {"preemption_signals": (signal.SIGTERM, signal.SIGUSR1)}
    for name, number in (("usr1", signal.SIGUSR1), ("term", signal.SIGTERM)):
        at = {"ready": at_step(2, lambda number=number: signal.raise_signal(number))}
        with pytest.raises(SystemExit) as caught:
            trained(tmp_path / name, at=at, **both)
        assert caught.value.code == 128 + number
        assert fp.steps(tmp_path / name) == [2]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
def test_signal_after_the_last_batch_saves_its_step(tmp_path: Path, hook: str) -> None:
    trainer = StoppableTrainer()
    trained(tmp_path, batches=3, at={hook: lambda _: terminate()}, trainer=trainer)
    assert trainer.global_step == 3
    assert fp.steps(tmp_path) == [3]


def test_step_that_is_saved_anyway_is_saved_once(tmp_path: Path) -> None:
    of_loop = {"at": AT_STEP_2, "metrics": lambda step: {"loss": step}, "epochs": 2}
    trainer = StoppableTrainer()
    callback = fitted(tmp_path, every_n_train_steps=1, monitor="loss", trainer=trainer, **of_loop)
    assert [report.step for report in callback.reports] == [1, 2]
    assert callback.reports[-1].metrics == {"loss": 2}


def test_training_that_goes_on_all_the_same_saves_as_before(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        trained(tmp_path, every_n_train_steps=4, at=AT_STEP_2)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGTERM]
    assert fp.steps(tmp_path) == [2, 4, 8]


@pytest.mark.parametrize(
    ("handler", "options"),
    [(signal.SIG_IGN, {}), (signal.SIG_DFL, {"save_on_preemption": False})],
    ids=["ignored before", "not wanted"],
)
def test_signal_is_left_alone(tmp_path: Path, handler: Any, options: Any) -> None:
    def look() -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[Any] = []
    signal.signal(signal.SIGTERM, handler)
    try:
        trained(tmp_path, at={"ready": at_step(1, look)}, **options)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [handler]


def test_signal_is_for_the_run_that_listened(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path, at=AT_STEP_2)
    later = PartialCheckpointCallback(tmp_path / "later", **SELDOM)
    trainer = StubTrainer()
    for trainer.global_step in (1, 2):  # it is told of nothing else, and so does not listen
        later.on_train_batch_end(trainer, None, None, None, 0)
    later.on_train_end(trainer, None)
    assert later.reports == ()


def test_run_that_was_never_told_of_its_end_keeps_no_other_from_stopping(tmp_path: Path) -> None:
    abandoned = PartialCheckpointCallback(tmp_path, **SELDOM)
    begun(abandoned)
    with pytest.raises(SystemExit):
        trained(tmp_path, at=AT_STEP_2)
    assert fp.steps(tmp_path) == [2]
    assert abandoned.failed_saves == 0


def test_handler_of_a_run_that_was_forgotten_is_not_taken_for_one_of_before(
    tmp_path: Path,
) -> None:
    begun(PartialCheckpointCallback(tmp_path, **SELDOM))
    gc.collect()
    with pytest.raises(SystemExit):
        trained(tmp_path, at=AT_STEP_2)
    assert fp.steps(tmp_path) == [2]


# Exceptions.


class StepError(Exception):
    """What a training step raises."""


def fail() -> None:
    raise StepError


BEFORE_STEP_3 = {"on_train_batch_start": at_step(3, fail)}
RESCUED: dict[str, Any] = {"save_on_exception": True}


def keep_arrays(trainer: StubTrainer) -> None:
    """Has the next step donate copies: what the loop holds stays."""
    trainer.state = jax.tree.map(jax.numpy.copy, trainer.state)


def test_exception_between_two_steps_saves_the_finished_one_and_says_so_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flax_partial")
    with pytest.raises(StepError):
        trained(tmp_path, at=BEFORE_STEP_3, metrics=lambda step: {"loss": step}, **RESCUED)
    assert names_in(tmp_path) == ["2"]
    assert_is_step(tmp_path / "2", 2)
    assert fp.metadata(tmp_path / "2").custom_metadata["metrics"] == {"loss": 2}
    assert caplog.text.index("step 2 is saved") < caplog.text.index("Finalized")


@pytest.mark.parametrize("streamed", [frozenset(), frozenset([("params", "head")])])
def test_exception_in_a_step_saves_the_one_before_if_that_is_still_there(
    tmp_path: Path, streamed: Any
) -> None:
    at = {"on_train_batch_start": keep_arrays, "ready": at_step(3, fail)}
    with pytest.raises(StepError):
        trained(tmp_path, every_n_train_steps=3, streamed=streamed, at=at, **RESCUED)
    assert fp.steps(tmp_path) == [2]
    assert_is_step(tmp_path / "2", 2)
    if streamed:  # what step 3 had saved is left to the next run, which drops it
        assert names_in(tmp_path) == ["2", "3.partial_save"]


def test_step_that_was_donated_to_the_failing_one_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StepError):
        trained(tmp_path, at={"ready": at_step(3, fail)}, **RESCUED)
    assert "arrays of step 2 were donated" in caplog.text
    assert fp.steps(tmp_path) == []


def test_numpy_state_that_is_changed_in_place_is_saved_as_it_was(tmp_path: Path) -> None:
    weights = np.zeros(3)

    def spoil() -> None:
        weights[0] = 99
        fail()

    at = {"ready": at_step(3, spoil)}
    with pytest.raises(StepError):
        trained(tmp_path, state_fn=lambda *_: {"w": weights}, at=at, **RESCUED)
    np.testing.assert_array_equal(fp.load(tmp_path / "2")["w"], [0, 0, 0])


def test_exception_saves_the_parts_of_all_callbacks_or_none(tmp_path: Path) -> None:
    options = {"finalizer": FinalizeHook(), **RESCUED, **SELDOM}
    params = PartialCheckpointCallback(
        tmp_path, state_fn=lambda t, _: {"params": t.state["params"]}, **options
    )
    rest = PartialCheckpointCallback(tmp_path, **options)
    with pytest.raises(StepError):
        Loop(params, rest, batches=9, at=BEFORE_STEP_3).fit()
    assert names_in(tmp_path) == ["2"]
    assert_is_step(tmp_path / "2", 2)


def test_exception_finalizes_what_waited_for_the_end_of_its_epoch(tmp_path: Path) -> None:
    with pytest.raises(StepError):
        fitted(tmp_path, at={"on_train_epoch_end": lambda _: fail()}, **RESCUED)
    assert names_in(tmp_path) == ["2"]


def test_what_is_still_to_be_written_is_said_before_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StepError):
        fitted(tmp_path, epochs=2, at={"on_train_epoch_end": lambda _: fail()})
    assert "Training ended by StepError; what is being saved of step 2 is finished" in caplog.text
    assert caplog.text.index("is finished first") < caplog.text.index("Left ")


def test_exception_without_being_asked_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StepError):
        trained(tmp_path, at=BEFORE_STEP_3)
    assert names_in(tmp_path) == []


def test_save_that_fails_then_hides_no_exception(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flax_partial")

    def bad(trainer: StubTrainer, _: Any) -> Any:
        return {"w": object() if trainer.global_step > 1 else 0}

    with pytest.raises(StepError):
        trained(tmp_path, state_fn=bad, at=BEFORE_STEP_3, **RESCUED)
    assert "Another checkpoint has failed, too" in caplog.text
    assert fp.steps(tmp_path) == []
