"""The main job, run as a user runs it: whatever stops it, it ends with the same bits."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import lm_directory
import numpy as np
import pytest
from example_process import (
    EXAMPLES,
    SMALL,
    Ended,
    Example,
    assert_same_bits,
    digests,
    leaves_of,
)

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(700)  # longer than a program may take

LAYERS = ("embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head")
EVERY_4 = ("--checkpoint-every", "4")
STREAMED = ", ".join(reversed(LAYERS))


def stopped(
    example: Example,
    at: str | tuple[str, ...],
    *options: object,
    delay_secs: float = 0.0,
    how: signal.Signals = signal.SIGKILL,
) -> Ended:
    """A run to which a signal was sent so long after the line that begins with `at`."""

    def until(lines: list[str]) -> bool:
        return bool(lines) and lines[-1].startswith(at)

    ended = example.run(*options, until=until, delay_secs=delay_secs, how=how)
    assert any(line.startswith(at) for line in ended.output.splitlines()), ended
    return ended


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    cache = tmp_path_factory.mktemp("compiled")
    return Example("pipeline_lm.py", cache, *SMALL, "--steps-per-epoch", 6)


@pytest.fixture(scope="module")
def unbroken(example: Example, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing stopped: its directory and what it said."""
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    trace = directory.with_name("timeline.json")
    return directory, example.complete("--directory", directory, *EVERY_4, "--timeline", trace)


@pytest.fixture
def copy(unbroken: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the unbroken run's directory, to go on in."""
    return shutil.copytree(unbroken[0], tmp_path / "copy")


def test_timeline_has_a_lane_for_each_stage_and_the_order_of_streaming(
    unbroken: tuple[Path, str],
) -> None:
    directory, output = unbroken
    trace = directory.with_name("timeline.json")
    assert f"wrote {trace}" in output
    events = json.loads(trace.read_text())["traceEvents"]
    named = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {f"cpu:{stage}" for stage in range(4)} <= named
    began = {
        e["name"].removeprefix("params."): e["ts"]
        for e in events
        if e["name"].startswith("params.") and e["args"]["checkpoint"] == 12
    }
    assert sorted(began, key=began.__getitem__) == list(reversed(LAYERS))


def test_trains_streams_and_shows_what_it_cost(unbroken: tuple[Path, str]) -> None:
    directory, output = unbroken
    first, second = map(
        float, re.findall(r"^epoch ./2: mean loss (\d\.\d+)$", output, re.MULTILINE)
    )
    assert second < first < np.log(4096) + 0.1
    assert re.findall(r"^step (\d+): streaming (.*)$", output, re.MULTILINE) == [
        (step, STREAMED) for step in ("4", "6", "8", "12")
    ]
    rows = re.findall(r"^ +(\d+) +(\d+) +[\d.]+ +\d+ ms +\d+ ms +\d+ ms *$", output, re.MULTILINE)
    groups = str(2 * len(LAYERS) + len(("rngs", "metrics", "progress")))
    assert rows == [(step, groups) for step in ("4", "6", "8", "12")]
    assert len(digests(output)) == 2
    assert fp.steps(directory) == [6, 8, 12]


def test_checkpoint_holds_the_whole_state_under_global_names(unbroken: tuple[Path, str]) -> None:
    newest = fp.latest(unbroken[0])
    assert newest is not None
    assert fp.verify(newest).ok
    state = fp.load(newest)
    blocks = {str(number) for number in range(4)}
    for root in ("params", "opt_state"):
        assert state[root].keys() == {"embed", "blocks", "head"}
        assert state[root]["blocks"].keys() == blocks
    assert state["progress"] == {"global_step": 12, "current_epoch": 1, "batches_done": 6}
    keys = state["rngs"]
    assert keys.keys() == {"dropout", "shuffle"}
    assert all(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) for key in keys.values())


def test_output_in_a_pipe_is_plain_lines(unbroken: tuple[Path, str]) -> None:
    assert "\x1b" not in unbroken[1]
    assert "\r" not in unbroken[1]


def test_run_again_says_that_training_is_complete_and_shows_the_result(
    example: Example, unbroken: tuple[Path, str]
) -> None:
    directory, output = unbroken
    again = example.complete("--directory", directory, *EVERY_4)
    assert "Resumed at step 12.\nTraining is complete" in again
    assert digests(again) == digests(output)
    assert fp.steps(directory) == [6, 8, 12]


