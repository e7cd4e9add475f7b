"""A worker does every job, in order, also while the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from flax_partial.callbacks._background import Worker

if TYPE_CHECKING:
    import pytest


def test_jobs_are_done_in_order_and_one_that_raises_stops_none() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    done: list[int] = []
    worker = Worker("flax_partial_test")
    jobs = [worker.submit(lambda at=at: done.append(at)) for at in range(100)]  # type: ignore[misc]
    jobs += [worker.submit(fail), worker.submit(lambda: done.append(100))]
    worker.finish()
    assert done == list(range(101))
    assert all(job.done() for job in jobs)


def test_job_is_done_by_the_caller_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[threading.Thread] = []
    assert (
        Worker("flax_partial_test").submit(lambda: done.append(threading.current_thread())).done()
    )
    assert done == [threading.current_thread()]


AT_EXIT = """
import atexit
from flax_partial.callbacks._background import Worker

worker = Worker("flax_partial_test")
atexit.register(worker.finish)
atexit.register(worker.submit, lambda: print("done"))
"""


def test_job_of_an_interpreter_that_ends_is_done() -> None:
    said = subprocess.check_output([sys.executable, "-P", "-c", AT_EXIT], text=True, timeout=500)
    assert said == "done\n"
