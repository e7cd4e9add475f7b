"""A training run whose directory is in an object store: it saves, keeps, scores, and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
from s3_server import Fault, S3Server, serving
from stores import Death, Killed, another_process, memory, requests_through

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback, checkpointing
from flax_partial.cli.main import main
from flax_partial.runs import liveness, timeline, timeline_logs
from flax_partial.storage import object_removal
from flax_partial.storage.control import CONTROL, begun_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FINALIZED = "commit_success.txt"
TRAINER = """
import sys
import numpy as np
from flax_partial.callbacks import checkpointing

with checkpointing(sys.argv[1], every_n_train_steps=2) as ckpt:
    for step in range(1, 7):
        ckpt.step({"w": np.full(4, step)})
        ckpt.callback.finalizer.wait()
"""


@pytest.fixture
def server() -> Iterator[S3Server]:
    with serving() as found:
        yield found


def state_of(step: int) -> dict[str, Any]:
    return {"params": {"w": jnp.full(4, step), "b": jnp.full(2, -step)}}


def train(url: str, until: int, **options: Any) -> checkpointing:
    """Goes on to a step; the loss is smallest at step 4."""
    with checkpointing(url, every_n_train_steps=2, every_n_epochs=None, **options) as ckpt:
        state = ckpt.restore(state_of(0))
        assert (state["params"]["w"] == ckpt.steps_done).all()
        for step in range(ckpt.steps_done + 1, until + 1):
            ckpt.step(state_of(step), {"loss": abs(step - 4.0)})
    return ckpt


def recorded_steps(url: str) -> list[list[int]]:
    return [run.saved_steps for run in timeline.read(fp.StorePath(url))]


def wait_for(is_there: Callable[[], bool]) -> None:
    while not is_there():
        time.sleep(0.005)


def test_a_run_keeps_scores_and_goes_on() -> None:
    url = memory("/run")
    extra = np.random.default_rng(1)
    options = {"keep_last": 1, "monitor": "loss", "save_top_k": 1, "extras": {"random": extra}}
    train(url, 6, **options)
    drawn = extra.random()
    again = train(url, 10, **options)
    assert extra.random() == drawn
    assert again.callback.restored is not None
    assert again.callback.restored.step == 6
    assert fp.steps(url) == [4, 10]
    assert again.callback.best_model_path == f"{url}/4"
    assert again.callback.best_model_score == 0.0
    assert again.callback.last_model_path == str(fp.latest(url)) == f"{url}/10"
    assert (fp.load(fp.StorePath(url) / "4")["params"]["w"] == 4).all()
    assert recorded_steps(url) == [[2, 4, 6], [8, 10]]


@pytest.mark.parametrize("which", [4, "best", "path"])
def test_an_older_step_is_restored_and_later_ones_are_discarded(which: Any) -> None:
    url = memory("/run")
    train(url, 8)
    chosen = fp.StorePath(url) / "4" if which == "path" else which
    callback = PartialCheckpointCallback(url, monitor="loss")
    restored = callback.restore(state_of(0), which=chosen, discard_later=True)
    assert restored is not None
    assert restored[1] == 4
    assert fp.steps(url) == [2, 4]


def test_a_run_that_is_killed_as_it_publishes_is_completed_by_the_next(server: S3Server) -> None:
    url = server.url("/run")
    server.faults = [Fault(rf"^PUT .*/6/{FINALIZED}", "hang", secs=60)]
    process = subprocess.Popen([sys.executable, "-c", TRAINER, url])
    wait_for(lambda: any(re.search(rf"^PUT .*/6/{FINALIZED}", line) for line in server.log))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert fp.steps(url) == [2, 4]
    with checkpointing(url) as ckpt:
        restored = ckpt.restore({"w": np.zeros(4, int)})
        assert ckpt.steps_done == 6
    assert (restored["w"] == 6).all()
    assert recorded_steps(url)[0] == [2, 4]  # what was not put yet is lost


def test_a_step_that_was_not_complete_is_dropped() -> None:
    url = memory("/run")
    train(url, 2)
    fp.save(f"{url}/3", {"w": np.ones(3)}, custom_metadata={"step": 3})
    train(url, 4)
    assert fp.steps(url) == [2, 4]
    with pytest.raises(fp.NoSessionError):
        fp.status(f"{url}/3")


def test_another_run_that_lives_is_refused() -> None:
    directory = fp.StorePath(memory("/run"))
    one, other = liveness.Life(directory), liveness.Life(directory)
    one.begin()
    assert f"process {os.getpid()}" in str(liveness.living(directory))
    with pytest.raises(fp.CheckpointInUseError, match="Another run trains in this directory"):
        other.begin()
    one.end()
    other.begin()
    other.end()
    assert liveness.living(directory) is None


def test_a_directory_that_is_a_checkpoint_is_refused() -> None:
    url = memory("/run")
    train(url, 2)
    with pytest.raises(ValueError, match=rf"lies in the checkpoint {url}/2"):
        train(f"{url}/2/more", 2)


# What is wrong is said at the start.


def closed_port() -> str:
    with S3Server() as gone:
        return gone.endpoint


def wrong_key(server: S3Server) -> str:
    server.key = "another"
    return server.url("/run")


def no_bucket(server: S3Server) -> str:
    server.faults = [Fault(r"^(GET|PUT|POST|HEAD)", "404", times=10**6)]
    return server.url("/run")


def nobody_answers(_: S3Server) -> str:
    fp.store_options("s3://nobody", retry_secs=0.2)
    return f"s3://nobody/run?endpoint={closed_port()}"


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (wrong_key, fp.StoreAccessError, "s3://bucket"),
        (no_bucket, fp.StoreError, "404 Not Found"),
        (nobody_answers, fp.StoreError, "s3://nobody/run"),
    ],
)
def test_a_store_that_cannot_be_used_is_an_error_before_training(
    server: S3Server,
    place: Callable[[S3Server], str],
    error: type[Exception],
    message: str,
) -> None:
    url = place(server)
    with pytest.raises(error, match=message) as raised, checkpointing(url) as ckpt:
        ckpt.step(state_of(1))
    assert "\n" not in str(raised.value)


def test_without_the_extra_the_callback_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r"pip install .*\[objects\]"):
        PartialCheckpointCallback("s3://a-bucket-of-its-own/run")


def test_one_who_may_only_read_restores(server: S3Server) -> None:
    url = server.url("/run")
    train(url, 4)
    fp.save(fp.StorePath(url) / "5", {"w": np.ones(3)}, custom_metadata={"step": 5})
    server.faults = [Fault(r"^(PUT|POST|DELETE)", "403", times=10**6)]
    restored = PartialCheckpointCallback(url).restore(state_of(0))
    assert restored is not None
    assert restored[1] == 4


def test_ctrl_c_ends_a_call_whose_request_hangs(server: S3Server) -> None:
    url = server.url("/run")
    server.faults = [Fault(r"^GET|^HEAD", "hang", secs=2)]

    def interrupt() -> None:
        wait_for(lambda: bool(server.log))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fp.latest(url)
    thread.join()
    server.faults = []
    for other in threading.enumerate():
        if other.name.startswith("store-request"):
            other.join()


# Requests.


def requests_of(server: S3Server, call: Callable[[], Any]) -> dict[str, int]:
    server.reset()
    call()
    return dict(server.counts)


def fill(server: S3Server, steps: int) -> str:
    url = server.url("/run")
    prefix = url.removeprefix("s3://").partition("?")[0]
    for step in range(steps):
        for name in (FINALIZED, "state/contents.json", CONTROL + begun_name("s")):
            server.objects[f"{prefix}/{step}/{name}"] = b'{"session": "s"}'
    return url


def test_latest_of_many_steps_lists_their_names_and_looks_at_one(server: S3Server) -> None:
    url = fill(server, 10_000)
    assert requests_of(server, lambda: fp.latest(url)) == {"LIST": 10, "HEAD": 2, "GET": 1}


def test_steps_lists_one_level_and_looks_at_each_mark(server: S3Server) -> None:
    url = fill(server, 300)
    assert requests_of(server, lambda: fp.steps(url)) == {"LIST": 1, "HEAD": 301, "GET": 1}
    assert server.most <= 32


def test_the_command_latest_reads_no_checkpoint(
    server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = fill(server, 300)
    counts = requests_of(server, lambda: main(["latest", url]))
    assert capsys.readouterr().out == f"{fp.StorePath(url) / '299'}\n"
    assert sum(counts.values()) <= 6, counts


# The timeline.


def test_the_timeline_is_put_when_a_step_is_finalized_in_objects_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeline_logs, "_OBJECT_BYTES", 100)
    monkeypatch.setattr(timeline_logs, "_MOST_OBJECTS", 3)
    directory = fp.StorePath(memory("/run"))
    log = timeline_logs.ObjectLog(directory)
    log.begin("a")
    ended = [
        timeline.encode("end", step=step, outcome="finalized", began_at=step, ended_at=step)
        for step in range(1, 9)
    ]
    for line in ended:
        log.append([line])
    held = [one.name for one in (directory / timeline.FOLDER).iterdir()]
    assert held == [f"p0.a.{number:06d}.jsonl" for number in (6, 7)]


def test_what_a_timeline_could_not_put_is_put_later(server: S3Server) -> None:
    fp.store_options(server.url().partition("?")[0], retry_secs=0.1)
    directory = fp.StorePath(server.url())
    log = timeline_logs.ObjectLog(directory)
    log.begin("a")
    server.faults = [Fault(r"^PUT", "403")]
    lines = [timeline.encode("steps", steps=[[step, step, step + 1]]) for step in (1, 2)]
    with pytest.raises(fp.StoreAccessError):
        log.append(lines[:1])
    log.append(lines[1:])
    (run,) = timeline.read(directory)
    assert [step.number for step in run.processes[0].steps] == [1, 2]


def test_what_a_removal_that_was_killed_has_left_is_deleted_when_the_next_run_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = memory("/run")
    train(url, 4)
    with requests_through(Death(5, after=True)), pytest.raises(Killed):
        fp.remove(f"{url}/2")
    another_process()
    assert fp.steps(url) == [4]
    train(url, 6)  # it began too short a time ago: it may be going on
    assert fp.StorePath(f"{url}/2").is_dir()
    monkeypatch.setattr(object_removal, "_secs_left", lambda *_: 0.0)
    train(url, 8)
    assert not fp.StorePath(f"{url}/2").is_dir()
    assert fp.steps(url) == [4, 6, 8]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_removal_that_is_killed_anywhere_is_no_hindrance_to_the_next_run(*, after: bool) -> None:
    for at in range(1, 20):
        url = memory("/run")
        train(url, 2)
        death = Death(at, after=after)
        try:
            with requests_through(death):
                fp.remove(f"{url}/2")
        except Killed:
            another_process()
        PartialCheckpointCallback(url).recover()
        assert all(fp.verify(f"{url}/{step}").ok for step in fp.steps(url))
        PartialCheckpointCallback(url).recover()
        if not death.is_dead:
            return
    pytest.fail("a removal makes more requests than were tried")


# A mark that was put late: by a finalize that slept until its checkpoint was removed, and died.


def put_mark_late(path: str) -> None:
    """Saves a checkpoint, finalizes and removes it, and puts its mark again."""
    fp.save(path, {"gone": 1})
    fp.finalize(path)
    store = fp.StorePath(path).store
    mark = store.get(FINALIZED)
    assert mark is not None
    fp.remove(path)
    store.put(FINALIZED, [mark])
    another_process()


@pytest.mark.parametrize("late", [[6], [5, 6], [6, 100]])
@pytest.mark.parametrize("has_session", [False, True])
def test_a_run_goes_on_from_the_newest_step_that_is_there(
    late: list[int], caplog: pytest.LogCaptureFixture, *, has_session: bool
) -> None:
    url = memory("/run")
    train(url, 4, keep_last=1)
    for step in late:
        put_mark_late(f"{url}/{step}")
    if has_session:  # which the next run drops
        fp.save(f"{url}/6", {"params": {"w": np.zeros(5)}})
        another_process()
    assert fp.latest(url) == fp.StorePath(f"{url}/4")
    assert fp.steps(url) == [4]
    assert train(url, 4).callback.restored.step == 4
    assert f"Skipped {url}/{late[-1]}: the checkpoint was removed" in caplog.text
    with pytest.raises(fp.NoSessionError):
        PartialCheckpointCallback(url).restore(which=late[-1])
    train(url, 6, keep_last=1)
    assert fp.load(f"{url}/6")["params"]["w"][0] == 6
    assert fp.verify(f"{url}/6").ok
    assert PartialCheckpointCallback(url).restore()[1] == 6


def test_a_run_elsewhere_uploads_steps_before_a_mark_that_was_put_late(tmp_path: Path) -> None:
    url = memory("/run")
    train(url, 2, local=tmp_path / "lost")
    put_mark_late(f"{url}/6")
    train(url, 6, local=tmp_path / "new")
    assert fp.load(f"{url}/6")["params"]["w"][0] == 6


def test_a_newest_step_that_is_damaged_is_not_skipped() -> None:
    url = memory("/run")
    train(url, 4)
    fp.StorePath(f"{url}/4").store.delete(["state/contents.json"])
    with pytest.raises(fp.CorruptCheckpointError, match=r"/4.*contents.json is missing"):
        PartialCheckpointCallback(url).restore()