def test_checkpoint_in_the_middle_of_an_epoch_goes_on_at_the_next_batch(
    example: Example, unbroken: tuple[Path, str], copy: Path
) -> None:
    shutil.rmtree(copy / "12")
    output = example.complete("--directory", copy, *EVERY_4)
    assert "Resumed at step 8, in epoch 2 with 2 of 6 batches done." in output
    assert digests(output) == digests(unbroken[1])
    assert_same_bits(leaves_of(copy / "12"), leaves_of(unbroken[0] / "12"))


def test_no_checkpoint_trains_the_same_and_writes_nothing(
    example: Example, unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    output = example.complete("--directory", tmp_path / "run", "--no-checkpoint")
    assert digests(output) == digests(unbroken[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_and_run_again_ends_with_the_same_bits(
    example: Example, unbroken: tuple[Path, str], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311 - the same moments every time
    moment = draw.choice(["No checkpoint", "step 4", "epoch 1", "step 8", "step 12"])
    command = ("--directory", tmp_path / "run", *EVERY_4)
    killed = stopped(example, moment, *command, delay_secs=draw.uniform(0, 0.1))
    assert killed.status == -signal.SIGKILL
    stopped(example, ("Resumed", "No checkpoint"), *command, delay_secs=draw.uniform(0, 2))
    output = example.run(*command).output
    assert digests(output) == digests(unbroken[1])
    assert_same_bits(leaves_of(tmp_path / "run" / "12"), leaves_of(unbroken[0] / "12"))


def test_two_stages_go_on_where_four_stopped(
    example: Example, unbroken: tuple[Path, str], copy: Path
) -> None:
    shutil.rmtree(copy / "8")
    shutil.rmtree(copy / "12")
    output = example.complete("--directory", copy, "--stages", 2)
    assert "Resumed at step 6, in epoch 2 with 0 of 6 batches done." in output
    two, four = (leaves_of(run / "12", "params", "opt_state") for run in (copy, unbroken[0]))
    assert two.keys() == four.keys()
    for name, value in two.items():  # other programs may round otherwise
        np.testing.assert_allclose(value, four[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_ctrl_c_ends_with_a_sentence_on_how_to_go_on(
    example: Example, unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    command = ("--directory", tmp_path / "run", *EVERY_4)
    interrupted = stopped(example, "epoch 1/2", *command, how=signal.SIGINT)
    assert interrupted.status == 130
    said = interrupted.errors
    assert re.search(r"^Interrupted. Run the same command again", said, re.MULTILINE)
    assert "Traceback" not in interrupted.output + said
    output = example.run(*command).output
    assert re.search(r"^Resumed at step (6|8|12)", output, re.MULTILINE)
    assert digests(output) == digests(unbroken[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", 0), "argument --stages: '0' is not a whole number from 1 on"),
        (("--stages", 5), "argument --stages: 5 is not between 1 and the number of layers, 4"),
        (("--epochs", "many"), "argument --epochs: 'many' is not a whole number from 1 on"),
        (("--width", 33), "argument --width: 33 is not a multiple of 32"),
        (("--steps-per-epoch", 9999), "argument --steps-per-epoch: 9999 batches are more than"),
        (
            ("--directory", EXAMPLES / "trainer.py"),
            "argument --directory: '{}' is a file, or below one",
        ),
        (("--directory", EXAMPLES), "argument --directory: '{}' is not empty, and holds no"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused_with_status_2(
    example: Example, options: tuple[str, Any], message: str
) -> None:
    refused = example.run(*options)
    assert refused.status == 2
    assert message.format(options[1]) in refused.errors
    assert "Traceback" not in refused.errors
    assert refused.output == ""


def test_another_model_cannot_go_on_in_the_same_directory(example: Example, copy: Path) -> None:
    refused = example.run("--directory", copy, "--width", 64)
    assert refused.status == 2
    assert "holds a run with --seed 0, --layers 4, --width 32" in refused.errors


def test_two_runs_cannot_share_a_directory(example: Example, tmp_path: Path) -> None:
    with lm_directory.claim(tmp_path, {}):
        refused = example.run("--directory", tmp_path)
    assert refused.status == 2
    assert f"another run is using '{tmp_path}'" in refused.errors
