"""The pipeline with a process for each stage, as a user runs it: killed or not, the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from test_examples import assert_same_bits

import flax_partial as fp
from flax_partial.cli.commands.timeline import layout as lanes
from flax_partial.runs import timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--layers", "4", "--width", "32", "--steps-per-epoch", "3", "--epochs", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(script: str, *options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, EXAMPLES / script, *SMALL, *map(str, options)],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
            timeout=150,
        )

    return start


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with four stages, which nothing stopped."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert run("pipeline_lm.py", "--directory", directory).returncode == 0
    return directory


def test_killed_stage_ends_with_the_bits_of_one_process_that_was_not(
    run: Run, alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    options = ("--directory", directory, "--processes", 4, "--kill-stage", 2, "--at-step", 6)
    done = run("multiprocess_pipeline.py", *options)
    assert done.returncode == 0, done.stderr
    assert "Stage 2 was killed by signal 9: starting all stages again." in done.stdout
    assert re.findall(r"^\[stage (\d)\] resumed at step 3$", done.stdout, re.MULTILINE)
    streamed = dict(
        re.findall(r"^\[stage (\d)\] step 3: streamed (.*)$", done.stdout, re.MULTILINE)
    )
    assert streamed == {"0": "blocks.0, embed", "1": "blocks.1", "2": "blocks.2",
                        "3": "head, blocks.3"}  # fmt: skip
    assert fp.steps(directory) == [3, 6]
    newest = directory / "6"
    assert fp.verify(newest).ok
    killed, resumed = timeline.read(directory)
    assert not [end for end in killed.processes[2].ends if end.step == 6]
    assert [track.lanes[0].title for track in lanes.chart_of(resumed, 6).tracks] == [
        f"process {stage}" for stage in range(4)
    ]
    assert fp.metadata(newest).leaves.keys() == fp.metadata(alone / "6").leaves.keys()
    assert_same_bits(newest, alone / "6")


def test_two_processes_go_on_from_one_with_four_stages_and_it_from_them(
    run: Run, alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    assert run("pipeline_lm.py", "--directory", directory, "--epochs", 1).returncode == 0
    done = run("multiprocess_pipeline.py", "--directory", directory, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "[stage 1] resumed at step 3" in done.stdout
    assert_same_bits(directory / "6", alone / "6")
    again = run("pipeline_lm.py", "--directory", directory, "--epochs", 3)
    assert again.returncode == 0
    assert "Resumed at step 6" in again.stdout


def test_wrong_options_are_refused_before_any_process_starts(run: Run, tmp_path: Path) -> None:
    for options in (("--processes", 5), ("--processes", 0), ("--kill-stage", 4)):
        done = run("multiprocess_pipeline.py", "--directory", tmp_path / "run", *options)
        assert done.returncode == 2
        assert options[0] in done.stderr or "--stages" in done.stderr
