"""Pauses of the cycle collector leave it as it was, however they overlap."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from things import MOST_SECS

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
