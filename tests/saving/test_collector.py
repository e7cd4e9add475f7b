"""Pauses of the cycle collector leave it as it was, however they overlap."""

from __future__ import annotations

import gc
import threading

import pytest

from flax_partial import collector


def test_a_pause_ends() -> None:
    assert gc.isenabled()
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


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
            leave.wait(10)

    thread = threading.Thread(target=other)
    with collector.paused():
        thread.start()
        entered.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
