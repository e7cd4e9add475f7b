"""What the callback promises when something fails: no hang, no mixture, nothing half finalized."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from no_memory import no_memory
from stub_trainer import (
    EVERYTHING,
    PARAMS,
    Loop,
    StubTrainer,
    begun,
    end_step,
    fitted,
    new_state,
    raise_zero_division,
    restored,
    run_program,
)
from test_callback import assert_is_step, names_in, wait_for_leaves
from things import files_of_at_most

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback, checkpointing
from flax_partial.runs import completeness
from flax_partial.storage import session_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["no_memory"]  # a fixture

pytestmark = pytest.mark.usefixtures("_logged")


@pytest.fixture
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flax_partial")


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """No file may grow over 1 MiB: larger groups fail in the background, as on a full disk."""
    with files_of_at_most(2**20):
        yield


class StateError(Exception):
    """What a test's own `state_fn` raises."""


UNSAVABLE = {"w": object()}
UNSORTABLE = {"a": 1, 2: 3}
TOO_LARGE = {"w": np.arange(2**20)}

FAILING = pytest.mark.parametrize(
    ("tree", "kind", "message"),
    [
        pytest.param(UNSAVABLE, fp.UnsupportedLeafError, "params.bad.w", id="refused at once"),
        pytest.param(UNSORTABLE, ValueError, "Comparator raised", id="no tree at all"),
        pytest.param(TOO_LARGE, OSError, "too large", id="failed in the background"),
    ],
)


class EndsUntold:
    """A callback that is not told how training ends."""

    def __init__(self, callback: PartialCheckpointCallback) -> None:
        self._callback = callback

    def __getattr__(self, hook: str) -> Any:
        is_end = hook in ("on_train_end", "on_exception", "teardown")
        return (lambda *_: None) if is_end else getattr(self._callback, hook)


def streams_in_step(
    callback: PartialCheckpointCallback, step: int, tree: Any
) -> Callable[[StubTrainer], None]:
    def stream(trainer: StubTrainer) -> None:
        if trainer.global_step + 1 == step:
            callback.on_layer_ready(trainer, "bad", tree)

    return stream


@FAILING
@pytest.mark.usefixtures("_full_disk")
def test_failed_save_is_raised_at_the_next_hook(
    tmp_path: Path, tree: Any, kind: Any, message: str
) -> None:
    callback = PartialCheckpointCallback(tmp_path, every_n_epochs=None, every_n_train_steps=1)

    def wait_until_it_failed(trainer: StubTrainer) -> None:
        while trainer.global_step == 3 and not callback.failed_saves:
            time.sleep(0.01)

    stream = streams_in_step(callback, 3, tree)
    at = {"ready": stream, "on_train_batch_end": wait_until_it_failed}
    loop = Loop(callback, batches=9, at=at)
    with pytest.raises(kind, match=message) as caught:
        loop.fit()
    assert any("step 3" in note for note in caught.value.__notes__)
    assert loop.trainer.global_step <= 3
    assert callback.failed_saves == 1
    assert fp.steps(tmp_path) == [1, 2]


@FAILING
@pytest.mark.usefixtures("_full_disk")
def test_failed_save_is_logged_and_counted_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tree: Any, kind: Any, message: str
) -> None:
    callback = PartialCheckpointCallback(tmp_path, every_n_train_steps=1, on_save_error="warn")
    at = {"ready": streams_in_step(callback, 2, tree)}
    Loop(callback, batches=4, streamed=PARAMS, at=at).fit()
    assert names_in(tmp_path) == ["1", "3", "4"]
    assert_is_step(tmp_path / "3", 3)
    assert callback.failed_saves == 1
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
    assert isinstance(errors[0].exc_info[1], kind)
    assert message in str(errors[0].exc_info[1])
    assert "Dropped the unfinished checkpoint" in caplog.text


@pytest.mark.usefixtures("_full_disk")
def test_one_callback_of_two_fails_and_nothing_is_finalized(tmp_path: Path) -> None:
    hook = FinalizeHook()
    one = PartialCheckpointCallback(tmp_path, finalizer=hook, on_save_error="warn")
    two = PartialCheckpointCallback(tmp_path, finalizer=hook, on_save_error="warn")
    receivers = {"params": one, "opt_state": two}
    at = {"ready": streams_in_step(two, 2, TOO_LARGE)}
    Loop(one, two, epochs=2, streamed=EVERYTHING, receivers=receivers, at=at).fit()
    assert names_in(tmp_path) == ["4"]
    assert (one.failed_saves, two.failed_saves) == (0, 1)


