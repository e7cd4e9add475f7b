"""Others may look at a run while it trains; only what a dead one has left is recovered."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from shell import Shell
from stub_trainer import Loop, begun, end_step, fitted, new_state, run_program
from test_callback import assert_is_step, names_in, wait_for_leaves

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback
from flax_partial.cli.main import PROBLEM
from flax_partial.runs import liveness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OFTEN: dict[str, Any] = {"every_n_epochs": None, "every_n_train_steps": 1}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """The directory of a run within step 2, of which a layer is saved; it has to end well."""
    callback = PartialCheckpointCallback(tmp_path, **OFTEN)
    trainer = begun(callback)
    end_step(callback, trainer, 1)
    callback.finalizer.wait()
    callback.on_layer_ready(trainer, "head", new_state(2)["params"]["head"])
    wait_for_leaves(tmp_path / "2", 2)
    yield tmp_path
    end_step(callback, trainer, 2)
    callback.on_train_end(trainer, None)
    assert names_in(tmp_path) == ["1", "2"]
    assert_is_step(tmp_path / "2", 2)


_LOOKS = """
import sys
from flax_partial.callbacks import PartialCheckpointCallback

callback = PartialCheckpointCallback(sys.argv[1])
assert callback.restore()[1] == 1
callback.recover()
"""

_TRAINS = """
import sys
import flax_partial as fp
from stub_trainer import begun
from flax_partial.callbacks import PartialCheckpointCallback

try:
    begun(PartialCheckpointCallback(sys.argv[1], on_save_error="warn"))
except fp.CheckpointInUseError as error:
    assert f"process {sys.argv[2]} on " in str(error) and "FinalizeHook" in str(error), error
    assert "replace=True" not in str(error)
else:
    sys.exit("it has begun")
"""


def test_another_process_restores_and_leaves_the_run_alone(live: Path) -> None:
    run_program(_LOOKS, live)


def test_another_callback_of_the_process_restores_and_leaves_the_run_alone(live: Path) -> None:
    state, step = PartialCheckpointCallback(live).restore(new_state(0)) or (None, 0)
    assert (step, state is None) == (1, False)


def test_another_process_does_not_discard_what_it_has_saved(live: Path) -> None:
    callback = PartialCheckpointCallback(live)
    with pytest.raises(fp.CheckpointInUseError, match="Another run trains there"):
        callback.restore(new_state(0), discard_later=True)


def test_second_job_is_refused_before_it_trains(live: Path) -> None:
    run_program(_TRAINS, live, os.getpid())


def test_command_line_leaves_it_alone_unless_told_otherwise(
    live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    for command in ("abort --yes", "finalize"):
        name, *options = command.split()
        shell.run(name, live / "2", *options, status=PROBLEM)
        assert f"process {os.getpid()} on " in shell.error
        assert "--anyway" in shell.error
    assert shell.json("status", live / "2")["parts"]


def test_session_of_no_callback_is_finalized_beside_the_process_that_saved(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"a": 1})
    code = "import flax_partial as fp, sys; fp.finalize(sys.argv[1])"
    run_program(code, tmp_path / "1")
    assert fp.load(tmp_path / "1")["a"] == 1


def test_run_that_has_ended_leaves_the_directory_to_the_next(tmp_path: Path) -> None:
    fitted(tmp_path)
    assert liveness.living(tmp_path) is None
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path / "b", at={"on_train_epoch_end": lambda _: 1 // 0})
    assert liveness.living(tmp_path / "b") is None
    callback = PartialCheckpointCallback(tmp_path)
    trainer = begun(callback)
    assert str(os.getpid()) in (liveness.living(tmp_path) or "")
    callback.on_train_end(trainer, None)


_WITH_A_CHILD = """
import os, signal, sys, time
from stub_trainer import begun
from flax_partial.callbacks import PartialCheckpointCallback

callback = PartialCheckpointCallback(sys.argv[1])
begun(callback)
if not (child := os.fork()):
    time.sleep(100)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_of_a_dead_run_does_not_stand_for_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-P", "-c", _WITH_A_CHILD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.wait() == -signal.SIGKILL
        assert liveness.living(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_recovery_by_somebody_else_is_waited_for_and_no_longer_than_the_hook_says(
    tmp_path: Path,
) -> None:
    hook = FinalizeHook(timeout_secs=0.2)
    callback = PartialCheckpointCallback(tmp_path, finalizer=hook)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with pytest.raises(
            fp.CheckpointInUseError, match=r"been recovering it for more than 0\.2 s"
        ):
            callback.recover()
    finally:
        os.close(directory)
    callback.recover()


def test_session_that_another_process_writes_to_is_waited_for_no_longer_than_the_hook_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fp.save(tmp_path / "3", {"a": 1})
    hook = FinalizeHook(timeout_secs=0.1)
    callback = PartialCheckpointCallback(tmp_path, finalizer=hook)
    session = os.open(tmp_path / "3.partial_save", os.O_RDONLY)
    try:
        fcntl.flock(session, fcntl.LOCK_SH)
        callback.recover()
        trainer = begun(callback)
    finally:
        os.close(session)
    assert caplog.text.count("another process still saves into it") == 2
    assert names_in(tmp_path) == ["3.partial_save"]
    callback.on_train_end(trainer, None)
    callback.recover()
    assert names_in(tmp_path) == []


def test_run_that_cannot_be_locked_is_recognised_by_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    callback = PartialCheckpointCallback(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    life = liveness.Life(tmp_path)
    life.begin()
    assert f"process {os.getpid()} on " in str(liveness.living(tmp_path))
    callback.recover()
    life.end()
    assert liveness.living(tmp_path) is None


def test_two_callbacks_with_one_hook_share_a_run(tmp_path: Path) -> None:
    hook = FinalizeHook()
    callbacks = [PartialCheckpointCallback(tmp_path, finalizer=hook) for _ in range(2)]
    Loop(*callbacks).fit()
    assert names_in(tmp_path) == ["2"]
    assert liveness.living(tmp_path) is None
