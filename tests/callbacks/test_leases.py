"""Where there are no locks, a lease tells whether a run lives. No test waits for a real grace."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shell import Shell
from stub_trainer import Loop, begun, end_step, fitted, new_state, run_program
from test_callback import names_in
from test_liveness import _LOOKS, _TRAINS, OFTEN
from things import until

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback
from flax_partial.cli.main import PROBLEM
from flax_partial.runs import leases, liveness
from flax_partial.runs.leases import Lease, Pace, Sign, Watch, holder, numbers
from flax_partial.storage import locks
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.object_store import open_store
from flax_partial.storage.urls import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flax_partial.storage.store import Store

NAME = "timeline/running"


@dataclass
class Time:
    """A clock that stands still but for sleeping, and what others do at given times."""

    secs: float = 0.0
    plans: dict[float, Callable[[], object]] = field(default_factory=dict)

    def sleep(self, secs: float) -> None:
        end = self.secs + secs
        for at in sorted(self.plans):
            if at <= end:
                self.secs = max(self.secs, at)
                self.plans.pop(at)()
        self.secs = end

    def pace(self, **how: float) -> Pace:
        return Pace(now=lambda: self.secs, sleep=self.sleep, renew_secs=1e9, **how)


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return open_store(parse(f"memory://{tmp_path.name}{os.urandom(4).hex()}/run"))
    return DirectoryStore(tmp_path, durable=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is on a machine of its own: the system cannot be asked for it."""
    monkeypatch.setattr(leases, "_machine", lambda: None)


def taken(store: Store, time: Time) -> Lease:
    lease = Lease(store, NAME, time.pace())
    assert lease.take() is None
    return lease


def test_who_holds_a_lease_of_this_machine_is_known_at_once(store: Store) -> None:
    time = Time()
    assert holder(store, NAME, time.pace()) is None
    lease = taken(store, time)
    assert str(os.getpid()) in str(holder(store, NAME, time.pace()))
    assert str(os.getpid()) in str(Lease(store, NAME, time.pace()).take())
    lease.release()
    lease.release()
    assert holder(store, NAME, time.pace()) is None
    assert time.secs == 0


@pytest.mark.usefixtures("elsewhere")
def test_one_that_is_renewed_is_seen_to_live(store: Store) -> None:
    time = Time()
    lease = taken(store, time)
    time.plans = {9.5: lease.renew}
    assert f"process {os.getpid()} on " in str(holder(store, NAME, time.pace()))
    assert time.secs == 10
    lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_one_that_stands_for_the_grace_is_dead_and_is_taken_over(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    dead = taken(store, time)
    time.plans = {30.0: dead.renew}  # its last sign of life, after which the grace begins anew
    watch = Watch(store, NAME, time.pace(grace_secs=60))
    while watch.look() is not Sign.FREE:
        time.sleep(1)
    assert time.secs == 90
    second = Lease(store, NAME, time.pace(grace_secs=60))
    assert second.take() is None
    assert time.secs == 150
    assert "Took over" in caplog.text
    dead.renew()
    assert f"process {os.getpid()}" in str(dead.lost_to)
    assert "not renewed its lease for 60 s" in caplog.text
    dead.release()
    assert numbers(store, NAME) == [2]
    assert second.lost_to is None
    second.renew()
    assert second.lost_to is None
    second.release()


@pytest.mark.usefixtures("elsewhere")
def test_an_outage_of_the_storage_is_no_sign_of_death(store: Store) -> None:
    """Watcher and holder both wait for the storage, for longer than the grace."""
    time = Time()
    lease = taken(store, time)
    watch = Watch(store, NAME, time.pace(grace_secs=60))
    watch.look()
    time.secs += 500
    assert watch.look() is Sign.UNKNOWN
    lease.renew()
    assert watch.look() is Sign.LIVE
    lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_a_clock_that_is_wrong_by_a_year_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(leases.time, "time", lambda: 1e9)
        time = Time()
        lease = taken(store, time)
        time.plans = {5.0: lease.renew}
    assert "since 2001" in str(holder(store, NAME, time.pace()))
    lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_one_that_ends_is_waited_for_as_long_as_asked(store: Store) -> None:
    time = Time()
    lease = taken(store, time)
    time.plans = {3.0: lease.renew, 20.5: lease.release}
    assert Lease(store, NAME, time.pace()).take(timeout_secs=10) is not None
    assert time.secs == 10
    after = Lease(store, NAME, time.pace())
    assert after.take(timeout_secs=100) is None
    assert time.secs == 21
    after.release()


@pytest.mark.usefixtures("elsewhere")
def test_one_of_many_that_found_it_free_takes_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(store, Time()).release()
    together, put_new = threading.Barrier(6), store.put_new

    def put_together(key: str, data: bytes) -> bool:
        together.wait()
        return put_new(key, data)

    def sleep(_: float) -> None:
        """Of a loser: meanwhile the winner renews its lease."""
        until(lambda: any(one._number for one in takers))  # noqa: SLF001 - it has it
        next(one for one in takers if one._number).renew()  # noqa: SLF001

    monkeypatch.setattr(store, "put_new", put_together)
    takers = [Lease(store, NAME, Pace(renew_secs=1e9, sleep=sleep)) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: one.take(), takers))
    assert found.count(None) == 1
    assert numbers(store, NAME) == [2]
    for one in takers:
        one.release()


