"""Saves in the background, and several calls at once: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import QUICK, X, listing

import flax_partial as fp
from flax_partial.storage import local as storage

if TYPE_CHECKING:
    from pathlib import Path

# --- in the background ------------------------------------------------------------------------


def test_handle_is_a_future(tmp_path: Path) -> None:
    seen: list[Any] = []
    handle = fp.save_async(tmp_path / "c", {"a": X})
    handle.add_done_callback(seen.append)
    report = handle.result(timeout=60)
    assert handle.done()
    assert handle.exception() is None
    assert handle.result() is report
    assert not handle.cancel()
    assert report.leaves == 1
    handle.add_done_callback(seen.append)
    assert seen == [handle, handle]
    done = fp.finalize_async(tmp_path / "c")
    assert done.result(60) == fp.metadata(tmp_path / "c")
    again = fp.finalize_async(tmp_path / "c")
    assert isinstance(again.exception(60), fp.CheckpointExistsError)


def test_any_number_of_saves_are_in_flight_at_once_from_any_threads(tmp_path: Path) -> None:
    def save_all(thread: int) -> None:
        for index in range(25):
            path = tmp_path / f"c{index % 3}"
            state = {f"t{thread}": {f"{index}": np.full(500, 1000 * thread + index)}}
            if index % 5:
                fp.save_async(path, state, options=QUICK)
            else:
                fp.save(path, state, options=QUICK)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save_all, range(8)))
    for number in range(3):
        fp.finalize(tmp_path / f"c{number}")
        expected = {
            f"t{thread}": {
                f"{index}": np.full(500, 1000 * thread + index)
                for index in range(25)
                if index % 3 == number
            }
            for thread in range(8)
        }
        trees.assert_same(fp.load(tmp_path / f"c{number}"), expected)


def test_of_saves_of_one_key_at_once_exactly_one_is_taken(tmp_path: Path) -> None:
    def save(value: int) -> int | None:
        barrier.wait()
        try:
            fp.save(tmp_path / "c", {"a": np.full(1000, value), f"own{value}": 1}, options=QUICK)
        except fp.KeyConflictError:
            return None
        return value

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        taken = [value for value in pool.map(save, range(8)) if value is not None]
    assert len(taken) == 1
    fp.finalize(tmp_path / "c")
    expected = {"a": np.full(1000, taken[0]), f"own{taken[0]}": 1}
    trees.assert_same(fp.load(tmp_path / "c"), expected)


def test_replacements_at_once_leave_one_whole_value(tmp_path: Path) -> None:
    def save(value: int) -> None:
        barrier.wait()
        state = {"a": np.full(100_000, value), "b": np.full(3, value)}
        fp.save(tmp_path / "c", state, replace=True, options=QUICK)

    barrier = threading.Barrier(6)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(save, range(6)))
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c")
    assert len({int(value) for value in (*loaded["a"], *loaded["b"])}) == 1
    assert fp.verify(tmp_path / "c").ok


def test_handles_that_nobody_waits_for_leave_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    most = 0
    for index in range(50):
        fp.save_async(tmp_path / "c", {f"leaf{index}": np.full(1000, index)}, options=QUICK)
        most = max(most, threading.active_count() - before)
    fp.finalize(tmp_path / "c")
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert most <= 8
    assert len(fp.load(tmp_path / "c")) == 50


def test_snapshots_are_let_go_of_once_they_are_written(tmp_path: Path) -> None:
    class Watched(np.ndarray):
        pass

    array = np.arange(1000).view(Watched)
    watch = weakref.ref(array)
    handle = fp.save_async(tmp_path / "c", {"a": array})
    handle.result()
    del array
    gc.collect()
    assert watch() is None


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A session whose parts cannot be written: a directory that is there and takes no files."""
    path = tmp_path / "c"
    fp.save(path, {"first": X})
    return path


def break_session(path: Path) -> None:
    """Makes every later part fail, for root too."""
    (path.parent / "c.partial_save" / "state").rename(path.parent / "kept state")
    (path.parent / "c.partial_save" / "state").write_text("no directory")


def mend_session(path: Path) -> None:
    (path.parent / "c.partial_save" / "state").unlink()
    (path.parent / "kept state").rename(path.parent / "c.partial_save" / "state")


