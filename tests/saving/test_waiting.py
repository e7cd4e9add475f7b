"""A caller who waits for a save, and is interrupted; and callers that Python does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trees
from scripts import GATED, run, run_well

import flax_partial as fp

# The worker sends SIGINT in the middle of its first piece, and goes on once the caller has had it.
INTERRUPTED = """
    from flax_partial.sessions import registry
    from flax_partial.sessions.workers import Task
    from flax_partial.storage import direct_io, places

    interrupts = 0

    def interrupt(*_):
        global interrupts
        interrupts += 1
        if interrupts <= 1 + TWICE:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    main = threading.main_thread().ident
    direct_io._AT_ONCE_BYTES = 1 << 20
    fp.save(path, {"first": 1})
    pieces, stopped, may_go_on = [], threading.Event(), threading.Event()
    writev, stop = os.writev, Task.stop

    def write(descriptor, buffers):
        pieces.append(sum(map(len, buffers)))
        if len(pieces) == 1:
            # Again and again: one that comes just before the caller waits does not end its wait.
            while not (may_go_on if TWICE else stopped).wait(0.05):
                signal.pthread_kill(main, signal.SIGINT)
        return writev(descriptor, buffers)

    def stop_and_tell(task):
        outcome = stop(task)
        stopped.set()
        return outcome

    os.writev, Task.stop = write, stop_and_tell
    large = {"large": np.ones(8 << 20, np.uint8)}
    try:
        fp.save(path, large)
    except KeyboardInterrupt:
        may_go_on.set()  # before which the worker does not end, if it is interrupted twice
    else:
        sys.exit("it was not interrupted")
    os.writev, Task.stop = writev, stop
    if TWICE:  # it has returned at once, and its worker is undoing it
        for handle in registry.session_of(places.resolve(path)).in_flight():
            handle.exception()
    assert len(pieces) == 1, pieces
    assert pieces[0] <= direct_io._AT_ONCE_BYTES, pieces
    assert fp.status(path).leaves == ("first",)
    assert not fp.status(path).torn
    fp.save(path, large)
    fp.finalize(path)
"""


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_interrupted_save_stops_at_the_next_piece_and_is_undone(
    tmp_path: Path, *, twice: bool
) -> None:
    run_well(tmp_path / "c", INTERRUPTED.replace("TWICE", repr(twice)))
    trees.assert_same(fp.load(tmp_path / "c"), {"first": 1, "large": np.ones(8 << 20, np.uint8)})


# Each starts a thread that `threading` does not list, as XLA does for its callbacks.
STARTS = {
    "_thread": """
        import _thread
        def start(work):
            _thread.start_new_thread(work, ())
    """,
    "C": """
        import ctypes
        C = ctypes.CDLL(None)
        Work = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        kept = []
        def start(work):
            function = Work(lambda _: work())
            kept.append(function)
            identity = ctypes.c_ulong()
            assert C.pthread_create(ctypes.byref(identity), None, function, None) == 0
    """,
}
FOREIGN = """
    call, errors, ended = fp.CALL, [], threading.Semaphore(0)

    def worker(number):
        def work():
            try:
                for i in range(12):
                    saved = call(path, {f"{number}.{i}": np.full((64, 64), 100 * number + i)})
                    if call is fp.save_async:
                        saved.result()
            except BaseException as error:
                errors.append(repr(error))
            finally:
                ended.release()
        return work

    for number in range(6):
        start(worker(number))
    for _ in range(6):
        assert ended.acquire(timeout=250)
    assert not errors, errors
    fp.finalize(path)
"""


@pytest.mark.parametrize("call", ["save", "save_async"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_threads_that_python_does_not_know_save_like_others(
    tmp_path: Path, start: str, call: str
) -> None:
    run_well(tmp_path / "c", start, FOREIGN.replace("CALL", call))
    saved = {f"{n}.{i}": np.full((64, 64), 100 * n + i) for n in range(6) for i in range(12)}
    trees.assert_whole(tmp_path / "c", saved)


def test_callback_of_a_handle_that_ends_its_thread_ends_no_saving(tmp_path: Path) -> None:
    """As by `sys.exit`, in all threads that write at once; futures let that through."""
    script = """
        writers = ["0", "1"]
        all_end = threading.Barrier(len(writers))

        def end(handle):
            all_end.wait(250)
            sys.exit("of a callback")

        for name in writers:
            fp.save_async(path, {name: 1}).add_done_callback(end)
        gate.set()
        fp.save_async(path, {"last": 1}).result(250)
        fp.finalize(path)
    """
    done = run(tmp_path / "c", GATED, script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a callback of a handle failed") == 2
    assert set(fp.load(tmp_path / "c")) == {"0", "1", "last"}


# What waits for saves that are queued: for the lock that is kept for them, or for their memory.
WAITS = {
    "finalize": "fp.finalize(path)",
    "memory": "fp.save_async(path, {f'next{number}': np.zeros(1000)}, options=bounded)",
}


@pytest.mark.parametrize("wait", WAITS)
def test_callbacks_in_all_workers_may_wait_for_saves_that_no_worker_has_begun(
    tmp_path: Path, wait: str
) -> None:
    script = """
        bounded = fp.SaveOptions(max_inflight_bytes=30_000)
        all_wait, ended, errors = threading.Barrier(2), threading.Semaphore(0), []

        def follow(number):
            def wait(_):
                try:
                    all_wait.wait(250)
                    WAIT
                except fp.CheckpointExistsError:
                    pass
                except BaseException as error:
                    errors.append(repr(error))
                ended.release()

            return wait

        for number in range(2):
            handle = fp.save_async(path, {f"{number}": number}, options=bounded)
            handle.add_done_callback(follow(number))
        fp.save_async(path, {"last": np.zeros(3600)}, options=bounded)
        gate.set()
        assert ended.acquire(timeout=250)
        assert ended.acquire(timeout=250)
        assert not errors, errors
        if WAITS_FOR_MEMORY:
            fp.finalize(path)
    """
    script = script.replace("WAITS_FOR_MEMORY", repr(wait == "memory"))
    run_well(tmp_path / "c", GATED, script.replace("WAIT", WAITS[wait]))
    assert set(fp.load(tmp_path / "c")) >= {"0", "1", "last"}


def test_callback_of_a_handle_may_save_and_finalize(tmp_path: Path) -> None:
    """It is called by a worker, which must not wait for itself."""
    script = """
        ended, errors = threading.Event(), []

        def follow(handle):
            try:
                fp.save(path, {"second": 2})
                fp.finalize(path)
            except BaseException as error:
                errors.append(repr(error))
            ended.set()

        fp.save_async(path, {"first": np.arange(5)}).add_done_callback(follow)
        assert ended.wait(250)
        assert not errors, errors
    """
    run_well(tmp_path / "c", script)
    assert set(fp.load(tmp_path / "c")) == {"first", "second"}