def test_state_fn_that_raises_is_a_failed_save(tmp_path: Path) -> None:
    def state_fn(trainer: StubTrainer, _: Any) -> Any:
        if trainer.global_step == 2:
            raise StateError("no state")
        return trainer.state

    options: Any = {"state_fn": state_fn, "epochs": 2}
    fitted(tmp_path / "w", on_save_error="warn", streamed=PARAMS, **options)
    assert names_in(tmp_path / "w") == ["4"]
    with pytest.raises(StateError):
        fitted(tmp_path / "r", **options)


@pytest.mark.usefixtures("_full_disk")
def test_save_now_raises_what_is_logged_alone_elsewhere(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_train_steps=100, on_save_error="warn") as ckpt:
        ckpt.step(TOO_LARGE)
        with pytest.raises(OSError, match="too large"):
            ckpt.save_now()
        ckpt.step({"w": np.arange(2)})
        assert ckpt.save_now() == tmp_path / "2"


@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
def test_save_now_called_again_saves_what_failed(tmp_path: Path, on_save_error: Any) -> None:
    with checkpointing(tmp_path, every_n_train_steps=100, on_save_error=on_save_error) as ckpt:
        with files_of_at_most(2**20):
            ckpt.step(TOO_LARGE)
            for _ in range(2):
                with pytest.raises(OSError, match="too large"):
                    ckpt.save_now()
        assert ckpt.save_now() == tmp_path / "1"
    np.testing.assert_array_equal(fp.load(tmp_path / "1")["w"], TOO_LARGE["w"])


def test_nothing_to_save_is_said(tmp_path: Path) -> None:
    trainer = StubTrainer()
    trainer.state, trainer.global_step, trainer.is_last_batch = object(), 1, True
    with pytest.raises(TypeError, match="Pass state_fn="):
        PartialCheckpointCallback(tmp_path).on_train_batch_end(trainer, None, None, None, 0)
    with pytest.raises(fp.EmptyStateError):
        fitted(tmp_path, state_fn=lambda *_: {})
    assert names_in(tmp_path) == []


@pytest.fixture
def blocked(tmp_path: Path) -> dict[str, Callable[[StubTrainer], None]]:
    """A loop's `at` in which the place of step 2 is taken once all of it is saved."""

    def block(_: StubTrainer) -> None:
        wait_for_leaves(tmp_path / "2", 17)
        (tmp_path / "2").mkdir()

    return {"on_train_epoch_end": block}


def test_failed_finalize_is_raised_and_nothing_is_lost(tmp_path: Path, blocked: Any) -> None:
    with pytest.raises(fp.CheckpointExistsError):
        fitted(tmp_path, at=blocked)
    assert names_in(tmp_path) == ["2", "2.partial_save"]
    (tmp_path / "2").rmdir()
    begun(PartialCheckpointCallback(tmp_path))
    assert_is_step(tmp_path / "2", 2)


def test_failed_finalize_is_counted_by_all_callbacks(tmp_path: Path, blocked: Any) -> None:
    shared: Any = {"finalizer": FinalizeHook(), "on_save_error": "warn"}
    callbacks = [PartialCheckpointCallback(tmp_path, **shared) for _ in range(2)]
    Loop(*callbacks, at=blocked).fit()
    assert [callback.failed_saves for callback in callbacks] == [1, 1]


def test_exception_lets_saves_finish_and_leaves_the_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(trainer: StubTrainer) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, epochs=2, streamed=PARAMS, at={"ready": interrupt})
    assert names_in(tmp_path) == ["2", "4.partial_save"]
    assert len(fp.status(tmp_path / "4").leaves) == 8
    assert f"Left {tmp_path / '4'} unfinished" in caplog.text


