"""Steps that are due while the checkpoint before is on its way: waited for, or skipped."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from stub_trainer import EVERYTHING, Loop, StubTrainer, begun, end_step, new_state
from things import MOST_SECS

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback
from flax_partial.callbacks._finalizer import Finalizer
from flax_partial.callbacks._members import Behind
from flax_partial.storage import session_dir

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@pytest.fixture(autouse=True)
def _nothing_is_committed_before_training_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for, commit, wait = threading.Event(), session_dir.commit_part, Finalizer.wait

    def commit_later(*arguments: Any, **options: Any) -> None:
        assert waited_for.wait(MOST_SECS)
        commit(*arguments, **options)

    def wait_as_seen(finalizer: Finalizer, *arguments: Any, **options: Any) -> None:
        if finalizer.is_behind:
            waited_for.set()
        wait(finalizer, *arguments, **options)

    monkeypatch.setattr(session_dir, "commit_part", commit_later)
    monkeypatch.setattr(Finalizer, "wait", wait_as_seen)


def saving(directory: Path, every: int = 1, **options: Any) -> PartialCheckpointCallback:
    options = {"when_behind": "skip", "every_n_epochs": None, **options}
    return PartialCheckpointCallback(directory, every_n_train_steps=every, **options)


def saved(directory: Path) -> list[int]:
    """The steps that were saved; each checkpoint is whole."""
    steps = fp.steps(directory)
    for step in steps:
        assert fp.verify(directory / str(step)).ok
        fp.load(directory / str(step), new_state(step))
    return sorted(steps)


@pytest.mark.parametrize("streamed", [(), EVERYTHING], ids=["at the step's end", "streamed"])
@pytest.mark.parametrize(
    ("every", "batches", "expected"),
    [
        pytest.param(1, 5, ([1, 5], 3), id="every step: all but the last of the epoch"),
        pytest.param(2, 7, ([2, 7], 2), id="the epoch's last step in place of a skipped one"),
        pytest.param(2, 3, ([2], 0), id="the epoch's last step only where one was skipped"),
    ],
)
def test_a_step_is_skipped_while_the_one_before_is_on_its_way(
    tmp_path: Path,
    streamed: Iterable[tuple[str, str]],
    every: int,
    batches: int,
    expected: tuple[list[int], int],
) -> None:
    callback = saving(tmp_path, every)
    Loop(callback, batches=batches, streamed=streamed).fit()
    assert (saved(tmp_path), callback.skipped_saves) == expected


def test_by_default_no_step_is_skipped(tmp_path: Path) -> None:
    callback = saving(tmp_path, when_behind="wait")
    Loop(callback, batches=4).fit()
    assert (saved(tmp_path), callback.skipped_saves) == ([1, 2, 3, 4], 0)


def test_no_callback_skips_unless_all_of_the_directory_do(tmp_path: Path) -> None:
    hook = FinalizeHook()
    callbacks = [
        saving(
            tmp_path,
            when_behind=when,
            finalizer=hook,
            state_fn=lambda trainer, _, root=root: {root: trainer.state[root]},
        )
        for when, root in (("skip", "params"), ("wait", "opt_state"))
    ]
    Loop(*callbacks, batches=3).fit()
    assert sorted(fp.steps(tmp_path)) == [1, 2, 3]
    assert set(fp.load(tmp_path / "2")) == {"params", "opt_state"}


def test_the_last_step_of_a_run_is_saved_in_place_of_a_skipped_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no batch is said to be the last, and no epoch ends."""
    callback = saving(tmp_path, 2)
    trainer = begun(callback)
    with caplog.at_level(logging.INFO, "flax_partial"):
        for step in range(1, 6):
            end_step(callback, trainer, step)
    assert "Step 4 is not saved" in caplog.text
    callback.on_train_end(trainer, None)
    callback.teardown(trainer, None, "fit")
    assert (saved(tmp_path), callback.skipped_saves) == ([2, 5], 1)


@pytest.mark.parametrize("last", [4, 5], ids=["which was skipped", "which was not due"])
def test_the_last_step_of_a_run_is_saved_by_all_callbacks_that_skipped_one(
    tmp_path: Path, last: int
) -> None:
    hook = FinalizeHook()
    callbacks = [
        saving(
            tmp_path,
            2,
            finalizer=hook,
            state_fn=lambda trainer, _, root=root: {root: trainer.state[root]},
        )
        for root in ("params", "opt_state")
    ]
    trainer = StubTrainer()
    for callback in callbacks:
        callback.on_fit_start(trainer, None)
    for step in range(1, last + 1):
        for callback in callbacks:
            end_step(callback, trainer, step)
    for callback in callbacks:
        callback.on_train_end(trainer, None)
    assert sorted(fp.steps(tmp_path)) == [2, last]
    assert set(fp.load(tmp_path / f"{last}")) == {"params", "opt_state"}
    assert [callback.skipped_saves for callback in callbacks] == [1, 1]


def test_a_step_that_another_run_trains_again_is_decided_about_anew() -> None:
    answers = iter([True, False])
    behind = Behind(lambda: next(answers), timeout_secs=1)
    assert [behind.skips(4, name) for name in ("run", "run", "next", "run")] == [
        True,
        True,
        False,
        True,
    ]


def test_the_first_to_ask_decides_about_a_step() -> None:
    answers = iter([True, False, False])
    behind = Behind(lambda: next(answers), timeout_secs=1)
    assert [behind.skips(step, "run") for step in (1, 2, 1, 2, 3)] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_another_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="when_behind is 'drop'"):
        PartialCheckpointCallback(tmp_path, when_behind="drop")  # type: ignore[arg-type]
