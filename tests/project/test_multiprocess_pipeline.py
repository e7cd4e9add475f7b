"""The pipeline with a process for each stage, as a user runs it: killed or not, the same bits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from example_process import SMALL, Example, assert_same_bits, leaves_of

import flax_partial as fp
from flax_partial.cli.commands.timeline import layout as lanes
from flax_partial.runs import timeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Example, Example]:
    """The program of one process, and that of several."""
    cache = tmp_path_factory.mktemp("compiled")
    options = (cache, *SMALL, "--steps-per-epoch", 3)
    return Example("pipeline_lm.py", *options), Example("multiprocess_pipeline.py", *options)


@pytest.fixture(scope="module")
def alone(examples: tuple[Example, Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with four stages, which nothing stopped."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    examples[0].complete("--directory", directory)
    return directory


def test_killed_stage_ends_with_the_bits_of_one_process_that_was_not(
    examples: tuple[Example, Example], alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    options = ("--directory", directory, "--processes", 4, "--kill-stage", 2, "--at-step", 6)
    done = examples[1].run(*options)
    assert done.status == 0, done
    assert "Stage 2 was killed by signal 9: starting all stages again." in done.output
    assert re.findall(r"^\[stage (\d)\] resumed at step 3$", done.output, re.MULTILINE)
    said = re.findall(r"^\[stage (\d)\] step 3: streamed (.*)$", done.output, re.MULTILINE)
    assert dict(said) == {"0": "blocks.0, embed", "1": "blocks.1", "2": "blocks.2",
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
    assert_same_bits(leaves_of(newest), leaves_of(alone / "6"))
    drawn = Example("who_wrote_what.py", tmp_path, newest).complete()
    assert re.findall(r"^process (\d) .*[a-z]", drawn, re.MULTILINE) == list("0123")


def test_two_processes_go_on_from_one_with_four_stages_and_it_from_them(
    examples: tuple[Example, Example], alone: Path, tmp_path: Path
) -> None:
    one, several = examples
    directory = tmp_path / "run"
    one.complete("--directory", directory, "--epochs", 1)
    done = several.run("--directory", directory, "--processes", 2)
    assert done.status == 0, done
    assert "[stage 1] resumed at step 3" in done.output
    assert_same_bits(leaves_of(directory / "6"), leaves_of(alone / "6"))
    assert "Resumed at step 6" in one.complete("--directory", directory, "--epochs", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--processes", 5), "argument --stages: 5 is not between 1"),
        (("--processes", 0), "argument --processes: 0 is below 1"),
        (("--kill-stage", 4), "argument --kill-stage: 4 is not between 0 and 3"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused_before_any_process_starts(
    examples: tuple[Example, Example], tmp_path: Path, options: tuple[str, int], message: str
) -> None:
    done = examples[1].run("--directory", tmp_path / "run", *options)
    assert done.status == 2
    assert message in done.errors
    assert not list(tmp_path.iterdir())