@pytest.mark.usefixtures("_full_disk")
def test_exception_is_not_hidden_by_a_save_that_failed_since_the_last_hook(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = PartialCheckpointCallback(tmp_path, every_n_train_steps=1)
    create_part, hook_has_ended = session_dir.create_part, threading.Event()

    def create_later(*arguments: Any) -> Path:
        assert hook_has_ended.wait(250)
        return create_part(*arguments)

    monkeypatch.setattr(session_dir, "create_part", create_later)

    def fail(trainer: StubTrainer) -> None:
        callback.on_layer_ready(trainer, "bad", TOO_LARGE)
        hook_has_ended.set()
        while not callback.failed_saves:
            time.sleep(0.01)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Loop(callback, at={"ready": fail}).fit()
    assert "file too large" in caplog.text.lower()


def test_session_left_complete_is_finalized_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for streamed in (frozenset(), PARAMS, EVERYTHING):
        directory = tmp_path / str(len(streamed))
        with pytest.raises(ZeroDivisionError):
            fitted(directory, streamed=streamed, at={"on_train_epoch_end": raise_zero_division})
        assert names_in(directory) == ["2.partial_save"]
        begun(PartialCheckpointCallback(directory))
        assert_is_step(directory / "2", 2)
        assert f"Finalized {directory / '2'}" in caplog.text


def test_session_of_slices_only_is_recovered(tmp_path: Path) -> None:
    rows = np.arange(6.0).reshape(3, 2)
    callback = PartialCheckpointCallback(tmp_path, state_fn=lambda *_: {})

    def stream(trainer: StubTrainer) -> None:
        if trainer.is_last_batch:
            for row in range(3):
                piece = fp.Slice(rows[row : row + 1], row, 3)
                callback.on_layer_ready(trainer, "stacked", piece)

    with pytest.raises(ZeroDivisionError):
        Loop(callback, at={"ready": stream, "on_train_epoch_end": raise_zero_division}).fit()
    state, _ = restored(
        PartialCheckpointCallback(tmp_path), {"params": {"stacked": rows}}, partial=True
    )
    np.testing.assert_array_equal(state["params"]["stacked"], rows)


def test_session_of_two_callbacks_is_complete_with_the_groups_of_both(tmp_path: Path) -> None:
    class Raises:
        """Stands between the two callbacks in the trainer's list."""

        def __getattr__(self, hook: str) -> Any:
            return fail_at_batch_end if hook == "on_train_batch_end" else lambda *_: None

    def fail_at_batch_end(trainer: StubTrainer, *_: Any) -> None:
        if trainer.is_last_batch:
            raise ZeroDivisionError

    for between, recovered in ((True, []), (False, [2])):
        directory = tmp_path / str(between)
        hook = FinalizeHook()
        one = PartialCheckpointCallback(
            directory, finalizer=hook, state_fn=lambda trainer, _: {"a": trainer.state["params"]}
        )
        two = PartialCheckpointCallback(
            directory, finalizer=hook, state_fn=lambda trainer, _: {"b": trainer.state["seen"]}
        )
        order = [one, Raises(), two] if between else [one, two, Raises()]
        with pytest.raises(ZeroDivisionError):
            Loop(*order).fit()
        assert names_in(directory) == ["2.partial_save"]
        PartialCheckpointCallback(directory).recover()
        assert fp.steps(directory) == recovered
        assert names_in(directory) == [str(step) for step in recovered]


def test_session_left_incomplete_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fp.save(tmp_path / "2", {"a": 1}, custom_metadata={"step": 2})
    fp.save(tmp_path / "3", {"a": 1})
    fp.save(tmp_path / "mine", {"a": 1})
    begun(PartialCheckpointCallback(tmp_path))
    assert names_in(tmp_path) == ["mine.partial_save"]
    assert f"Dropped the unfinished checkpoint {tmp_path / '2'}: " in caplog.text
    assert (
        "step 2 was not completely written, and its process has ended. There is no checkpoint in"
        in caplog.text
    )
    assert "was not saved by callbacks in step 3" in caplog.text


def test_session_whose_checkpoint_is_there_is_dropped(tmp_path: Path) -> None:
    fitted(tmp_path)
    (tmp_path / "2").rename(tmp_path / "aside")
    fitted(tmp_path / "other")
    (tmp_path / "other" / "2").rename(tmp_path / "2.partial_save")
    (tmp_path / "aside").rename(tmp_path / "2")
    PartialCheckpointCallback(tmp_path).recover()
    assert names_in(tmp_path) == ["2", "other"]
    assert_is_step(tmp_path / "2", 2)


def test_torn_part_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, at={"on_train_epoch_end": raise_zero_division})
    part = fp.status(tmp_path / "2").parts[3]
    (tmp_path / "2.partial_save" / "state" / part.name / "part.json").unlink()
    PartialCheckpointCallback(tmp_path).recover()
    assert names_in(tmp_path) == []


