"""The timeline of real runs: what is recorded, what the command makes of it, what it survives."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from shell import Shell, shell
from stub_trainer import EVERYTHING, PARAMS, Loop, StubTrainer, fitted, restored, run_program
from things import QUICK

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback, _timeline
from flax_partial.cli.main import WRONG_USE
from flax_partial.runs import timeline, timeline_logs

if TYPE_CHECKING:
    from pathlib import Path

    from flax_partial.runs.timeline import ProcessTimeline

__all__ = ["shell"]  # a fixture

TOLERANCE = 2e-6  # instants are stored in microseconds


def train(directory: Path, **options: Any) -> PartialCheckpointCallback:
    return fitted(directory, epochs=2, streamed=EVERYTHING, **options)


def recorded(directory: Path) -> ProcessTimeline:
    (run,) = timeline.read(directory)
    return run.processes[0]


@pytest.mark.parametrize("call", ["save", "save_async"])
def test_instants_of_a_save_follow_each_other(tmp_path: Path, call: str) -> None:
    x = jnp.ones((300, 300))
    state = {"computed": jax.jit(lambda x: x @ x @ x)(x), "host": np.ones(3), "number": 1}
    made = getattr(fp, call)(tmp_path / "c", state)
    report = made.result() if call == "save_async" else made
    times = report.times
    names = list(timeline.INSTANTS)
    names.remove("begun_at")
    instants = [getattr(times, name) for name in names]
    assert instants == sorted(instants)
    assert times.taken_at <= times.begun_at <= times.copied_at
    assert times.committed_at == report.committed_at
    assert times.committed_at - times.begun_at == pytest.approx(report.write_secs, abs=0.1)


def test_a_save_is_ready_when_its_computation_is(tmp_path: Path) -> None:
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y), x)

    x = jnp.full((500, 500), 0.01)
    compute = jax.jit(slow).lower(x).compile()
    y = compute(x)
    handle = fp.save_async(tmp_path / "c", {"y": y})
    small = fp.save_async(tmp_path / "c", {"host": np.ones(3)}).result().times
    y.block_until_ready()
    times = handle.result().times
    assert times.ready_at - times.taken_at > 0.01
    assert times.taken_at - times.called_at < times.ready_at - times.taken_at
    assert small.ready_at - small.taken_at < 0.01  # it does not wait for the other's computation


def test_waiting_for_memory_shows_in_the_instants(tmp_path: Path) -> None:
    options = fp.SaveOptions(max_inflight_bytes=1)
    x = jnp.full((500, 500), 0.01)
    y = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y), x))(x)
    fp.save_async(tmp_path / "c", {"y": y}, options=options)
    report = fp.save_async(tmp_path / "c", {"z": x}, options=options).result()
    waited = report.times.admitted_at - report.times.entered_at
    assert report.budget_secs == pytest.approx(waited, abs=0.01)


def test_every_group_of_a_run_is_recorded(tmp_path: Path) -> None:
    callback = train(tmp_path)
    found = recorded(tmp_path)
    for report in callback.reports:
        saves = {save.group: save for save in found.saves if save.step == report.step}
        assert saves.keys() == set(report.groups)
        for group, save in saves.items():
            times = save.times
            assert times.ready_at <= times.copied_at <= times.written_at <= times.committed_at
            for name in timeline.INSTANTS:
                exact = getattr(report.saves[group].times, name)
                assert getattr(times, name) == pytest.approx(exact, abs=TOLERANCE)
            assert save.where == "cpu:0"
            assert save.bytes == report.saves[group].bytes
        (end,) = [end for end in found.ends if end.step == report.step]
        assert end.outcome == timeline.FINALIZED
        assert end.ended_at - end.began_at == pytest.approx(report.finalize_secs, abs=1e-3)
        assert max(save.times.committed_at for save in saves.values()) <= end.ended_at
    assert [step.number for step in found.steps] == [1, 2, 3, 4]
    for step in found.steps:
        assert step.began_at <= step.ended_at


def test_blocked_time_adds_up_to_that_of_the_report(tmp_path: Path) -> None:
    callback = train(tmp_path)
    found = recorded(tmp_path)
    assert len(callback.reports) == 2
    for report in callback.reports:
        assert report.blocked_secs == pytest.approx(found.blocked_secs(report.step), abs=3e-5)


def test_groups_are_recorded_in_the_order_in_which_they_were_streamed(tmp_path: Path) -> None:
    train(tmp_path)
    found = recorded(tmp_path)
    groups = [save for save in found.saves if save.step == 2 and save.group != "seen"]
    ordered = [save.group for save in sorted(groups, key=lambda save: save.times.called_at)]
    streamed = [".".join(layer) for layer in sorted(EVERYTHING, reverse=True)]
    assert ordered == streamed


def test_callbacks_of_one_hook_share_a_timeline(tmp_path: Path) -> None:
    hook = FinalizeHook()
    callbacks = [
        PartialCheckpointCallback(
            tmp_path, finalizer=hook, state_fn=lambda t, _, r=root: {r: t.state[r]}
        )
        for root in ("params", "opt_state")
    ]
    Loop(*callbacks, epochs=1, batches=3).fit()
    found = recorded(tmp_path)
    assert [step.number for step in found.steps] == [1, 2, 3]
    (report,) = hook.reports
    assert {save.group for save in found.saves} == set(report.groups)
    assert report.blocked_secs == pytest.approx(found.blocked_secs(3), abs=3e-5)


def test_preparing_again_begins_no_other_run(tmp_path: Path) -> None:
    train(tmp_path)
    callback = PartialCheckpointCallback(tmp_path)
    found = restored(callback)
    callback.finalizer.runs.of(tmp_path).add_blocked(0.001, "restore")
    Loop(callback, epochs=3).resume(*found).fit()
    first, second = timeline.read(tmp_path)
    assert (first.saved_steps, second.saved_steps) == ([2, 4], [6])
    assert "restore" in {hold.hook for hold in second.processes[0].holds}


def test_a_checkpoint_that_fails_is_recorded_as_given_up(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, on_save_error="warn")

    def break_it(trainer: StubTrainer) -> None:
        if trainer.global_step == 1:
            callback.on_layer_ready(trainer, "head", {"x": object()})

    Loop(callback, epochs=2, streamed=PARAMS, at={"ready": break_it}).fit()
    outcomes = {end.step: end.outcome for end in recorded(tmp_path).ends}
    assert outcomes == {2: timeline.GIVEN_UP, 4: timeline.FINALIZED}


def test_a_timeline_that_cannot_be_written_fails_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "timeline").write_text("in the way")
    callback = train(tmp_path)
    assert fp.steps(tmp_path) == [2, 4]
    assert callback.failed_saves == 0
    said = [r for r in caplog.records if "has gaps" in r.getMessage()]
    assert len(said) == 1


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_logs, "_MOST_BYTES", 2000)
    fitted(tmp_path, keep_last=1, epochs=8, streamed=PARAMS)
    files = list((tmp_path / "timeline").glob("*.jsonl"))
    assert sorted(file.name for file in files) == ["p0.before.jsonl", "p0.jsonl"]
    assert sum(file.stat().st_size for file in files) < 20_000
    (run,) = timeline.read(tmp_path)
    assert run.saved_steps[-1] == 16
    assert 2 not in run.saved_steps


def test_steps_of_a_run_that_never_saves_are_bounded(tmp_path: Path) -> None:
    notes = _timeline.Recorder(tmp_path)
    for step in range(3000):
        notes.step_began()
        notes.step_ended(step)
    notes.flush()
    assert [step.number for step in recorded(tmp_path).steps] == list(range(2000, 3000))


def test_catalog_and_ls_take_it_for_no_checkpoint(tmp_path: Path, shell: Shell) -> None:
    train(tmp_path, keep_last=1)
    assert (tmp_path / "timeline").is_dir()
    assert fp.steps(tmp_path) == [4]
    assert [one["name"] for one in shell.json("ls", tmp_path)["checkpoints"]] == ["4"]
    assert sorted({save.step for save in recorded(tmp_path).saves}) == [2, 4]


# --- the command ----------------------------------------------------------------------------------


def test_pictures_and_trace_are_valid(tmp_path: Path, shell: Shell) -> None:
    train(tmp_path / "run")
    outs = [tmp_path / f"t.{kind}" for kind in ("png", "svg", "json")]
    said = shell.run("timeline", tmp_path / "run", *(f"--out={out}" for out in outs))
    assert "params.blocks.1" in said
    assert f"wrote {outs[0]}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t.json", "t.png", "t.svg"]
    from matplotlib.image import imread

    height, width, _ = imread(outs[0]).shape
    assert min(height, width) > 400
    assert ET.parse(outs[1]).getroot().tag.endswith("svg")  # noqa: S314 - our own
    events = json.loads(outs[2].read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"params.head", "step 4", "finalized 2", "finalized 4", "is written"} <= names


def test_picture_says_what_it_shows(tmp_path: Path, shell: Shell) -> None:
    import matplotlib as mpl

    train(tmp_path / "run")
    with mpl.rc_context({"svg.fonttype": "none"}):
        shell.run("timeline", tmp_path / "run" / "2", "--out", tmp_path / "t.svg")
    texts = {node.text for node in ET.parse(tmp_path / "t.svg").iter() if node.text}  # noqa: S314
    shown = " ".join(text.strip() for text in texts)
    for expected in (
        "checkpoint 2 of",
        "training steps",
        "cpu:0",
        "finalize",
        "params.blocks.1",
        "ms since step 2 began",
        "training held",
        "group is written",
        "checkpoint 2 is there",
    ):
        assert expected in shown, expected


def test_json_has_every_instant_and_writes_no_picture(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run")
    said = shell.json("timeline", "run")
    assert (said["step"], said["out"]) == (4, [])
    (process,) = said["runs"][0]["processes"]
    assert {save["group"] for save in process["saves"]} >= {"params.head", "opt_state.embed"}
    assert set(process["saves"][0]["times"]) == set(timeline.INSTANTS)
    assert process["blocked_secs"].keys() == {"2", "4"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    shell.run("timeline", "run")
    assert (tmp_path / "timeline.png").is_file()


def test_a_checkpoint_that_is_gone_can_be_drawn(tmp_path: Path, shell: Shell) -> None:
    train(tmp_path, keep_last=1)
    assert not (tmp_path / "2").exists()
    assert shell.json("timeline", tmp_path / "2")["step"] == 2


def test_what_has_no_timeline_is_told_so(tmp_path: Path, shell: Shell) -> None:
    fp.save(tmp_path / "hand" / "1", {"x": 1}, options=QUICK)
    fp.finalize(tmp_path / "hand" / "1")
    with v0.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "orbax", {"w": np.ones(2)})
    train(tmp_path / "run")
    for path, why in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "hand" / "1", "only runs of PartialCheckpointCallback record one"),
        (tmp_path / "hand", "only runs of PartialCheckpointCallback record one"),
        (tmp_path / "orbax", "Orbax wrote it, and records none"),
        (tmp_path / "run" / "3", "no timeline of step 3; it has: 2, 4"),
    ):
        shell.run("timeline", path, "--json", status=WRONG_USE)
        assert why in shell.error
    shell.run("timeline", tmp_path / "run", "--out", "t.pdf", status=WRONG_USE)
    assert ".png, .svg or .json" in shell.error


def test_missing_matplotlib_is_named_and_a_trace_needs_none(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shell.run("timeline", tmp_path / "run", "--out", tmp_path / "t.png", status=WRONG_USE)
    assert "[plot]'" in shell.error
    shell.run("timeline", tmp_path / "run", "--out", tmp_path / "t.json")
    assert (tmp_path / "t.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert "checkpoint 4 of run" in shell.run("timeline", "run")  # whose picture is not asked for
    assert shell.error.startswith("no picture: ")
    assert "[plot]'" in shell.error
    assert not (tmp_path / "timeline.png").exists()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from stub_trainer import PARAMS, Loop
import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

directory = Path(sys.argv[1])

def parts():
    try:
        return len(fp.status(directory / "4").parts)
    except fp.NoSessionError:  # the first save has not begun yet
        return 0

def kill(trainer):
    if trainer.global_step == 3:
        while parts() < len(PARAMS):
            time.sleep(0.01)
        time.sleep(0.3)
        callback.on_layer_ready(trainer, "late", {"x": 1})
        while parts() < len(PARAMS) + 1:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

callback = PartialCheckpointCallback(directory)
Loop(callback, epochs=2, streamed=PARAMS, at={"ready": kill}).fit()
"""


