"""Saves in the background, and several calls at once: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import MOST_SECS, QUICK, X, listing, stored, unchanged, until

import flax_partial as fp
from flax_partial.saving import job
from flax_partial.sessions import registry
from flax_partial.storage import files, locks, parts, places, session_dir
from flax_partial.storage.paths import CheckpointPath


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What some threads return that begin their work at the same moment."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


# --- in the background ------------------------------------------------------------------------


def test_handle_is_a_future(path: Path) -> None:
    seen: list[Any] = []
    handle = fp.save_async(path, {"a": X})
    handle.add_done_callback(seen.append)
    report = handle.result(timeout=MOST_SECS)
    assert handle.done()
    assert handle.exception() is None
    assert handle.result() is report
    assert not handle.cancel()
    assert report.leaves == 1
    handle.add_done_callback(seen.append)
    assert seen == [handle, handle]
    assert fp.finalize_async(path).result(MOST_SECS) == fp.metadata(path)
    again = fp.finalize_async(path)
    assert isinstance(again.exception(MOST_SECS), fp.CheckpointExistsError)


def test_any_number_of_saves_are_in_flight_at_once_from_any_threads(tmp_path: Path) -> None:
    def value(thread: int, index: int) -> np.ndarray:
        return np.full(500, 1000 * thread + index)

    def save_all(thread: int) -> None:
        for index in range(25):
            call = fp.save_async if index % 5 else fp.save
            state = {f"t{thread}": {f"{index}": value(thread, index)}}
            call(tmp_path / f"c{index % 3}", state, options=QUICK)

    at_once(8, save_all)
    for number in range(3):
        trees.assert_whole(
            fp.finalize(tmp_path / f"c{number}").path,
            {f"t{t}": {f"{i}": value(t, i) for i in range(number, 25, 3)} for t in range(8)},
        )


def test_of_saves_of_one_key_at_once_exactly_one_is_taken(path: Path) -> None:
    def state(value: int) -> dict[str, Any]:
        return {"a": np.full(1000, value), f"own{value}": 1}

    outcomes = at_once(8, lambda value: outcome(fp.save, path, state(value)))
    assert sorted(outcomes) == ["KeyConflictError"] * 7 + ["done"]
    trees.assert_whole(fp.finalize(path).path, state(outcomes.index("done")))


def test_replacements_at_once_leave_one_whole_value(path: Path) -> None:
    def save(value: int) -> None:
        state = {"a": np.full(100_000, value), "b": np.full(3, value)}
        fp.save(path, state, replace=True, options=QUICK)

    at_once(6, save)
    fp.finalize(path)
    loaded = fp.load(path)
    assert len({int(value) for value in (*loaded["a"], *loaded["b"])}) == 1
    assert fp.verify(path).ok


def test_handles_that_nobody_waits_for_leave_no_thread(path: Path) -> None:
    before = threading.active_count()
    most = 0
    for index in range(50):
        fp.save_async(path, {f"leaf{index}": np.full(1000, index)}, options=QUICK)
        most = max(most, threading.active_count() - before)
    fp.finalize(path)
    until(lambda: threading.active_count() <= before)
    assert most <= 8
    assert len(fp.load(path)) == 50


def test_snapshots_are_let_go_of_once_they_are_written(path: Path) -> None:
    class Watched(np.ndarray):
        pass

    array = np.arange(1000).view(Watched)
    watch = weakref.ref(array)
    handle = fp.save_async(path, {"a": array})
    handle.result()
    del array
    gc.collect()
    assert watch() is None


# --- what fails -------------------------------------------------------------------------------


@pytest.fixture
def broken(path: Path) -> Path:
    """A session that some tests keep from being written to."""
    fp.save(path, {"first": X})
    return path


def break_session(path: Path) -> None:
    """Makes every later part fail, for root too: its directory takes no files."""
    (path.parent / "c.partial_save" / "state").rename(path.parent / "kept state")
    (path.parent / "c.partial_save" / "state").write_text("no directory")


def mend_session(path: Path) -> None:
    (path.parent / "c.partial_save" / "state").unlink()
    (path.parent / "kept state").rename(path.parent / "c.partial_save" / "state")


NEXT_CALLS: dict[str, Callable[[Path], Any]] = {
    "save": lambda path: fp.save(path, {"next": X}),
    "save_async": lambda path: fp.save_async(path, {"next": X}),
    "finalize": fp.finalize,
    "finalize_async": lambda path: fp.finalize_async(path).result(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_error_of_a_save_that_nobody_waits_for_is_raised_by_the_next_call_once(
    broken: Path, call: str
) -> None:
    break_session(broken)
    wait([fp.save_async(broken, {"lost": X})])
    mend_session(broken)
    fp.save(broken.parent / "unrelated", {"a": X})  # only calls on that path
    with pytest.raises(OSError, match=r"c\.partial_save"):
        NEXT_CALLS[call](broken)
    assert fp.status(broken).leaves == ("first",)
    stored(broken, {"lost": X})  # the key is free again
    assert set(fp.load(broken)) == {"first", "lost"}


def test_error_that_was_asked_for_is_not_raised_again(broken: Path) -> None:
    break_session(broken)
    with pytest.raises(OSError, match=r"c\.partial_save"):
        fp.save_async(broken, {"lost": X}).result()
    assert isinstance(fp.save_async(broken, {"lost": X}).exception(), OSError)
    mend_session(broken)
    fp.finalize(broken)
    assert set(fp.load(broken)) == {"first"}


def no_space_left(directory: Path, *_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device", str(directory))


def test_errors_of_several_saves_are_all_told(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_are_called = threading.Event()  # else a call would raise the error of one before

    def fail_late(directory: Path, *_: Any, **__: Any) -> None:
        assert all_are_called.wait(MOST_SECS)
        no_space_left(directory)

    monkeypatch.setattr(session_dir, "commit_part", fail_late)
    handles = [fp.save_async(broken, {f"lost{index}": X}) for index in range(3)]
    all_are_called.set()
    wait(handles)
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left") as caught:
        fp.finalize(broken)
    assert sum("No space left" in note for note in caught.value.__notes__) == 2
    fp.finalize(broken)


def test_finalize_never_passes_a_save_that_fails_while_it_waits(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save's error is known to the waiting finalize before the save's own callbacks ran."""
    waiting, told = threading.Event(), threading.Event()
    were_told: list[bool] = []
    in_flight = registry.Session.in_flight

    def fail_late(directory: Path, *_: Any, **__: Any) -> None:
        assert waiting.wait(MOST_SECS)
        no_space_left(directory)

    def note_and_look(session: registry.Session) -> list[Any]:
        found = list[Any](in_flight(session))
        waiting.set()
        return found

    monkeypatch.setattr(session_dir, "commit_part", fail_late)
    monkeypatch.setattr(registry.Session, "in_flight", note_and_look)
    handle = fp.save_async(broken, {"lost": X})
    callbacks = handle._done_callbacks  # noqa: SLF001 - none may come before this one
    callbacks.insert(0, lambda _: were_told.append(told.wait(MOST_SECS)))
    with pytest.raises(OSError, match="No space left"):
        fp.finalize(broken)
    told.set()
    until(lambda: were_told)
    assert were_told == [True]
    fp.finalize(broken)
    assert set(fp.load(broken)) == {"first"}