def test_removal_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=3)
    half = tmp_path / f".2.{'0b' * 16}.deleted"
    (tmp_path / "2").rename(half)
    (tmp_path / "4").rename(tmp_path / f".4.partial_save.{'0a' * 16}.deleted")
    (half / "link").symlink_to(tmp_path / "6")
    callback = PartialCheckpointCallback(tmp_path)
    assert fp.steps(tmp_path) == [6]
    callback.recover()
    callback.finalizer.wait()
    assert names_in(tmp_path) == ["6"]
    assert_is_step(tmp_path / "6", 6)


def test_checkpoint_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def move_away(trainer: StubTrainer) -> None:
        if trainer.global_step == 2:
            while fp.steps(run) != [2]:
                time.sleep(0.01)
            (run / "2").rename(tmp_path / "elsewhere")
            (run / "2").symlink_to(tmp_path / "elsewhere")

    run = tmp_path / "run"
    callback = fitted(run, keep_last=1, epochs=4, at={"on_train_batch_start": move_away})
    assert fp.steps(run) == [2, 8]
    assert f"Could not remove the checkpoint {run / '2'}" in caplog.text
    assert callback.failed_saves == 0
    assert_is_step(tmp_path / "elsewhere", 2)


def test_session_with_files_of_somebody_else_is_left_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fp.save(tmp_path / "2", {"a": 1})
    (tmp_path / "2.partial_save" / "notes.txt").write_text("mine")
    PartialCheckpointCallback(tmp_path).recover()
    assert names_in(tmp_path) == ["2.partial_save"]
    assert f"Left the unfinished checkpoint {tmp_path / '2'} as it is" in caplog.text


def test_training_that_saves_faster_than_the_disk_slows_down(tmp_path: Path) -> None:
    def look(_: StubTrainer) -> None:
        sessions.append(len([name for name in names_in(tmp_path) if "partial_save" in name]))

    sessions: list[int] = []
    at = {"on_train_batch_end": look}
    fitted(tmp_path, every_n_train_steps=1, batches=20, streamed=PARAMS, at=at)
    assert len(sessions) == 20
    assert max(sessions) == 1


def test_restore_finalizes_what_an_ended_run_left_before_it_chooses(tmp_path: Path) -> None:
    def fail(trainer: StubTrainer) -> None:
        if trainer.global_step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, epochs=2, at={"on_train_epoch_end": fail})
    state, step = restored(PartialCheckpointCallback(tmp_path), new_state(0))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, state, new_state(4))


@pytest.mark.parametrize("skips", [True, False], ids=["skipped", "training ended"])
def test_layers_of_a_step_that_never_ended_reach_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, skips: bool
) -> None:
    """The trainer streams a step and skips its end, as for a batch with a bad gradient."""
    callback = PartialCheckpointCallback(tmp_path, every_n_epochs=None, every_n_train_steps=1)
    trainer = begun(callback)
    callback.on_layer_ready(trainer, "head", new_state(1)["params"]["head"])
    if skips:
        end_step(callback, trainer, 2)
    callback.on_train_end(trainer, None)
    assert names_in(tmp_path) == (["2"] if skips else [])
    for step in fp.steps(tmp_path):
        assert_is_step(tmp_path / str(step), step)
    said = f"Dropped the unfinished checkpoint {tmp_path / '1'}: its step never ended"
    assert said in caplog.text


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=3)
    with pytest.raises(fp.CheckpointExistsError, match="holds step 6 already"):
        fitted(tmp_path)
    callback = fitted(tmp_path, on_save_error="warn", epochs=4)
    assert callback.failed_saves == 3
    assert names_in(tmp_path) == ["2", "4", "6", "8"]
    assert_is_step(tmp_path / "4", 4)


def test_two_callbacks_in_one_directory_are_told_to_share_a_hook(tmp_path: Path) -> None:
    callbacks = [PartialCheckpointCallback(tmp_path, every_n_train_steps=1) for _ in range(2)]
    with pytest.raises(ValueError, match="one FinalizeHook"):
        Loop(*callbacks).fit()