def wait_until_done(*handles: fp.SaveHandle) -> None:
    end = time.monotonic() + 60
    while not all(handle.done() for handle in handles) and time.monotonic() < end:
        time.sleep(0.005)


NEXT_CALLS = {
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
    handle = fp.save_async(broken, {"lost": X})
    wait_until_done(handle)
    mend_session(broken)
    fp.save(broken.parent / "unrelated", {"a": X})  # only calls on that path
    with pytest.raises(OSError, match=r"c\.partial_save"):
        NEXT_CALLS[call](broken)
    assert fp.status(broken).leaves == ("first",)
    fp.save(broken, {"lost": X})  # the key is free again
    fp.finalize(broken)
    assert set(fp.load(broken)) == {"first", "lost"}


def test_error_that_was_asked_for_is_not_raised_again(broken: Path) -> None:
    break_session(broken)
    by_result = fp.save_async(broken, {"lost": X})
    with pytest.raises(OSError, match=r"c\.partial_save"):
        by_result.result()
    by_exception = fp.save_async(broken, {"lost": X})
    assert isinstance(by_exception.exception(), OSError)
    mend_session(broken)
    fp.finalize(broken)
    assert set(fp.load(broken)) == {"first"}


def test_errors_of_several_saves_are_all_told(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "commit_part", no_space_left)
    wait_until_done(*[fp.save_async(broken, {f"lost{index}": X}) for index in range(3)])
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left") as caught:
        fp.finalize(broken)
    assert sum("No space left" in note for note in caught.value.__notes__) == 2
    fp.finalize(broken)


def no_space_left(directory: Path, *_: Any, **__: Any) -> None:
    time.sleep(0.2)
    raise OSError(28, "No space left on device", str(directory))


def test_finalize_never_passes_a_save_that_fails_while_it_waits(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save's error is known to the waiting finalize before the save's own callbacks ran."""
    monkeypatch.setattr(storage, "commit_part", no_space_left)
    for index in range(5):
        handle = fp.save_async(broken, {f"lost{index}": X})
        handle._done_callbacks.insert(0, lambda _: time.sleep(0.05))  # noqa: SLF001 - a late thread
        with pytest.raises(OSError, match="No space left"):
            fp.finalize(broken)
    monkeypatch.undo()
    fp.finalize(broken)
    assert set(fp.load(broken)) == {"first"}


def test_save_that_fails_leaves_the_session_as_it_was(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(broken.parent)
    real = storage.commit_part

    def failing(directory: Path, table: bytes, **_: Any) -> None:
        (directory / "part.json.tmp").write_bytes(table)
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(storage, "commit_part", failing)
    with pytest.raises(OSError, match="No space left"):
        fp.save(broken, {"lost": np.arange(100_000)}, custom_metadata={"lost": True})
    monkeypatch.setattr(storage, "commit_part", real)
    assert listing(broken.parent) == before
    fp.save(broken, {"lost": X})
    fp.finalize(broken)
    trees.assert_same(fp.load(broken), {"first": X, "lost": X})


def test_session_that_another_thread_enters_meanwhile_keeps_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves into other sessions tidy up what this process knows of sessions that are gone."""
    real = storage.lock_for_saving

    def lock(
        where: storage.CheckpointPath, known: storage.DirectoryLock | None
    ) -> storage.DirectoryLock:
        if where.final.name == "c":
            fp.save(tmp_path / f"other{len(list(tmp_path.iterdir()))}", {"a": X})
        held = real(where, known)
        if where.final.name == "c":
            fp.save(tmp_path / f"other{len(list(tmp_path.iterdir()))}", {"a": X})
        return held

    monkeypatch.setattr(storage, "lock_for_saving", lock)
    handle = fp.save_async(tmp_path / "c", {"a": X})
    with pytest.raises(fp.KeyConflictError):
        fp.save(tmp_path / "c", {"a": X})
    handle.result()
    fp.finalize(tmp_path / "c")


# --- what the caller may do once save_async has returned -----------------------------------------

SIZES = {"small": 100, "large": 1 << 19}


def kept(tmp_path: Path, name: str = "w") -> np.ndarray:
    fp.finalize(tmp_path / "c")
    return np.asarray(fp.load(tmp_path / "c")[name])


@pytest.mark.parametrize("size", SIZES)
def test_numpy_array_may_be_overwritten(tmp_path: Path, size: str) -> None:
    arrays = [np.full(SIZES[size], index) for index in range(8)]
    for index, array in enumerate(arrays):
        fp.save_async(tmp_path / "c", {f"{index}": array, f"view{index}": array[::2]})
        array[:] = -1
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c")
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
    tmp_path: Path, size: str, *, is_ready: bool, is_sharded: bool
) -> None:
    where = (
        jax.sharding.NamedSharding(trees.mesh("x"), jax.P("x")) if is_sharded else jax.devices()[1]
    )
    start = jax.device_put(np.zeros(SIZES[size] // 8 * 8, np.float32), where)
    donated, deleted, overtaken = slow_sum(start), slow_sum(start + 1), slow_sum(start + 2)
    if is_ready:
        jax.block_until_ready((donated, deleted, overtaken))
    state = {"donated": donated, "deleted": deleted, "overtaken": overtaken}
    handle = fp.save_async(tmp_path / "c", state)
    donated = double(donated)
    deleted.delete()
    for _ in range(5):
        overtaken = double(overtaken)
    junk = [np.full(start.shape, 7, np.float32) for _ in range(4)]
    report = handle.result()
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c")
    for name, value in (("donated", 200), ("deleted", 201), ("overtaken", 202)):
        assert (np.asarray(loaded[name]) == value).all(), name
    assert (np.asarray(donated) == 400).all()
    assert (np.asarray(overtaken) == 202 * 32).all()
    assert report.bytes == 3 * start.nbytes
    del junk


def test_prng_key_may_be_deleted(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(3), 20_000)
    want = np.asarray(jax.random.key_data(keys)).copy()
    handle = fp.save_async(tmp_path / "c", {"k": keys})
    keys.delete()
    handle.result()
    fp.finalize(tmp_path / "c")
    assert (np.asarray(jax.random.key_data(fp.load(tmp_path / "c")["k"])) == want).all()


def test_save_async_does_not_wait_for_the_computation(tmp_path: Path) -> None:
    fp.save(tmp_path / "warm", {"w": slow_sum(jnp.zeros(1 << 16))})
    fp.save_async(tmp_path / "warm", {"v": slow_sum(jnp.zeros(1 << 16))}).result()
    for size in (1 << 21, 1 << 23, 1 << 24):  # a machine with other work may need more of it
        computing = slow_sum(jnp.zeros(size))
        handle = fp.save_async(tmp_path / "c", {"w": computing}, replace=True)
        was_ready = computing.is_ready()
        report = handle.result()
        if not was_ready:
            break
    assert not was_ready
    assert report.blocked_secs < report.write_secs
    assert (kept(tmp_path) == 200).all()


def test_memory_budget_makes_save_async_wait_and_says_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.commit_part
    writing = [0]

    def slow(directory: Path, table: bytes, **options: Any) -> None:
        writing.append(writing[-1] + 1)
        time.sleep(0.2)
        writing.append(writing[-1] - 1)
        real(directory, table, **options)

    monkeypatch.setattr(storage, "commit_part", slow)
    options = fp.SaveOptions(max_inflight_bytes=10_000)
    handles = [
        fp.save_async(tmp_path / "c", {f"{index}": np.zeros(6000, np.int8)}, options=options)
        for index in range(4)
    ]
    small = fp.save_async(tmp_path / "c", {"small": np.zeros(3000, np.int8)}, options=options)
    reports = [handle.result() for handle in handles]
    assert reports[0].budget_secs < 0.1
    for report in reports[1:]:
        assert 0.1 < report.budget_secs <= report.blocked_secs
    assert small.result().budget_secs < 0.1
    assert max(writing) <= 2  # a large one, and the small one beside it
    alone = {"large": np.zeros(50_000, np.int8)}  # larger than the budget: written all the same
    assert fp.save_async(tmp_path / "c", alone, options=options).result().budget_secs < 0.1
    fp.finalize(tmp_path / "c")
    assert len(fp.load(tmp_path / "c")) == 6


def test_budget_is_given_back_by_a_save_that_fails(broken: Path) -> None:
    options = fp.SaveOptions(max_inflight_bytes=10_000)
    break_session(broken)
    for index in range(5):
        handle = fp.save_async(broken, {f"{index}": np.zeros(9000, np.int8)}, options=options)
        assert isinstance(handle.exception(60), OSError)
    mend_session(broken)
    handle = fp.save_async(broken, {"a": np.zeros(9000, np.int8)}, options=options)
    assert handle.result(60).budget_secs < 0.1
    with pytest.raises(fp.KeyConflictError):
        fp.save_async(broken, {"a": np.zeros(9000, np.int8)}, options=options)
    handle = fp.save_async(broken, {"b": np.zeros(9000, np.int8)}, options=options)
    assert handle.result(60).budget_secs < 0.1


# --- several at once ------------------------------------------------------------------------------


def outcome(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except fp.PartialCheckpointError as error:
        return type(error).__name__
    return "done"


def test_of_finalizes_at_once_in_threads_one_commits(tmp_path: Path) -> None:
    def race(_: int) -> str:
        barrier.wait()
        return outcome(fp.finalize, path)

    for attempt in range(10):
        path = tmp_path / f"c{attempt}"
        fp.save(path, {"a": X, "b": np.arange(50_000)}, options=QUICK)
        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            outcomes = sorted(pool.map(race, range(4)))
        assert outcomes == ["CheckpointExistsError"] * 3 + ["done"]
        assert fp.verify(path).ok
    assert len(list(tmp_path.iterdir())) == 10  # and no session is left


def test_abort_beside_a_save_in_flight_one_of_them_says_so(tmp_path: Path) -> None:
    for attempt in range(20):
        path = tmp_path / f"c{attempt}"
        fp.save(path, {"first": X}, options=QUICK)
        handles = [
            fp.save_async(path, {f"{index}": np.arange(20_000)}, options=QUICK)
            for index in range(6)
        ]
        time.sleep(attempt / 2000)
        fp.abort(path)
        for handle in handles:
            error = handle.exception()
            assert error is None or isinstance(error, fp.NoSessionError)
    assert not listing(tmp_path)  # no session, and no remains of one
    fp.save(path, {"first": X + 1})
    fp.finalize(path)
    trees.assert_same(fp.load(path), {"first": X + 1})


def test_saves_finalizes_and_aborts_at_once_never_make_half_a_checkpoint(tmp_path: Path) -> None:
    """Whatever is finalized holds whole saves of one session, and only those that succeeded."""
    path = tmp_path / "c"

    def save(index: int) -> str:
        barrier.wait()
        time.sleep(index / 1000)
        state = {f"{index}": {"w": np.full(2000, index), "v": index}}
        return outcome(lambda: fp.save(path, state, options=QUICK))

    def end(call: Any) -> str:
        barrier.wait()
        time.sleep(0.004)
        return outcome(call, path)

    for attempt in range(10):
        barrier = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            saves = [pool.submit(save, index) for index in range(6)]
            ends = [pool.submit(end, call) for call in (fp.finalize, fp.abort)]
            saved = {f"{i}" for i, future in enumerate(saves) if future.result() == "done"}
            ended = [future.result() for future in ends]
        if path.exists():
            loaded = fp.load(path)
            assert set(loaded) <= saved
            for name, leaf in loaded.items():
                trees.assert_same(leaf, {"w": np.full(2000, int(name)), "v": int(name)})
            path.rename(tmp_path / f"done{attempt}")
        assert ended.count("done") <= 2
        if (tmp_path / "c.partial_save").exists():
            fp.abort(path)
    assert not [entry for entry in tmp_path.iterdir() if not entry.name.startswith("done")]


def test_save_that_comes_too_late_leaves_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finalizes, and renames the session, just as this one looks for it."""
    real = storage._create_session  # noqa: SLF001 - no caller can time this

    def create(where: storage.CheckpointPath) -> bool:
        is_new = real(where)
        where.final.mkdir()
        return is_new

    monkeypatch.setattr(storage, "_create_session", create)
    with pytest.raises(fp.CheckpointExistsError):
        fp.save(tmp_path / "c", {"a": X})
    assert listing(tmp_path) == ["c "]