def test_save_that_fails_leaves_the_session_as_it_was(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(directory: Path, table: bytes, **_: Any) -> None:
        (directory / "part.json.tmp").write_bytes(table)
        no_space_left(directory)

    monkeypatch.setattr(session_dir, "commit_part", failing)
    with unchanged(broken.parent), pytest.raises(OSError, match="No space left"):
        fp.save(broken, {"lost": np.arange(100_000)}, custom_metadata={"lost": True})
    monkeypatch.undo()
    stored(broken, {"lost": X})
    trees.assert_whole(broken, {"first": X, "lost": X})


def test_session_that_another_thread_enters_meanwhile_keeps_its_errors(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves into other sessions tidy up what this process knows of sessions that are gone."""
    real = session_dir.lock_for_saving

    def lock(where: CheckpointPath, known: locks.DirectoryLock | None) -> locks.DirectoryLock:
        def save_another() -> None:
            if where.final.name == "c":
                fp.save(path.with_name(f"other{len(list(path.parent.iterdir()))}"), {"a": X})

        save_another()
        held = real(where, known)
        save_another()
        return held

    monkeypatch.setattr(session_dir, "lock_for_saving", lock)
    handle = fp.save_async(path, {"a": X})
    with pytest.raises(fp.KeyConflictError):
        fp.save(path, {"a": X})
    handle.result()
    fp.finalize(path)


def test_error_is_told_though_others_save_just_as_it_is_raised(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They forget what this process knows of sessions that are gone and have no error to tell."""
    release = registry.Session.release

    def release_and_save_another(session: registry.Session, save: object) -> None:
        release(session, save)
        if session.where.final == path:
            registry.session_of(places.resolve(path.with_name("another")))

    path = broken.with_name("new")
    monkeypatch.setattr(session_dir, "prepare_session", no_space_left)
    monkeypatch.setattr(registry.Session, "release", release_and_save_another)
    wait([fp.save_async(path, {"lost": X})])
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        fp.finalize(path)


def test_session_that_never_came_to_be_is_forgotten_once_its_error_was_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_dir, "lock_for_saving", no_space_left)
    assert fp.save_async(path, {"a": X}).exception()
    monkeypatch.undo()
    stored(path.with_name("other"), {"a": X})
    assert path not in registry._sessions  # noqa: SLF001


def test_error_of_a_save_keeps_nothing_of_what_was_to_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_dir, "commit_part", no_space_left)
    array = jnp.zeros(1 << 18)  # so large that it is viewed, not copied
    watch = weakref.ref(array)
    error = fp.save_async(path, {"a": array}).exception()
    del array
    gc.collect()
    assert watch() is None
    assert isinstance(error, OSError)