@pytest.mark.usefixtures("elsewhere")
def test_one_that_is_taken_over_while_it_sleeps_takes_nothing_back(store: Store) -> None:
    """Its number is never used again: what it puts late is not the newest."""
    time = Time()
    asleep = taken(store, time)
    second = Lease(store, NAME, time.pace())
    assert second.take() is None
    second.release()
    third = taken(store, time)
    asleep.renew()
    assert numbers(store, NAME) == [1, 3]
    assert third.lost_to is None
    third.renew()
    assert third.lost_to is None
    asleep.release()
    third.release()


def test_a_thread_renews_it_until_it_is_released(store: Store) -> None:
    lease = Lease(store, NAME, Pace(renew_secs=0.002))
    assert lease.take() is None
    key = f"{NAME}.1"
    until(lambda: json.loads(store.get(key) or b"{}")["count"] > 3)
    lease.release()
    assert json.loads(store.get(key) or b"{}")["has_ended"]


def test_storage_that_fails_for_a_while_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DirectoryStore(tmp_path / "run", durable=False)
    store.root.mkdir()
    lease = Lease(store, NAME, Pace(renew_secs=0.002))
    assert lease.take() is None
    store.root.rename(tmp_path / "away")
    until(lambda: "Could not renew" in caplog.text)
    (tmp_path / "away").rename(store.root)
    count = json.loads(store.get(f"{NAME}.1") or b"{}")["count"]
    until(lambda: json.loads(store.get(f"{NAME}.1") or b"{}")["count"] > count)
    assert caplog.text.count("Could not renew") == 1
    lease.release()


def test_what_nobody_refers_to_is_released(store: Store) -> None:
    lease = Lease(store, NAME)
    assert lease.take() is None
    del lease
    assert holder(store, NAME, Time().pace()) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"since": "x"}', b"\xff", b'{"machine": 3}'])
def test_a_lease_that_nobody_can_read_stands_for_the_grace(data: bytes, tmp_path: Path) -> None:
    store, time = DirectoryStore(tmp_path), Time()
    store.put(f"{NAME}.7", [data])
    lease = Lease(store, NAME, time.pace())
    assert lease.take() is None
    assert time.secs == 60
    assert numbers(store, NAME) == [8]
    lease.release()


# --- callbacks, the command line and a second job -------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.VARIABLE, "files")


@pytest.fixture
def live(tmp_path: Path, no_locks: None) -> Iterator[Path]:  # noqa: ARG001
    """The directory of a run that lives and has one checkpoint."""
    callback = PartialCheckpointCallback(tmp_path, **OFTEN)
    trainer = begun(callback)
    end_step(callback, trainer, 1)
    callback.finalizer.wait()
    yield tmp_path
    callback.on_train_end(trainer, None)
    assert names_in(tmp_path) == ["1"]
    assert liveness.living(tmp_path) is None


def test_another_process_restores_and_leaves_the_run_alone(live: Path) -> None:
    run_program(_LOOKS, live)


