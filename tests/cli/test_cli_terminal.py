"""The command line where people see it: on terminals, in pipes, interrupted, from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shell import MIXED, write
from terminal import SLOW_SECS, into, into_closed_pipe, on_terminal
from things import QUICK, listing

import flax_partial as fp
from flax_partial.cli.main import INTERRUPTED, PIPE_CLOSED, PROBLEM, TERMINATED

PROGRAM = str(Path(sys.executable).with_name("flax-partial"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "c", MIXED)


def test_a_terminal_has_colour_and_folds_nothing_that_fits(path: Path) -> None:
    with on_terminal("show", path, width=90) as terminal:
        assert terminal.end() == 0
        assert "\x1b[1m" in terminal.shown
        assert any(line.startswith("├── eighth") for line in terminal.lines())
        assert "\x1b[31m" not in terminal.shown  # which a string of the checkpoint holds
        assert max(map(len, terminal.lines())) <= 90


def test_a_narrow_terminal_lacks_columns_and_says_which(path: Path) -> None:
    with on_terminal("show", path, width=40) as terminal:
        assert terminal.end() == 0
        lines = terminal.lines()
        assert max(map(len, lines)) <= 40
        said = r"no room for DTYPE, SHARDING \(\w+(:0)? in each row\), SHARE"
        assert re.search(said, " ".join(lines))


@pytest.mark.parametrize("command", ["verify", "export", "diff"])
def test_a_bar_shows_how_far_it_is_and_is_gone_at_the_end(
    command: str, path: Path, tmp_path: Path
) -> None:
    more = {"verify": [], "export": [tmp_path / "out"], "diff": [tmp_path / "d"]}[command]
    write(tmp_path / "d", {**MIXED, "tiny": np.ones(4), "half": np.ones((2, 2))})
    with on_terminal(command, path, *more, slow_secs=SLOW_SECS) as terminal:
        terminal.end()
        assert re.search(r"ing ━+ .*/[0-9.]+ (bytes|KiB)", "\n".join(terminal.lines()))
        *_, bar, rest = terminal.shown.split("\x1b[2K")  # each clears a line
        assert "━" in bar
        assert "━" not in rest
        assert "\x1b[?25h" in terminal.shown  # the cursor is back


@pytest.mark.parametrize("answer", ["y", "Yes", "n", ""])
@pytest.mark.parametrize(
    ("command", "about"),
    [
        ("abort {}/3", "1 part, 16 B, last saved "),
        ("rm {}/1", "/1: "),
        ("prune {} --keep-last 1", "1 of "),
    ],
)
def test_what_removes_asks_first(command: str, about: str, answer: str, tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / str(step), {"w": 1})
    fp.save(tmp_path / "3", {"a": np.ones(2)}, options=QUICK)
    before = listing(tmp_path)
    with on_terminal(*command.format(tmp_path).split()) as terminal:
        assert about in terminal.wait_for("? [y/N] ")
        assert listing(tmp_path) == before
        terminal.press(answer + "\n")
        is_agreed = answer in ("y", "Yes")
        assert terminal.end() == (0 if is_agreed else PROBLEM)
    assert (listing(tmp_path) != before) == is_agreed


def test_ctrl_c_ends_quietly_and_changes_nothing(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": np.ones(2)}, options=QUICK)
    with on_terminal("abort", tmp_path / "c") as terminal:
        terminal.wait_for("Drop it?")
        terminal.press("\x03")
        assert terminal.end() == INTERRUPTED
        assert "Traceback" not in terminal.shown
    assert fp.status(tmp_path / "c").parts


@pytest.mark.parametrize("program", [[sys.executable, "-Pm", "flax_partial"], [PROGRAM]])
def test_ctrl_c_while_the_program_is_imported_ends_quietly(
    program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "jax.py").write_text("print('slow', flush=True); import time; time.sleep(60)")
    process = subprocess.Popen(
        program,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"slow\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"")
    assert process.returncode == INTERRUPTED


def test_watch_follows_a_session_until_it_is_finalized(tmp_path: Path) -> None:
    path = tmp_path / "c"
    fp.save(path, {"a": np.ones(2)}, options=QUICK)
    with on_terminal("status", path, "--watch") as terminal:
        terminal.wait_for("1 part, 1 leaf")
        fp.save(path, {"b": np.ones(2)}, options=QUICK)
        terminal.wait_for("2 parts, 2 leaves")
        fp.finalize(path)
        assert terminal.end() == 0
        assert terminal.lines()[-2:] == [f"{path} was finalized", ""]


def test_watch_of_a_run_waits_for_each_session_and_follows_it(tmp_path: Path) -> None:
    with on_terminal("status", tmp_path, "--watch") as terminal:
        for step in (1, 2):
            terminal.wait_for(f"waiting for {tmp_path} to begin its next checkpoint")
            terminal.shown = ""
            fp.save(tmp_path / str(step), {"a": np.ones(2)}, options=QUICK)
            terminal.wait_for("1 part, 1 leaf")
            fp.finalize(tmp_path / str(step))
            terminal.wait_for(f"{step} was finalized")
        for step in (3, 4):  # the one before was left behind
            fp.save(tmp_path / str(step), {"a": np.ones(2)}, options=QUICK)
            terminal.wait_for(f"{step}.partial_save")
        terminal.press("\x03")
        assert terminal.end() == INTERRUPTED
        assert "Traceback" not in terminal.shown


def test_watch_draws_the_newest_parts_that_fit(tmp_path: Path) -> None:
    for number in range(20):
        fp.save(tmp_path / "c", {f"leaf{number:02}": 1}, options=QUICK)
    with on_terminal("status", tmp_path / "c", "--watch", width=40, height=12) as terminal:
        terminal.wait_for("leaf19")
        shown = [line for line in terminal.lines() if line]
        assert len(shown) == 12 - 1  # where the cursor is
        assert shown[-1].endswith("leaf19")
        fp.abort(tmp_path / "c")
        assert terminal.end() == 0
        assert "was dropped" in " ".join(terminal.lines()).replace("  ", " ")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)]
)
def test_an_export_that_is_told_to_stop_leaves_nothing(
    number: signal.Signals, status: int, path: Path, tmp_path: Path
) -> None:
    with on_terminal("export", path, tmp_path / "out", slow_secs=60) as terminal:
        terminal.wait_for("\x1b[?25l")  # it hides the cursor: there is a file, and a bar to be
        assert list(tmp_path.glob(".out.*.tmp"))
        os.kill(terminal.pid, number)
        assert terminal.end() == status
        assert "Traceback" not in terminal.shown
        assert "\x1b[?25h" in terminal.shown
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [["show"], ["verify"], ["show", "--json"]])
def test_a_reader_that_has_gone_is_no_matter(arguments: list[str], path: Path) -> None:
    assert into_closed_pipe(*arguments, path) == (PIPE_CLOSED, "")


def test_output_that_cannot_be_written_is_a_problem(path: Path) -> None:
    full = "flax-partial: [Errno 28] No space left on device\n"
    assert into("/dev/full", "show", path) == (PROBLEM, full)


def test_program_is_installed_and_needs_neither_locale_nor_output(path: Path) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [PROGRAM, "show", path], check=False, capture_output=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\n|-- eighth" in done.stdout
    closed = ["sh", "-c", '"$0" -Pm flax_partial show "$1" >&-', sys.executable, path]
    assert subprocess.run(closed, check=False).returncode == 0


ALL = """
import contextlib, io, sys
from jax._src import xla_bridge
from flax_partial.cli.main import main

path, session, out = sys.argv[1:]
for command in (
    ["ls", path + "/.."], ["show", path], ["status", session], ["verify", path],
    ["diff", path, path], ["export", path, out], ["finalize", session], ["abort", session, "--yes"],
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(command)
    assert not xla_bridge._backends, command
"""


def test_no_command_starts_a_device_which_training_may_hold(path: Path, tmp_path: Path) -> None:
    import jax

    fp.save(tmp_path / "d", {"key": jax.random.key(0), "w": jax.numpy.ones(3)}, options=QUICK)
    arguments = [path, tmp_path / "d", tmp_path / "out"]
    subprocess.run([sys.executable, "-Pc", ALL, *arguments], check=True)
    assert fp.verify(tmp_path / "d").ok