def test_error_of_a_save_keeps_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it where what is in the session cannot be read."""
    monkeypatch.setattr(parts, "read_parts", no_space_left)
    error = fp.save_async(path, {"a": X}).exception()
    monkeypatch.undo()
    assert isinstance(error, OSError)
    fp.abort(path)  # else it would wait for as long as the error is kept
    assert not listing(path.parent)


def test_save_that_comes_too_late_leaves_no_session(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finalizes, and renames the session, just as this one looks for it."""
    real = session_dir.create_session  # no caller can time this

    def create(where: CheckpointPath) -> bool:
        is_new = real(where)
        where.final.mkdir()
        return is_new

    monkeypatch.setattr(session_dir, "create_session", create)
    with pytest.raises(fp.CheckpointExistsError):
        fp.save(path, {"a": X})
    assert listing(path.parent) == ["c "]


# --- what the caller may do once save_async has returned -----------------------------------------

SIZES = {"small": 100, "large": 1 << 19}


@pytest.mark.parametrize("size", SIZES)
def test_numpy_array_may_be_overwritten(path: Path, size: str) -> None:
    arrays = [np.full(SIZES[size], index) for index in range(8)]
    for index, array in enumerate(arrays):
        fp.save_async(path, {f"{index}": array, f"view{index}": array[::2]})
        array[:] = -1
    fp.finalize(path)
    loaded = fp.load(path)
    for index in range(8):
        assert (loaded[f"{index}"] == index).all()
        assert (loaded[f"view{index}"] == index).all()


@jax.jit
def slow_sum(x: jax.Array) -> jax.Array:
    """Some tenths of a second of work that ends in x + 200."""

    def step(_: Any, x: jax.Array) -> jax.Array:
        return x + (1 + 0 * jnp.sin(jnp.sum(x)))

    return jax.lax.fori_loop(0, 200, step, x)