def test_second_job_is_refused_before_it_trains(live: Path) -> None:
    run_program(_TRAINS, live, os.getpid())


def test_command_line_leaves_it_alone_unless_told_otherwise(
    live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp.save(live / "2", {"a": 1})
    shell = Shell(capsys)
    shell.run("finalize", live / "2", status=PROBLEM)
    assert f"process {os.getpid()} on " in shell.error
    fp.abort(live / "2")


@pytest.mark.usefixtures("no_locks")
def test_runs_follow_each_other_at_once(tmp_path: Path) -> None:
    fitted(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path / "b", at={"on_train_epoch_end": lambda _: 1 // 0})
    assert liveness.living(tmp_path / "b") is None
    hook = FinalizeHook()
    Loop(*(PartialCheckpointCallback(tmp_path / "c", finalizer=hook) for _ in range(2))).fit()
    assert liveness.living(tmp_path / "c") is None


_IS_KILLED = """
import os, signal, sys
from stub_trainer import begun, end_step
from flax_partial.callbacks import PartialCheckpointCallback

callback = PartialCheckpointCallback(sys.argv[1], every_n_epochs=None, every_n_train_steps=1)
trainer = begun(callback)
end_step(callback, trainer, 1)
callback.finalizer.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("no_locks")
def test_run_that_was_killed_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-W", "ignore", "-P", "-c", _IS_KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    monkeypatch.setattr(leases, "PACE", Pace(sleep=pytest.fail))
    assert PartialCheckpointCallback(tmp_path).restore(new_state(0))[1] == 1  # type: ignore[index]
    assert liveness.living(tmp_path) is None


@pytest.mark.usefixtures("no_locks", "elsewhere")
def test_run_of_another_machine_that_is_dead_is_gone_on_with_after_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = liveness.Life(tmp_path)
    time = Time()
    monkeypatch.setattr(leases, "PACE", time.pace())
    life.begin()
    other = liveness.Life(tmp_path)
    other.begin()
    assert time.secs == leases.GRACE_SECS
    life._held.renew()  # type: ignore[union-attr] # noqa: SLF001 - it is not dead after all
    with pytest.raises(fp.CheckpointInUseError, match="Another run trains in this directory"):
        life.check()
    other.check()
    life.end()
    other.end()


@pytest.mark.usefixtures("no_locks")
def test_run_that_was_taken_over_saves_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "PACE", Pace(renew_secs=0.002))
    callback = PartialCheckpointCallback(tmp_path, **OFTEN)
    trainer = begun(callback)
    end_step(callback, trainer, 1)
    callback.finalizer.wait()
    store = DirectoryStore(tmp_path)
    (number,) = numbers(store, NAME)
    store.put(f"{NAME}.{number + 1}", [json.dumps({"has_ended": True}).encode()])
    until(lambda: "was taken by another process" in caplog.text)
    with pytest.raises(fp.CheckpointInUseError, match="Another run trains"):
        end_step(callback, trainer, 2)
    callback.on_train_end(trainer, None)


@pytest.mark.usefixtures("no_locks")
def test_recovery_by_another_process_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr(leases, "PACE", time.pace())
    with (
        liveness.recovering(tmp_path, 5),
        pytest.raises(fp.CheckpointInUseError, match="been recovering it for more than 5 s"),
        liveness.recovering(tmp_path, 5),
    ):
        pytest.fail("two at once")
    assert time.secs == 5
    with liveness.recovering(tmp_path, 0):
        pass


@pytest.mark.parametrize("fails", ["put_new", "put"])
def test_lease_is_taken_anew_by_a_process_whose_disk_failed(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was put, although it was, or as it was given back."""
    store = DirectoryStore(tmp_path, durable=False)
    real = getattr(DirectoryStore, fails)

    def failing(place: DirectoryStore, *arguments: object) -> None:
        if fails == "put_new":
            real(place, *arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, fails, failing)
        lease = Lease(store, NAME)
        with contextlib.suppress(OSError):
            lease.take()
        lease.release()
    assert numbers(store, NAME) == [1]
    again = Lease(store, NAME)
    assert again.take() is None
    again.release()