_READER = """
import os, sys
# All of it, before this process may not read what root installed.
import jax.experimental.multihost_utils
from flax_partial import load
from pathlib import Path
from flax_partial.callbacks import PartialCheckpointCallback

os.seteuid(65534)
state, step = PartialCheckpointCallback(sys.argv[1]).restore({"a": 0})
assert (state, step) == ({"a": 1}, 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("is_whole", [True, False], ids=["to be finalized", "to be dropped"])
def test_restore_by_a_user_who_may_only_read_changes_nothing(*, is_whole: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        fp.save(run / "1", {"a": 1})
        fp.finalize(run / "1")
        session = completeness.saved(callback="c", group="a")
        session |= completeness.closing(["c"], callback="c", groups=["a"]) if is_whole else {}
        fp.save(run / "2", {"a": 2}, custom_metadata={"step": 2, "session": session})
        run.chmod(0o755)
        run_program(_READER, run)
        assert names_in(run) == ["1", "2.partial_save"]


def test_run_waits_for_what_one_before_it_in_this_process_still_finalizes(tmp_path: Path) -> None:
    """Keras tells no callback that `fit` raised, and a second `fit` may follow at once."""

    class Metric:
        """Is computed by when the second run restores, unless that waits for the first."""

        def __float__(self) -> float:
            second.start()
            is_computed.set()
            second.join(1)
            return 0.5

    found: list[Any] = []
    is_computed = threading.Event()
    first, again = (PartialCheckpointCallback(tmp_path) for _ in range(2))
    second = threading.Thread(target=lambda: found.append(again.restore(new_state(0))))
    Loop(EndsUntold(first), batches=1, metrics=lambda _: {"loss": Metric()}).fit()
    assert is_computed.wait(250)
    second.join()
    assert first.failed_saves == 0
    assert found[0][1] == 1
    assert fp.metadata(tmp_path / "1").custom_metadata["metrics"] == {"loss": 0.5}
    Loop(again, batches=1, epochs=2).resume(*found[0]).fit()
    assert names_in(tmp_path) == ["1", "2"]


def test_run_drops_what_one_before_it_in_this_process_never_ended(tmp_path: Path) -> None:
    first = EndsUntold(PartialCheckpointCallback(tmp_path))
    with pytest.raises(ZeroDivisionError):
        Loop(first, batches=1, streamed=PARAMS, at={"ready": raise_zero_division}).fit()
    fitted(tmp_path, batches=1)
    assert names_in(tmp_path) == ["1"]
    assert_is_step(tmp_path / "1", 1)


def test_callback_that_left_is_not_waited_for(tmp_path: Path) -> None:
    hook = FinalizeHook()
    fitted(tmp_path, finalizer=hook)
    again = PartialCheckpointCallback(tmp_path, finalizer=hook)
    Loop(again, epochs=2).resume(new_state(2), 2).fit()
    assert fp.steps(tmp_path) == [2, 4]


_RUN_THAT_JUST_ENDS = """
import sys
from stub_trainer import begun, end_step
from flax_partial.callbacks import PartialCheckpointCallback

callback = PartialCheckpointCallback(sys.argv[1], every_n_train_steps=1, keep_last=1)
trainer = begun(callback)
for step in (1, 2):
    trainer.callback_metrics = {"loss": 0.5}
    end_step(callback, trainer, step)
"""


def test_process_that_ends_without_a_word_finalizes_first(tmp_path: Path) -> None:
    run_program(_RUN_THAT_JUST_ENDS, tmp_path)
    assert names_in(tmp_path) == ["2"]
    assert_is_step(tmp_path / "2", 2)


_KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from stub_trainer import EVERYTHING, Loop
from test_callback import wait_for_leaves
from flax_partial.callbacks import PartialCheckpointCallback

directory, moment, leaves = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def kill(trainer):
    if trainer.current_epoch == 1 and trainer.is_last_batch:
        wait_for_leaves(directory / "4", leaves)
        os.kill(os.getpid(), signal.SIGKILL)

Loop(PartialCheckpointCallback(directory), epochs=3, streamed=EVERYTHING, at={moment: kill}).fit()
"""


@pytest.mark.parametrize(
    ("moment", "leaves", "recovered"),
    [
        pytest.param("ready", 16, 2, id="all streamed, the step not ended"),
        pytest.param("on_train_epoch_end", 17, 4, id="all saved, not finalized"),
    ],
)
def test_killed_run_goes_on_from_what_was_whole(
    tmp_path: Path, moment: str, leaves: int, recovered: int
) -> None:
    status = run_program(_KILLED_RUN, tmp_path, moment, leaves, check=False)
    assert status == -signal.SIGKILL
    assert "4.partial_save" in names_in(tmp_path)
    callback = PartialCheckpointCallback(tmp_path)
    state, step = restored(callback, new_state(0))
    assert step == recovered
    Loop(callback, epochs=3, streamed=EVERYTHING).resume(state, step).fit()
    assert names_in(tmp_path) == ["2", "4", "6"]
    for step in (2, 4, 6):
        assert_is_step(tmp_path / str(step), step)


