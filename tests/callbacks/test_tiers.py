"""A run in two tiers: saved on a local disk, uploaded from there; one or the other may be lost."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
import servers
from s3_server import Fault, S3Server, serving
from stub_trainer import begun, end_step, fitted, new_state, restored
from test_callback import assert_is_step
from things import until

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback, _tiers
from flax_partial.runs import takeover
from flax_partial.runs.directory import checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "commit_success.txt"  # of a checkpoint in a store, put last
OFTEN: dict[str, Any] = {"every_n_epochs": None, "every_n_train_steps": 1}


@pytest.fixture(params=["a directory", "a store"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where a run uploads to."""
    if request.param == "a directory":
        return tmp_path / "remote"
    return fp.StorePath(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps whose uploads fail, as they do while a network is down."""
    held: set[int] = set()
    real = fp.copy

    def copy(source: Path, target: Any, **how: Any) -> Any:
        if int(source.name) in held:
            raise OSError("the network is down")
        return real(source, target, **how)

    monkeypatch.setattr(fp, "copy", copy)
    monkeypatch.setattr(_tiers, "_FIRST_PAUSE_SECS", 0.01)
    yield held
    held.clear()


def tiered(remote: Any, local: Path, **options: Any) -> PartialCheckpointCallback:
    return PartialCheckpointCallback(str(remote), local=local, **OFTEN, **options)


def steps_in(place: Any) -> list[int]:
    return [*checkpoints(place)]


def test_each_step_is_uploaded_and_the_local_tier_keeps_its_own_number(
    remote: Any, tmp_path: Path
) -> None:
    callback = fitted(str(remote), local=tmp_path / "local", local_keep_last=2, batches=4, **OFTEN)
    assert steps_in(remote) == [1, 2, 3, 4]
    assert steps_in(tmp_path / "local") == [3, 4]
    for step in (1, 4):
        assert fp.verify(remote / str(step)).ok
    assert_is_step(remote / "2", 2)
    assert callback.last_model_path == str(tmp_path / "local" / "4")


def test_what_is_to_be_kept_is_said_of_the_remote_tier(remote: Any, tmp_path: Path) -> None:
    fitted(str(remote), local=tmp_path / "local", keep_last=2, batches=5, **OFTEN)
    assert steps_in(remote) == [4, 5]
    assert steps_in(tmp_path / "local") == [5]


def test_a_checkpoint_is_read_locally_before_it_is_uploaded(
    remote: Any, tmp_path: Path, hold: set[int]
) -> None:
    callback = tiered(remote, tmp_path / "local")
    trainer = begun(callback)
    end_step(callback, trainer, 1)
    callback.finalizer.wait()
    hold.add(2)
    end_step(callback, trainer, 2)
    until(lambda: steps_in(tmp_path / "local")[-1:] == [2])
    assert steps_in(remote) == [1]
    assert restored(callback, new_state(0))[1] == 2
    hold.clear()
    callback.on_train_end(trainer, None)
    assert steps_in(remote) == [1, 2]


@pytest.mark.parametrize("when_behind", ["wait", "skip"])
def test_past_its_bound_a_backlog_is_waited_for_or_steps_are_skipped(
    when_behind: Any, tmp_path: Path, hold: set[int]
) -> None:
    remote = tmp_path / "remote"
    callback = tiered(remote, tmp_path / "local", when_behind=when_behind, most_uploads=2)
    trainer = begun(callback)
    hold |= {1, 2}
    run = callback._run  # noqa: SLF001
    for step in (1, 2):
        end_step(callback, trainer, step)
        until(lambda: not run.finalizer.is_behind)
    tiers = run.tiers
    assert tiers is not None
    until(lambda: tiers.is_full)
    if when_behind == "skip":
        end_step(callback, trainer, 3)
        assert callback.skipped_saves == 1
        hold.clear()
        until(lambda: not tiers.is_full)
    else:
        waiting = threading.Thread(target=end_step, args=(callback, trainer, 3))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        hold.clear()
        waiting.join()
    end_step(callback, trainer, 4)
    callback.on_train_end(trainer, None)
    assert steps_in(remote) == ([1, 2, 4] if when_behind == "skip" else [1, 2, 3, 4])


def test_uploads_that_fail_for_good_are_left_to_the_next_run(
    remote: Any, tmp_path: Path, hold: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    hold |= {2}
    fitted(str(remote), local=tmp_path / "local", batches=2, **OFTEN)
    assert steps_in(remote) == [1]
    assert steps_in(tmp_path / "local")[-1] == 2
    assert "Could not upload" in caplog.text
    hold.clear()
    callback = tiered(remote, tmp_path / "local")
    assert restored(callback)[1] == 2
    trainer = begun(callback)
    callback.on_train_end(trainer, None)
    assert steps_in(remote) == [1, 2]


def test_a_machine_that_is_lost_takes_only_what_was_not_uploaded(
    remote: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(str(remote), local=tmp_path / "local", batches=3, **OFTEN)
    shutil.rmtree(tmp_path / "local")
    caplog.set_level(logging.INFO)
    callback = tiered(remote, tmp_path / "another")
    assert restored(callback)[1] == 3
    assert f"Restored step 3 from {remote / '3'}" in caplog.text


def test_a_run_elsewhere_takes_over_from_one_that_still_uploads(
    remote: Any, tmp_path: Path, hold: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = tiered(remote, tmp_path / "one", on_save_error="warn")
    trainer = begun(first)
    end_step(first, trainer, 1)
    first.finalizer.wait()
    hold.add(2)
    end_step(first, trainer, 2)
    until(lambda: steps_in(tmp_path / "one")[-1:] == [2])
    second = tiered(remote, tmp_path / "two")
    assert restored(second, new_state(0))[1] == 1
    other = begun(second)
    end_step(second, other, 1)  # what was restored is not saved again
    hold.clear()
    first.finalizer.wait()
    assert steps_in(remote) == [1]
    assert "has taken over" in caplog.text
    end_step(second, other, 5)
    second.on_train_end(other, None)
    end_step(first, trainer, 3)
    first.on_train_end(trainer, None)
    assert first.failed_saves == 1
    assert steps_in(remote) == [1, 5]
    # Back on the first machine: what only that one has is of a run that was given up.
    third = tiered(remote, tmp_path / "one")
    assert restored(third)[1] == 5
    assert steps_in(tmp_path / "one") == []
    (aside,) = tmp_path.glob("one/taken_over.*")
    assert "2" in {path.name for path in aside.iterdir()}


def test_an_older_step_than_the_remote_one_is_refused(remote: Any, tmp_path: Path) -> None:
    fitted(str(remote), local=tmp_path / "local", batches=3, **OFTEN)
    shutil.rmtree(tmp_path / "local")
    with pytest.raises(fp.CheckpointExistsError, match="step 3"):
        fitted(str(remote), local=tmp_path / "local", batches=2, **OFTEN)
    assert steps_in(tmp_path / "local") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local": "memory://bucket/run"}, "local is a directory"),
        ({"local": "run/remote/x"}, "lie apart"),
        ({"local": "run"}, "lie apart"),
        ({"local": "local", "local_keep_last": 0}, "local_keep_last"),
        ({"local": "local", "most_uploads": 0}, "most_uploads"),
    ],
    ids=["a URL", "within", "around", "keeps none", "uploads none"],
)
def test_what_makes_no_sense_is_refused(
    options: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        PartialCheckpointCallback("run/remote", **options)
    assert not [*tmp_path.iterdir()]


def test_a_local_tier_belongs_to_one_run(tmp_path: Path) -> None:
    fitted(tmp_path / "remote", local=tmp_path / "local", batches=1, **OFTEN)
    with pytest.raises(fp.CheckpointExistsError, match="is the local tier of"):
        begun(tiered(tmp_path / "other", tmp_path / "local"))


# --- who may upload


def test_of_several_that_take_over_at_once_each_gets_its_own_number(remote: Any) -> None:
    uploads = [takeover.Uploads(remote) for _ in range(3)]
    numbers = [one.take_over(f"tier{i}") for i, one in enumerate(uploads)]
    assert numbers == [1, 2, 3]
    assert [one.is_newest(number) for one, number in zip(uploads, numbers, strict=True)] == [
        False,
        False,
        True,
    ]
    assert uploads[0].tier() == "tier2"


def _begin(tiers: _tiers.Tiers, *, after_secs: float) -> list[int]:
    time.sleep(after_secs)
    tiers.reconcile(begins=True)
    return steps_in(tiers.remote)


def test_nothing_is_published_by_who_was_taken_over(remote: Any, tmp_path: Path) -> None:
    """One tier uploads while another takes over, at any moment: that one has seen all there is."""
    for trial in range(12):
        run = remote / f"run{trial}"
        tiers = [
            _tiers.Tiers(tmp_path / f"{name}{trial}", run, keep_last=1, most_behind=1)
            for name in ("one", "two")
        ]
        tiers[0].reconcile(begins=True)
        fp.save(tmp_path / f"one{trial}" / "1", {"w": jnp.ones(3)})
        fp.finalize(tmp_path / f"one{trial}" / "1")
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(_begin, tiers[1], after_secs=0.004 * (trial % 4))
            time.sleep(0.01 * (trial // 4))
            tiers[0].add(1, ())
            seen = taking.result()
        tiers[0].wait()
        assert steps_in(run) == seen


# --- killed


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as found:
        yield found


def test_killed_anywhere_it_goes_on_uploading(server: S3Server, tmp_path: Path) -> None:
    lost, last = servers.machines(server.url("/run"), tmp_path, count=3, seed=1)
    assert lost["process"] == 3
    assert last >= 3


def kill_while_it_uploads(server: S3Server, url: str, local: Path, step: int, request: str) -> None:
    """Lets a run train until a request of the upload of a step is made, which is never answered."""
    pattern = rf"^PUT .*{fp.StorePath(url).name}/{step}/.*{request}"
    server.faults = [Fault(pattern, "hang", times=99, secs=60)]
    with servers.started(servers.train_in_tiers, (url, local, servers.newest_of(local, url))) as (
        pipe,
    ):

        def is_made() -> bool:
            while pipe.poll():
                assert isinstance(told := pipe.recv(), int), told
            return any(re.search(pattern, line) for line in server.log)

        until(is_made)
    server.faults = []


@pytest.mark.parametrize("machine", ["there", "lost"])
def test_killed_as_they_upload_runs_over_http_are_followed_by_one_that_goes_on(
    server: S3Server, machine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, local = server.url(f"/{machine}"), tmp_path / "local"
    kill_while_it_uploads(server, url, local, 2, "part.json")
    assert fp.steps(url) == [1]
    kill_while_it_uploads(server, url, local, 3, MARK)
    assert fp.steps(url) == [1, 2]
    newest = fp.steps(local)[-1]
    assert newest >= 3
    caplog.set_level(logging.INFO)
    if machine == "lost":
        shutil.rmtree(local)
    callback = tiered(url, local)
    step = restored(callback)[1]
    assert step == 3 if machine == "lost" else step >= newest  # of 3 all but the mark was up
    trainer = begun(callback)
    end_step(callback, trainer, step + 1)
    callback.on_train_end(trainer, None)
    held = fp.steps(url)
    assert held[:3] == [1, 2, 3]
    assert held[-1] == step + 1
    for one in held:
        assert_is_step(fp.StorePath(url) / str(one), one)


def test_a_copy_that_was_stopped_goes_on_where_it_was(remote: Any, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    for i in range(20):
        fp.save(tmp_path / "a", {f"x{i}": jnp.full(1000, i)})
    fp.finalize(tmp_path / "a")
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 30:
            raise StoppedError

    with pytest.raises(StoppedError):
        fp.copy(tmp_path / "a", remote / "7", check=check)
    first = len(checks)
    assert steps_in(remote) == []
    fp.copy(tmp_path / "a", remote / "7", check=check)
    assert len(checks) - first < 3 * 20
    assert fp.verify(remote / "7").ok
    np.testing.assert_array_equal(fp.load(remote / "7")["x3"], np.full(1000, 3))
    again = fp.copy(tmp_path / "a", remote / "7")
    assert again.parts == 20
    fp.copy(remote / "7", tmp_path / "back")
    assert fp.verify(tmp_path / "back").ok


def test_a_copy_mixes_with_nothing(remote: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fp.save(tmp_path / name, {name: jnp.ones(3)})
        fp.finalize(tmp_path / name)
    fp.copy(tmp_path / "a", remote / "1")
    fp.save(remote / "2", {"c": jnp.ones(3)})
    for step in ("1", "2"):
        with pytest.raises(fp.CheckpointExistsError, match="another"):
            fp.copy(tmp_path / "b", remote / step)
    with pytest.raises(fp.NoSessionError):
        fp.copy(tmp_path / "nothing", remote / "3")
    assert steps_in(remote) == [1]