def test_a_killed_run_can_be_drawn_and_one_that_goes_on_appends(
    tmp_path: Path, shell: Shell
) -> None:
    directory = tmp_path / "run"
    assert run_program(KILLED, directory, check=False) == -signal.SIGKILL
    file = directory / "timeline" / "p0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # as if the last line were torn, too
    said = shell.run("timeline", directory, "--out", tmp_path / "t.png")
    assert "checkpoint 4" in said
    assert "not finished" in said
    assert (tmp_path / "t.png").stat().st_size > 10_000
    callback = PartialCheckpointCallback(directory)
    Loop(callback, epochs=3, streamed=PARAMS).resume(*restored(callback)).fit()
    first, second = timeline.read(directory)
    assert (first.saved_steps, second.saved_steps) == ([2, 4], [4, 6])
    shell.run("timeline", directory, "--out", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "process_name" in {event["name"] for event in events if event["ph"] == "M"}
    assert shell.json("timeline", directory / "2")["step"] == 2


def test_spans_are_in_a_trace_of_jax_s_own_profiler(tmp_path: Path) -> None:
    with jax.profiler.trace(str(tmp_path / "profile")):
        fitted(tmp_path / "run", streamed=PARAMS)
    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    found = {
        event.name: dict(event.stats)
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("flax_partial")
    }
    phases = ("snapshot", "save", "wait", "copy", "write", "commit", "finalize", "save_async")
    assert {f"flax_partial.{phase}" for phase in phases} <= found.keys()
    assert found["flax_partial.finalize"]["checkpoint"] == 2
    assert "group" in found["flax_partial.save_async"]
    shutil.rmtree(tmp_path / "profile")