double = jax.jit(lambda x: x * 2, donate_argnums=0)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one device", "sharded"])
@pytest.mark.parametrize("is_ready", [False, True], ids=["computing", "ready"])
@pytest.mark.parametrize("size", SIZES)
def test_array_may_be_donated_or_deleted(
    path: Path, size: str, *, is_ready: bool, is_sharded: bool
) -> None:
    where = (
        jax.sharding.NamedSharding(trees.mesh("x"), jax.P("x")) if is_sharded else jax.devices()[1]
    )
    start = jax.device_put(np.zeros(SIZES[size] // 8 * 8, np.float32), where)
    donated, deleted, overtaken = slow_sum(start), slow_sum(start + 1), slow_sum(start + 2)
    if is_ready:
        jax.block_until_ready((donated, deleted, overtaken))
    state = {"donated": donated, "deleted": deleted, "overtaken": overtaken}
    handle = fp.save_async(path, state)
    donated = double(donated)
    deleted.delete()
    for _ in range(5):
        overtaken = double(overtaken)
    junk = [np.full(start.shape, 7, np.float32) for _ in range(4)]
    report = handle.result()
    fp.finalize(path)
    loaded = fp.load(path)
    for name, value in (("donated", 200), ("deleted", 201), ("overtaken", 202)):
        assert (np.asarray(loaded[name]) == value).all(), name
    assert (np.asarray(donated) == 400).all()
    assert (np.asarray(overtaken) == 202 * 32).all()
    assert report.bytes == 3 * start.nbytes
    del junk


def test_prng_key_may_be_deleted(path: Path) -> None:
    keys = jax.random.split(jax.random.key(3), 20_000)
    want = np.asarray(jax.random.key_data(keys)).copy()
    fp.save_async(path, {"k": keys})
    keys.delete()
    fp.finalize(path)
    assert (np.asarray(jax.random.key_data(fp.load(path)["k"])) == want).all()


def test_save_async_does_not_wait_for_the_computation(path: Path) -> None:
    warm = path.with_name("warm")
    fp.save(warm, {"w": slow_sum(jnp.zeros(1 << 16))})
    fp.save_async(warm, {"v": slow_sum(jnp.zeros(1 << 16))}).result()
    for size in (1 << 21, 1 << 23, 1 << 24):  # a machine with other work may need more of it
        computing = slow_sum(jnp.zeros(size))
        handle = fp.save_async(path, {"w": computing}, replace=True)
        was_ready = computing.is_ready()
        handle.result()
        if not was_ready:
            break
    assert not was_ready
    fp.finalize(path)
    assert (np.asarray(fp.load(path)["w"]) == 200).all()


# --- the memory budget ----------------------------------------------------------------------------

BOUNDED = fp.SaveOptions(max_inflight_bytes=10_000)


def save_bounded(path: Path, name: str, size: int) -> fp.SaveHandle:
    return fp.save_async(path, {name: np.zeros(size, np.int8)}, options=BOUNDED)


def test_memory_budget_makes_save_async_wait_and_says_how_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, commit = threading.Event(), session_dir.commit_part

    def commit_at_gate(directory: Path, table: bytes, **options: Any) -> None:
        assert gate.wait(MOST_SECS)
        commit(directory, table, **options)

    monkeypatch.setattr(session_dir, "commit_part", commit_at_gate)
    save_bounded(path, "first", 6000)
    save_bounded(path, "small", 3000)  # there is room for it, so that it does not wait either
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(save_bounded, path, "second", 6000)
        until(lambda: job._budget._waiting)  # noqa: SLF001
        seen = time.perf_counter()
        assert not call.done()
        opened = time.perf_counter()
        gate.set()
        report = call.result(MOST_SECS).result(MOST_SECS)
    assert opened - seen < report.budget_secs <= report.blocked_secs
    save_bounded(path, "alone", 50_000)  # larger than the budget: written all the same
    fp.finalize(path)
    assert set(fp.load(path)) == {"first", "small", "second", "alone"}


def test_budget_is_given_back_by_a_save_that_fails(broken: Path) -> None:
    """Or the next one would wait for ever."""
    break_session(broken)
    for index in range(5):
        handle = save_bounded(broken, f"{index}", 9000)
        assert isinstance(handle.exception(MOST_SECS), OSError)
    mend_session(broken)
    save_bounded(broken, "a", 9000).result(MOST_SECS)
    with pytest.raises(fp.KeyConflictError):
        save_bounded(broken, "a", 9000)
    save_bounded(broken, "b", 9000).result(MOST_SECS)


# --- several at once ------------------------------------------------------------------------------


def outcome(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except fp.PartialCheckpointError as error:
        return type(error).__name__
    return "done"


def test_of_finalizes_at_once_in_threads_one_commits(tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"c{attempt}"
        fp.save(path, {"a": X, "b": np.arange(50_000)}, options=QUICK)
        outcomes = at_once(4, lambda _, path=path: outcome(fp.finalize, path))
        assert sorted(outcomes) == ["CheckpointExistsError"] * 3 + ["done"]
        assert fp.verify(path).ok
    assert len(list(tmp_path.iterdir())) == 10  # and no session is left


def test_abort_holds_no_lock_for_a_queued_save_that_it_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another caller is about to claim: no other call would give the lock back."""
    gates = {"c": threading.Event(), "busy": threading.Event()}
    at_gate, commit = threading.Semaphore(0), session_dir.commit_part

    def commit_at_gate(directory: Path, table: bytes, **options: Any) -> None:
        at_gate.release()
        assert gates["busy" if "busy" in str(directory) else "c"].wait(MOST_SECS)
        commit(directory, table, **options)

    monkeypatch.setattr(session_dir, "commit_part", commit_at_gate)
    for one in (path.with_name("busy"), path):  # both workers
        fp.save_async(one, {"a": X})
    assert all(at_gate.acquire(timeout=MOST_SECS) for _ in gates)
    queued = fp.save_async(path, {"b": X})
    about_to_claim = threading.Event()  # in the place of a save
    session = registry.begin_save(places.resolve(path), about_to_claim)
    with ThreadPoolExecutor(1) as pool:
        aborted = pool.submit(fp.abort, path)
        until(lambda: session.is_aborted)
        gates["c"].set()
        aborted.result(MOST_SECS)
    session.release(about_to_claim)
    assert isinstance(queued.exception(MOST_SECS), fp.NoSessionError)
    gates["busy"].set()
    fp.finalize(path.with_name("busy"))
    assert not path.with_name("c.partial_save").exists()


def test_abort_beside_a_save_in_flight_one_of_them_says_so(tmp_path: Path) -> None:
    for attempt in range(21):
        path = tmp_path / f"c{attempt}"
        fp.save(path, {"first": X}, options=QUICK)
        handles = [
            fp.save_async(path, {f"{index}": np.arange(20_000)}, options=QUICK)
            for index in range(6)
        ]
        wait(handles[: attempt % 7])
        fp.abort(path)
        for handle in handles:
            error = handle.exception()
            assert error is None or isinstance(error, fp.NoSessionError)
    assert not listing(tmp_path)  # no session, and no remains of one
    stored(path, {"first": X + 1})
    trees.assert_whole(path, {"first": X + 1})


def test_directory_is_open_until_its_lock_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalize of another thread forgets the session as the worker gives the lock back."""
    fp.save(tmp_path / "c", {"first": 1})
    session = registry.session_of(places.resolve(tmp_path / "c"))
    release = locks.DirectoryLock.release
    were_open = []

    def forget_and_release(lock: locks.DirectoryLock) -> None:
        if lock.identity == files.identity(session.where.session):
            monkeypatch.undo()
            session.close()
            were_open.append(lock.descriptor >= 0)
        release(lock)

    monkeypatch.setattr(locks.DirectoryLock, "release", forget_and_release)
    fp.save(tmp_path / "c", {"second": 1})
    assert were_open == [True]
