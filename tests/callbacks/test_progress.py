"""A bar of bytes on a real terminal: alone, below tqdm's and inside of rich's displays."""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from stub_trainer import StubTrainer
from terminal import running_on_terminal

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback
from flax_partial.loading import load as loading
from flax_partial.loading.checkpoint import OwnCheckpoint
from flax_partial.storage import session_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import pytest
    from terminal import Terminal

WRITING = re.compile(r"Writing checkpoints:? .*\d.*/.*\d")
STATE = {str(i): np.full(2000, i) for i in range(8)}  # 16 kB each


def slow(function: Callable[..., Any], secs: float) -> Callable[..., Any]:
    """What takes its time, one call after another."""
    lock = threading.Lock()

    def wrapper(*arguments: Any, **options: Any) -> Any:
        with lock:
            time.sleep(secs)
        return function(*arguments, **options)

    return wrapper


def train(directory: Path, steps: Iterable[int]) -> None:
    """Saves at the first step, which takes more than two seconds to write."""
    session_dir.commit_part = slow(session_dir.commit_part, 0.3)
    callback = PartialCheckpointCallback(
        directory, every_n_epochs=None, every_n_train_steps=1000, progress=True
    )
    trainer = StubTrainer()
    trainer.global_step, trainer.state = 999, STATE
    callback.on_fit_start(trainer, None)
    for _ in steps:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, 0)
    callback.on_train_end(trainer, None)


def plain(directory: Path) -> None:
    print("before")  # noqa: T201
    train(directory, range(3))
    print("after")  # noqa: T201


def below_tqdm(directory: Path) -> None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # else its own thread outlives the loop
    train(directory, tqdm.tqdm(range(3), desc="training"))
    print("after")  # noqa: T201


def inside_rich(directory: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console()) as progress:
        train(directory, progress.track(range(3), description="training"))
    print("after")  # noqa: T201


def load(directory: Path) -> None:
    loading._PIECE_BYTES = 1  # noqa: SLF001 - a leaf is a piece
    read = OwnCheckpoint.read
    OwnCheckpoint.read = slow(read, 0.3)  # type: ignore[method-assign]
    callback = PartialCheckpointCallback(directory, progress=True)
    found = callback.restore()
    assert found is not None
    print("after")  # noqa: T201


def show(work: Callable[[Path], None], directory: Path) -> Terminal:
    with running_on_terminal(functools.partial(work, directory), width=90) as terminal:
        assert terminal.end() == 0, terminal.shown
    return terminal


def assert_bar_moves(screens: list[list[str]], pattern: re.Pattern[str]) -> None:
    bars = [line for lines in screens for line in lines if pattern.search(line)]
    assert len(set(bars)) > 2, screens[-1]
    assert all(sum(map(bool, map(pattern.search, lines))) <= 1 for lines in screens)


def test_alone_it_is_there_while_training_waits(tmp_path: Path) -> None:
    terminal = show(plain, tmp_path)
    screens = terminal.screens()
    assert_bar_moves(screens, WRITING)
    assert screens[-1] == ["before", "after"]
    assert terminal.shown.rfind("\x1b[?25h") > terminal.shown.rfind("\x1b[?25l")  # the cursor
    assert fp.steps(tmp_path) == [1000]


def test_below_tqdm_it_is_a_bar_of_tqdm_while_training_waits(tmp_path: Path) -> None:
    screens = show(below_tqdm, tmp_path).screens()
    assert_bar_moves(screens, WRITING)
    both = [lines for lines in screens if any(map(WRITING.search, lines))]
    assert all(lines[0].startswith("training:") for lines in both)
    assert [line.split(":")[0] for line in screens[-1]] == ["training", "after"]


def test_beside_a_display_of_rich_there_is_none(tmp_path: Path) -> None:
    screens = show(inside_rich, tmp_path).screens()
    assert not any(map(WRITING.search, itertools.chain.from_iterable(screens)))
    assert [line.split()[0] for line in screens[-1]] == ["training", "after"]
    assert fp.steps(tmp_path) == [1000]


def test_load_shows_how_far_it_is(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", STATE)
    fp.finalize(tmp_path / "1")
    screens = show(load, tmp_path).screens()
    assert_bar_moves(screens, re.compile(r"Loading a checkpoint .*/128.0 kB"))
    assert screens[-1] == ["after"]


def test_into_a_pipe_there_is_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    storage_commit = session_dir.commit_part
    try:
        train(tmp_path, range(2))
    finally:
        session_dir.commit_part = storage_commit
    assert capfd.readouterr() == ("", "")