@pytest.mark.parametrize(
    ("shared", "again", "saved"),
    [
        pytest.param(False, True, ["2"], id="saved again"),
        pytest.param(False, False, [], id="not handed again"),
        pytest.param(True, True, [], id="two callbacks may disagree"),
    ],
)
def test_the_last_step_is_saved_again_where_a_device_had_no_memory_for_copies(
    tmp_path: Path,
    no_memory: threading.Event,
    caplog: pytest.LogCaptureFixture,
    *,
    shared: bool,
    again: bool,
    saved: list[str],
) -> None:
    """The arrays that were copied are gone: they were made for the save alone."""

    def state_fn(trainer: StubTrainer, _: Any) -> Any:
        is_there = again or not no_memory.is_set()
        return jax.tree.map(jnp.copy, trainer.state) if is_there else None

    options: Any = {"options": fp.SaveOptions(durable=False, max_device_bytes=1 << 20)}
    options |= {"finalizer": FinalizeHook(), "every_n_train_steps": 2, "state_fn": state_fn}
    callback = PartialCheckpointCallback(tmp_path, **options)
    trainer = begun(callback)
    if shared:
        other = PartialCheckpointCallback(tmp_path, **options)
        other.on_fit_start(trainer, None)
    end_step(callback, trainer, 2)
    if shared:
        end_step(other, trainer, 2)
    no_memory.set()
    callback.on_train_end(trainer, None)
    assert names_in(tmp_path) == saved
    assert callback.failed_saves == 1
    assert ("could not be saved a second time" in caplog.text) is not again
    if saved:
        assert_is_step(tmp_path / "2", 2)
        assert fp.metadata(tmp_path / "2").training["progress"]["steps_of_epoch"] == 2
    if shared:
        other.on_train_end(trainer, None)


def test_a_failed_training_has_no_step_saved_again(
    tmp_path: Path, no_memory: threading.Event
) -> None:
    """Its state may be that of the step that failed."""

    def fail(trainer: StubTrainer) -> None:
        if trainer.global_step == 1:
            no_memory.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(
            tmp_path,
            every_n_train_steps=1,
            state_fn=lambda trainer, _: jax.tree.map(jnp.copy, trainer.state),
            options=fp.SaveOptions(durable=False, max_device_bytes=1 << 20),
            at={"ready": fail},
        )
    assert fp.steps(tmp_path) == []


@pytest.mark.parametrize("ends", ["close", "save_now", "block"])
def test_a_loop_saves_the_last_step_again_however_it_ends(
    tmp_path: Path, no_memory: threading.Event, ends: str
) -> None:
    options: Any = {"options": fp.SaveOptions(durable=False, max_device_bytes=1 << 20)}
    with checkpointing(tmp_path, every_n_train_steps=1, stacked={"w": 0}, **options) as ckpt:
        ckpt.restore({"w": jnp.zeros((3, 4))})
        ckpt.step({"w": jnp.ones((3, 4))})
        no_memory.set()
        if ends == "save_now":
            assert ckpt.save_now().exists()
        elif ends == "close":
            ckpt.close()
    np.testing.assert_array_equal(fp.load(tmp_path / "1")["w"], np.ones((3, 4)))
    assert ckpt.callback.failed_saves == 1


def test_a_device_without_memory_for_copies_costs_one_checkpoint_and_ends_no_training(
    tmp_path: Path, no_memory: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """It reports that once the arrays are donated; what is saved later is saved without copies."""
    callback = fitted(
        tmp_path,
        batches=4,
        every_n_epochs=None,
        every_n_train_steps=1,
        options=fp.SaveOptions(durable=False, max_device_bytes=1 << 20),
        at={"ready": lambda trainer: trainer.global_step == 1 and no_memory.set()},
    )
    assert names_in(tmp_path) == ["2", "3", "4"]
    for step in (2, 3, 4):
        assert_is_step(tmp_path / f"{step}", step)
    assert callback.failed_saves == 1
    (record,) = (one for one in caplog.records if one.exc_info)
    assert isinstance(record.exc_info[1], fp.DeviceMemoryError)
    assert "the checkpoint of step 1" in "".join(record.exc_info[1].__notes__)
