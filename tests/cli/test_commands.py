"""The commands of the command line on real checkpoints: what they say, and how they end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
import trees
from orbax.checkpoint.experimental import v1
from shell import MIXED, Shell, begin, flip_a_bit_of, write
from things import Element, listing

import flax_partial as fp
from flax_partial.cli.main import PROBLEM, WRONG_USE, main
from flax_partial.runs import completeness
from flax_partial.storage import checkpoint_dir

HALF = fp.Slice(np.ones((1, 3)), start=0, size=2)  # of a stacked leaf


# --- ls


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    for step, loss in ((5, 0.5), (10, 0.25), (100, 0.75)):
        write(tmp_path / str(step), {"w": np.ones(step)}, step=step, metrics={"loss": loss})
    begin(tmp_path / "110", {"w": np.ones(4)}, step=110)
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_ls_lists_a_run_and_marks_latest_and_best(run_directory: Path, shell: Shell) -> None:
    listed = shell.json("ls", run_directory, "--monitor", "loss")
    assert (listed["latest"], listed["best"]) == ("100", "10")
    assert [(c["name"], c["step"], c["state"], c["bytes"]) for c in listed["checkpoints"]] == [
        ("5", 5, "finalized", 40),
        ("10", 10, "finalized", 80),
        ("100", 100, "finalized", 800),
        ("110.partial_save", 110, "unfinished", 32),
    ]
    first = listed["checkpoints"][0]
    assert (first["metrics"], first["format"]) == ({"loss": 0.5}, "flax_partial")
    assert shell.json("ls", run_directory, "--monitor", "loss", "--mode", "max")["best"] == "100"
    assert shell.json("ls", run_directory)["best"] is None
    text = shell.run("ls", run_directory, "--monitor", "loss")
    ends = [line.split()[-1] for line in text.splitlines()]
    assert ends == ["METRICS", "loss=0.5", "best", "latest", "1"]
    assert "\x1b" not in text


@pytest.mark.parametrize(("mode", "best"), [("min", "10"), ("max", "11")])
def test_of_two_that_are_best_the_newer_is(
    mode: str, best: str, tmp_path: Path, shell: Shell
) -> None:
    for step, loss in ((9, 0.5), (10, 0.5), (11, 0.75)):
        write(tmp_path / str(step), {"w": 1}, metrics={"loss": loss})
    assert shell.json("ls", tmp_path, "--monitor", "loss", "--mode", mode)["best"] == best


def test_ls_says_what_is_damaged_and_lists_the_rest(run_directory: Path, shell: Shell) -> None:
    (run_directory / "5" / "state" / "contents.json").write_text("{}")
    (run_directory / "10" / "state" / "_METADATA").unlink()
    listed = shell.json("ls", run_directory, status=PROBLEM)["checkpoints"]
    assert [(c["state"], bool(c["problem"])) for c in listed] == [
        *[("damaged", True)] * 2,
        ("finalized", False),
        ("unfinished", False),
    ]
    assert "contents.json" in shell.run("ls", run_directory, status=PROBLEM)


def test_ls_lists_what_managers_of_orbax_wrote(tmp_path: Path, shell: Shell) -> None:
    options = v0.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with v0.CheckpointManager(tmp_path, options=options) as manager:
        for step in (1, 2):
            state = v0.args.StandardSave({"w": jnp.ones(step)})
            manager.save(step, args=state, metrics={"loss": 1.0 / step})
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"w": jnp.ones(3)}, metrics={"loss": 2.0})
    listed = shell.json("ls", tmp_path, "--monitor", "loss")
    assert (listed["latest"], listed["best"]) == ("3", "2")
    assert [(c["bytes"], c["format"]) for c in listed["checkpoints"]] == [
        (4 * step, "orbax") for step in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("steps", "latest"),
    [
        ({"ckpt_00009": None, "ckpt_00010": None, "best": 9}, "ckpt_00010"),
        ({"ckpt_00010": None, "10": None, "best": 9}, "10"),
        ({"0": None}, "0"),
        ({"best": None}, None),
    ],
)
def test_latest_is_that_of_the_last_step_whatever_it_is_called(
    steps: dict[str, Any], latest: str | None, tmp_path: Path, shell: Shell
) -> None:
    for name, step in steps.items():
        write(tmp_path / name, {"w": 1}, **({} if step is None else {"step": step}))
    assert shell.json("ls", tmp_path)["latest"] == latest


def test_ls_bears_names_that_no_checkpoint_can_have(tmp_path: Path, shell: Shell) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.partial_save")).mkdir()
    write(tmp_path / "5", {"w": 1})
    listed = shell.json("ls", tmp_path, status=PROBLEM)["checkpoints"]
    assert sorted(c["state"] for c in listed) == ["damaged", "finalized"]
    shell.run("ls", "/")


def test_names_and_metadata_cannot_act_on_a_terminal(tmp_path: Path, shell: Shell) -> None:
    metadata = {"note": "\x9b2J", "metrics": {"\x1b[2J": 1.0}}
    path = begin(tmp_path / "c", {"\x1b[2J\n": HALF}, **metadata)
    output = shell.run("ls", tmp_path) + shell.run("show", path) + shell.run("status", path)
    output += shell.run("finalize", path, status=PROBLEM)
    assert not {"\x1b", "\x9b"} & set(output + shell.error)
    assert r"\x1b[2J\n" in output


def test_ls_of_an_empty_directory_is_fine(tmp_path: Path, shell: Shell) -> None:
    assert shell.run("ls", tmp_path) == f"no checkpoints in {tmp_path}\n"
    write(tmp_path / "run" / "3", {"a": 1})
    runs = "It holds runs: run (steps 3)."
    assert shell.run("ls", tmp_path) == f"no checkpoints in {tmp_path}. {runs}\n"
    shell.run("latest", tmp_path, status=PROBLEM)
    assert shell.error.endswith(f"step. {runs}\n")
    assert shell.json("ls", tmp_path, "--monitor", "loss")["checkpoints"] == []


@pytest.mark.parametrize(
    ("command", "newest"),
    [
        ("show .", "100"),
        ("export . out", "100"),
        ("diff . 100", "100"),
        ("status .", "110.partial_save"),
    ],
)
def test_run_stands_for_its_newest_checkpoint(
    command: str, newest: str, run_directory: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory)
    told = shell.json(*command.split())
    path = Path(told.get("path", told.get("a"))).absolute()
    assert path == run_directory / newest.removesuffix(".partial_save")
    assert shell.error.startswith(". is a run: its newest ")
    assert shell.error.endswith(f" checkpoint is {newest}\n")


def test_latest_prints_a_path_for_scripts(run_directory: Path, shell: Shell) -> None:
    newest = str(run_directory / "100")
    assert shell.run("latest", run_directory) == f"{newest}\n"
    assert json.loads(shell.run("--json", "latest", run_directory)) == {"path": newest}
    assert shell.run("latest", run_directory / "logs", status=PROBLEM) == ""
    assert "no finalized checkpoint" in shell.error


def test_what_is_left_of_a_removed_checkpoint_is_none(run_directory: Path, shell: Shell) -> None:
    before = shell.json("ls", run_directory)
    for name in ("100", "110.partial_save"):
        shutil.copytree(run_directory / name, run_directory / f".{name}.0123abcd.deleted")
    assert shell.json("ls", run_directory) == before
    for command in ("show", "verify", "status", "abort", "rm"):
        shell.run(command, run_directory / ".100.0123abcd.deleted", status=WRONG_USE)
        assert "what is left of a checkpoint that was removed" in shell.error


# --- rm and prune


def test_rm_removes_a_checkpoint_even_a_damaged_one(run_directory: Path, shell: Shell) -> None:
    (run_directory / "100" / "state" / "contents.json").write_text("{}")
    for name in ("10", "100"):
        assert shell.json("rm", run_directory / name, "--yes")["removed"]
    assert fp.steps(run_directory) == [5]


def test_rm_removes_no_checkpoint_by_the_path_of_its_session(
    run_directory: Path, shell: Shell
) -> None:
    shell.run("rm", run_directory / "10.partial_save", "--yes", status=WRONG_USE)
    assert 10 in fp.steps(run_directory)


@pytest.mark.parametrize("command", ["rm {}/10", "prune {} --keep-last 1"])
def test_what_is_read_is_not_removed(command: str, run_directory: Path, shell: Shell) -> None:
    with checkpoint_dir.reading(run_directory / "10"):
        shell.run(*command.format(run_directory).split(), "--yes", status=PROBLEM)
    assert 10 in fp.steps(run_directory)


def test_prune_keeps_the_last_and_what_is_not_called_by_a_step(
    run_directory: Path, shell: Shell
) -> None:
    write(run_directory / "best", {"w": 1}, step=1)
    prune = "prune", run_directory, "--keep-last", 1
    assert "would remove 5 10 of " in shell.run(*prune, "--dry-run")
    shell.run(*prune, status=WRONG_USE)  # there is no terminal to ask at
    assert fp.steps(run_directory) == [5, 10, 100]
    assert shell.json(*prune, "--yes")["removed"] == ["5", "10"]
    left = [entry["name"] for entry in shell.json("ls", run_directory)["checkpoints"]]
    assert left == ["best", "100", "110.partial_save"]
    assert shell.run(*prune) == "removed nothing\n"


# --- show


def test_show_draws_every_kind_of_leaf(tmp_path: Path, shell: Shell) -> None:
    path = write(tmp_path / "c", {**MIXED, "key": jax.random.key(0)}, note="x")
    lines = shell.run("show", path).splitlines()
    assert lines[1].endswith("1 part, 10 leaves, 23.5 KiB")
    assert lines[2] == 'custom metadata: {"note": "x"}'
    shown = [" ".join(line.replace("─", " ").split()) for line in lines[5:]]
    first = jax.devices()[0]  # as JAX calls it: cpu:0, or TFRT_CPU_0 in 0.8
    assert shown == [
        "├ eighth (4,) float8_e4m3fn 4 B 0.0 %",
        "├ empty {}",
        f"├ half (2,2) bfloat16 {first} 8 B 0.0 %",
        f"├ key () key<fry> {first} 8 B 0.0 %",
        "├ nothing None",
        "├ params 2 leaves float32 23.4 KiB 99.9 %",
        f"│ ├ b (3,) float32 {first} 12 B 0.0 %",
        "│ └ w (60,100) float32 23.4 KiB 99.8 %",
        "├ step () int64 8 B 0.0 %",
        r"├ text 'a\x1b[31m'",
        "└ tiny (4,) int4 4 B 0.0 %",
        "total 10 leaves 23.5 KiB 100.0 %",
    ]


def test_show_goes_as_deep_as_asked_for_and_shows_what_is_chosen(
    tmp_path: Path, shell: Shell
) -> None:
    path = write(tmp_path / "c", {"a": {"b": {"c": np.ones(2), "d": np.ones(3)}}, "e": 1})
    shallow = shell.run("show", path, "--depth", 1).splitlines()[4:]
    assert [line.split()[1] for line in shallow] == ["a", "e", "3"]
    chosen = shell.json("show", path, "--only", "a", "--skip", "*.d")
    assert [(leaf["name"], leaf["shape"]) for leaf in chosen["leaves"]] == [("a.b.c", [2])]
    assert chosen["bytes"] == 48


def test_show_tells_how_arrays_are_sharded(tmp_path: Path, shell: Shell) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    spec = jax.sharding.PartitionSpec("data", None)
    array = jax.device_put(jnp.ones((8, 2)), jax.sharding.NamedSharding(mesh, spec))
    assert "(data=4,-)" in shell.run("show", write(tmp_path / "c", {"w": array}))


def test_show_shows_what_an_unfinished_checkpoint_holds(tmp_path: Path, shell: Shell) -> None:
    begin(tmp_path / "c", {"a": np.ones(2)})
    for path in (tmp_path / "c", tmp_path / "c.partial_save"):
        shown = shell.json("show", path)
        assert (shown["state"], shown["bytes"]) == ("unfinished", 16)
    write(tmp_path / "d", {"b": np.ones(1)})
    (tmp_path / "c.partial_save").rename(tmp_path / "d.partial_save")
    assert shell.json("show", tmp_path / "d")["state"] == "finalized"
    assert shell.json("show", tmp_path / "d.partial_save")["state"] == "unfinished"


def test_show_reads_what_orbax_wrote(tmp_path: Path, shell: Shell) -> None:
    v1.save(tmp_path / "whole", {"w": jnp.ones((2, 3))})
    v1.partial.save(tmp_path / "parts", {"w": jnp.ones((2, 3))})
    v1.partial.finalize(tmp_path / "parts")
    for name in ("whole", "parts"):
        shown = shell.json("show", tmp_path / name)
        assert (shown["format"], shown["bytes"]) == ("orbax", 24)
        assert "written by Orbax" in shell.run("show", tmp_path / name)
        assert "left out" not in shell.run("show", tmp_path / name)


def test_show_names_the_items_of_orbax_that_are_not_read(tmp_path: Path, shell: Shell) -> None:
    save = v0.args.StandardSave({"w": np.ones(3)})
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=v0.args.Composite(state=save, data=v0.args.JsonSave({"at": 7})))
    table = json.loads((tmp_path / "3" / "_CHECKPOINT_METADATA").read_text())
    table["item_handlers"]["data"] = "grain.PyGrainCheckpointHandler"
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text(json.dumps(table))
    (line,) = [line for line in shell.run("show", tmp_path).splitlines() if "left out" in line]
    assert line.startswith("left out: data: only its own handler reads it: grain.")
    assert list(shell.json("show", tmp_path / "3")["left_out"]) == ["data"]


# --- status


def test_status_says_what_was_saved_and_by_which_process(tmp_path: Path, shell: Shell) -> None:
    path = begin(tmp_path / "c", {"a": {"x": np.ones(2), "y": np.ones(2)}})
    begin(path, {"b": np.ones(1)}, step=3)
    (tmp_path / "c.partial_save" / "state" / "part.torn").mkdir()
    status = shell.json("status", path)
    assert [part["leaves"] for part in status["parts"]] == [2, 1]
    assert (status["bytes"], status["torn"]) == (40, ["part.torn"])
    lines = shell.run("status", path).splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["a.*", "b"]
    assert 'custom metadata: {"step": 3}' in lines


def test_status_says_what_is_lacking(tmp_path: Path, shell: Shell) -> None:
    saved = completeness.saved(callback="params", group="g")
    path = begin(tmp_path / "c", {"w": HALF}, step=3, session=saved)
    lacking = shell.json("status", path)["lacking"]
    assert lacking[0] == "step 3 was not completely written"
    assert lacking[1].startswith("w (1 of 2 chunks")
    assert shell.run("status", path).count("not complete: ") == 2


def test_status_of_parts_that_conflict_or_are_damaged_is_a_problem(
    tmp_path: Path, shell: Shell
) -> None:
    path = begin(tmp_path / "c", {"l": [Element(1, np.ones(2))]})
    assert shell.json("status", path, status=PROBLEM)["conflicts"]
    assert "conflict: " in shell.run("status", path, status=PROBLEM)
    (part,) = fp.status(begin(tmp_path / "d", {"a": 1})).parts
    (tmp_path / "d.partial_save" / "state" / part.name / "part.json").write_text("{}")
    assert shell.json("status", tmp_path / "d", status=PROBLEM)["damaged"] == [part.name]
    assert f"damaged: {part.name}" in shell.run("status", tmp_path / "d", status=PROBLEM)


def test_session_that_orbax_began_is_left_to_it(tmp_path: Path, shell: Shell) -> None:
    v1.partial.save(tmp_path / "7", {"w": jnp.ones((2, 3))})
    before = listing(tmp_path)
    (entry,) = shell.json("ls", tmp_path)["checkpoints"]
    assert (entry["step"], entry["state"], entry["format"]) == (7, "unfinished", "orbax")
    for command in ("status", "show", "finalize", "finalize --anyway", "abort --yes"):
        shell.run(*command.split(), tmp_path / "7", status=WRONG_USE)
        assert "Orbax" in shell.error
    assert listing(tmp_path) == before


def test_session_without_parts_is_shown_as_such(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "c.partial_save").mkdir()
    assert shell.json("status", tmp_path / "c")["parts"] == []
    assert "nothing was saved yet" in shell.run("status", tmp_path / "c")
    assert "unfinished: 0 parts" in shell.run("show", tmp_path / "c")
    assert shell.json("show", tmp_path / "c")["format"] == "flax_partial"
    assert shell.run("ls", tmp_path).split()[-1] == "unfinished"


# --- verify


def test_verify_names_what_is_damaged(tmp_path: Path, shell: Shell) -> None:
    path = write(tmp_path / "c", MIXED)
    whole = shell.json("verify", path)
    assert (whole["ok"], whole["leaves"], whole["bad"]) == (True, 9, {})
    flip_a_bit_of(path, MIXED["params"]["w"])
    assert list(shell.json("verify", path, status=PROBLEM)["bad"]) == ["params.w"]
    text = shell.run("verify", path, status=PROBLEM)
    assert "params.w" in text
    assert "1 problem" in text
    assert not shell.error


def test_verify_of_a_run_checks_each_of_its_checkpoints(tmp_path: Path, shell: Shell) -> None:
    for step in (1, 2):
        write(tmp_path / str(step), MIXED)
    begin(tmp_path / "3", {"w": 1})
    whole = shell.json("verify", tmp_path)
    assert [(Path(c["path"]).name, c["ok"]) for c in whole["checkpoints"]] == [
        ("1", True),
        ("2", True),
    ]
    assert (
        shell.run("verify", tmp_path).splitlines()[-1].startswith("fine: 2 checkpoints, 46.9 KiB")
    )
    flip_a_bit_of(tmp_path / "1", MIXED["params"]["w"])
    write(tmp_path / "4", {"w": 1})
    (tmp_path / "4" / "state" / "contents.json").write_text("{}")
    write(tmp_path / "5", {"w": 1})
    (tmp_path / "5" / "state" / "_METADATA").unlink()
    found = shell.json("verify", tmp_path, status=PROBLEM)["checkpoints"]
    assert [c["ok"] for c in found] == [False, True, False, False]
    lines = shell.run("verify", tmp_path, status=PROBLEM)
    assert "1: params.w" in lines
    assert "3 of 4 damaged: 4 checkpoints" in lines


def test_verify_of_what_orbax_wrote_reads_it(tmp_path: Path, shell: Shell) -> None:
    v1.save(tmp_path / "c", {"w": jnp.ones((2, 3))})
    assert shell.json("verify", tmp_path / "c")["bytes"] == 24
    shutil.rmtree(tmp_path / "c" / "state" / "d")
    shutil.rmtree(tmp_path / "c" / "state" / "ocdbt.process_0")
    assert not shell.json("verify", tmp_path / "c", status=PROBLEM)["ok"]


# --- finalize and abort


def test_finalize_makes_the_checkpoint_once_it_is_complete(tmp_path: Path, shell: Shell) -> None:
    path = begin(tmp_path / "c", {"w": HALF})
    shell.run("finalize", path, status=PROBLEM)
    assert "w (1 of 2 chunks" in shell.error
    begin(path, {"w": fp.Slice(np.ones((1, 3)), start=1, size=2)})
    done = shell.json("finalize", tmp_path / "c.partial_save")
    assert (done["path"], done["leaves"], done["parts"]) == (str(path), 1, 2)
    assert fp.verify(path).ok


def test_finalize_refuses_what_a_callback_had_not_completed(tmp_path: Path, shell: Shell) -> None:
    saved = completeness.saved(callback="params", group="g")
    path = begin(tmp_path / "c", {"a": np.ones(2)}, step=3, session=saved)
    shell.run("finalize", path, status=PROBLEM)
    assert "--anyway" in shell.error
    assert not path.exists()
    shell.run("finalize", path, "--anyway")
    assert fp.load(path)["a"].shape == (2,)


@pytest.mark.parametrize("session", ["mine", {"saved": "x"}])
def test_session_key_of_the_user_means_nothing(session: Any, tmp_path: Path, shell: Shell) -> None:
    shell.run("finalize", begin(tmp_path / "c", {"a": 1}, session=session))
    assert shell.json("show", tmp_path / "c")["custom_metadata"] == {"session": session}


@pytest.mark.parametrize(
    ("field", "label"),
    [
        pytest.param("training", "training", id="now"),
        pytest.param("custom_metadata", "custom metadata", id="up to version 0.1"),
    ],
)
def test_what_callbacks_keep_to_recover_is_not_shown(
    field: str, label: str, tmp_path: Path, shell: Shell
) -> None:
    saved = completeness.saved(callback="params", group="g")
    path = tmp_path / "c"
    fp.save(path, {"a": np.ones(2)}, **{field: {"step": 3, "session": saved}})
    shell.run("finalize", path, status=PROBLEM)
    assert "(step 3)" in shell.error
    for command in ("status", "show"):
        assert shell.json(command, path)[field] == {"step": 3}
        assert f'{label}: {{"step": 3}}\n' in shell.run(command, path)
    (found,) = shell.json("ls", tmp_path)["checkpoints"]
    assert found["step"] == 3
    shell.run("finalize", path, "--anyway")
    shell.run("export", path, tmp_path / "file")
    assert b"params" not in (tmp_path / "file").read_bytes()


def test_abort_asks_nobody_where_there_is_no_terminal(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begin(tmp_path / "c", {"a": np.ones(2)})
    (tmp_path / "answers").write_text("y\n")
    with (tmp_path / "answers").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        shell.run("abort", path, status=WRONG_USE)
    assert "--yes" in shell.error
    assert fp.status(path).parts
    assert shell.json("abort", path, "--yes")["dropped"]
    with pytest.raises(fp.NoSessionError):
        fp.status(path)


# --- wrong use


@pytest.mark.parametrize("arguments", [[], ["frob"], ["show"], ["ls", "a", "--mode", "best"]])
def test_wrong_arguments_are_told_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == WRONG_USE
    output, error = capsys.readouterr()
    assert not output
    assert error.startswith("usage: flax-partial")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("ls run/absent", "run/absent does not exist"),
        ("ls run/c", "use show or status"),
        ("ls run/d.partial_save", "use show or status"),
        ("ls run/c/state/contents.json", "is not a directory"),
        ("ls run --monitor lost", "no checkpoint has a metric 'lost'; they have loss"),
        ("show run/c --only f", "is called 'f'; there is a, b, b.long"),
        ("show run/c --only b.lung", "is called 'b.lung'; there is b.long"),
        ("show run/c --depth 0", "--depth is at least 1"),
        ("status run/c", "finalized already"),
        ("status run/absent", "absent"),
        ("finalize run/c", "finalized already"),
        ("abort run/absent --yes", "absent"),
        ("verify run/d", "not finalized"),
        ("verify run/d.partial_save", "finalize it first"),
        ("verify run/absent", "no checkpoint at run/absent; run has d.partial_save, c"),
        ("verify rum", "rum does not exist; there is run"),
        ("show rum/c", "rum does not exist; there is run"),
        ("ls rum", "rum does not exist; there is run"),
        ("timeline rum", "rum does not exist; there is run"),
        ("show run/c/state/cc", "run/c/state/cc does not exist"),
        ("show empty", "empty holds no checkpoint"),
        ("verify empty", "empty has no finalized checkpoint"),
        ("abort steps --yes", "steps is a run: its newest unfinished checkpoint is steps/10"),
        ("finalize steps", "steps is a run: its newest unfinished checkpoint is steps/10"),
        ("rm steps --yes", "steps is a run: its newest finalized checkpoint is steps/9"),
        ("rm steps/99 --yes", "no checkpoint at steps/99; steps has 9"),
        ("verify \0", "does not name a checkpoint"),
        ("show run", "has no finalized checkpoint of a step"),
        ("status run", "has no unfinished checkpoint of a step"),
        ("rm run --yes", "has no finalized checkpoint"),
        ("rm run/d.partial_save", "not finalized"),
        ("prune run --keep-last 0", "--keep-last is at least 1"),
        ("diff run/c run/d", "not finalized"),
        ("diff run/d.partial_save run/c", "finalize it first"),
        ("diff run/c run/absent", "no checkpoint"),
        ("diff run/c run/c --only f", "is called 'f'"),
        ("export run/c run", "exists already"),
        ("export run/c link", "exists already"),
        ("export run/c absent/out", "absent is not a directory"),
        ("export run/c hdfs://b/out", "is a URL"),
        ("ls hdfs://b/run", "is a URL"),
        ("latest hdfs://b/run", "is a URL"),
        ("show hdfs://b/run", "is a URL"),
        ("status hdfs://b/run", "is a URL"),
        ("verify hdfs://b/run", "is a URL"),
        ("finalize hdfs://b/run", "is a URL"),
        ("abort hdfs://b/run --yes", "is a URL"),
        ("rm hdfs://b/run --yes", "is a URL"),
        ("prune hdfs://b/run --keep-last 1", "is a URL"),
        ("diff run/c hdfs://b/run", "is a URL"),
        ("export hdfs://b/run out", "is a URL"),
        ("timeline hdfs://b/run", "is a URL"),
    ],
)
def test_what_makes_no_sense_is_refused_and_says_why(
    command: str, why: str, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run" / "c", {"a": np.ones(2), "b": {"long": 1}}, metrics={"loss": 1.0})
    begin(tmp_path / "run" / "d", {"a": np.ones(2)})
    write(tmp_path / "steps" / "9", {"a": 1})
    begin(tmp_path / "steps" / "10", {"a": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = listing(tmp_path)
    shell.run(*command.split(" "), status=WRONG_USE)
    assert why in shell.error
    assert listing(tmp_path) == before


def test_every_dtype_and_kind_is_listed_shown_verified_and_compared(
    tmp_path: Path, shell: Shell
) -> None:
    state = {name: trees.random_bits(name, (5, 3), 0) for name in trees.DTYPES}
    path = write(tmp_path / "c", {**state, "keys": jax.random.split(jax.random.key(0), 3)})
    assert len(shell.json("show", path)["leaves"]) == len(state) + 1
    assert shell.json("ls", tmp_path)["checkpoints"][0]["leaves"] == len(state) + 1
    assert shell.json("verify", path)["ok"]
    other = write(tmp_path / "d", {**state, "keys": jax.random.split(jax.random.key(1), 3)})
    (change,) = shell.json("diff", path, other, status=PROBLEM)["changes"]
    assert change["name"] == "keys"
