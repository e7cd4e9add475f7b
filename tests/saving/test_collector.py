"""Pauses of the cycle collector leave it as it was, however they overlap."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from things import MOST_SECS

import flax_partial as fp
from flax_partial import collector


def test_a_pause_ends_one_that_an_interrupt_has_left_without_an_end() -> None:
    left = collector.paused()
    left.__enter__()
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    left.__exit__(None, None, None)
    assert gc.isenabled()


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_error_ends_a_pause() -> None:
    with pytest.raises(ValueError, match="x"), collector.paused():
        raise ValueError("x")
    assert gc.isenabled()


def test_overlapping_pauses_of_threads_end_with_the_last() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collector.paused():
            entered.set()
            assert leave.wait(MOST_SECS)

    with ThreadPoolExecutor(1) as thread:
        with collector.paused():
            paused = thread.submit(other)
            assert entered.wait(MOST_SECS)
        assert not gc.isenabled()
        leave.set()
        paused.result()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "is_paused"),
    [
        pytest.param(fp.SaveOptions(durable=False), True, id="by default"),
        pytest.param(
            fp.SaveOptions(durable=False, max_inflight_bytes=1 << 30),
            False,
            id="not where it may wait",
        ),
    ],
)
def test_no_collection_is_started_while_a_save_is_handed_over(
    tmp_path: Path, options: fp.SaveOptions, *, is_paused: bool
) -> None:
    state = {f"{number}": np.ones(2) for number in range(1000)}
    started: list[str] = []
    usual = gc.get_threshold()
    gc.callbacks.append(lambda phase, _: started.append(phase))
    gc.set_threshold(20)
    try:
        handle = fp.save_async(tmp_path / "c", state, options=options)
        seen = len(started)
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.pop()
    handle.result(MOST_SECS)
    assert (seen < 40) == is_paused
