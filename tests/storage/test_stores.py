"""What a checkpoint needs of a store, of each kind: the one in memory, and a directory."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import Request, another_process, requests_through
from stores import memory as memory_url

import flax_partial as fp
from flax_partial.storage import object_store
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.object_store import ObjectStore, open_store
from flax_partial.storage.store import PIECE_BYTES, Entry, Store, cut
from flax_partial.storage.urls import parse


@pytest.fixture
def memory() -> ObjectStore:
    return open_store(parse(f"memory://{uuid.uuid4().hex}/run/12"))


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, memory: ObjectStore, tmp_path: Path) -> Store:
    if request.param == "memory":
        return memory
    directory = tmp_path / "run" / "12"
    directory.mkdir(parents=True)
    return DirectoryStore(directory)


def test_what_was_put_is_there(store: Store) -> None:
    store.put("state/a b", [b"one ", memoryview(b"two"), b""])
    assert store.get("state/a b") == b"one two"
    assert store.size("state/a b") == 7
    into = bytearray(3)
    store.get_into("state/a b", 4, memoryview(into))
    assert into == b"two"
    assert store.get("state/a") is None
    assert store.size("state") is None


def test_a_large_object_is_put_in_pieces_from_where_it_is(store: Store) -> None:
    large = np.arange(5 << 20, dtype=np.uint64)  # 40 MiB
    view = memoryview(large).cast("B")
    checks: list[None] = []
    store.put("x", [view[:1000], view[1000:]], check=lambda: checks.append(None))
    assert len(checks) >= 3
    assert store.get("x") == large.tobytes()


def test_what_a_check_raises_ends_a_put(store: Store) -> None:
    def check() -> None:
        raise KeyError("withdrawn")

    for size in (10, PIECE_BYTES + 1):
        with pytest.raises(KeyError, match="withdrawn"):
            store.put("x", [bytes(size)], check=check)
    assert store.list() == []


def test_one_of_many_puts_what_is_new(store: Store) -> None:
    won: list[int] = []

    def put(number: int) -> None:
        if store.put_new("x", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [store.get("x")]


def test_own_answer_is_recognised(store: Store) -> None:
    assert store.put_new("x", b"mine")
    assert store.put_new("x", b"mine")  # as after an answer that was lost
    assert not store.put_new("x", b"yours")


def test_listings(store: Store) -> None:
    for key in ("a", "state/b", "state/part/c", "stately"):
        store.put(key, [key.encode()])
    assert sorted(one.key for one in store.list()) == ["a", "state/b", "state/part/c", "stately"]
    assert sorted(store.list("state/")) == [Entry("state/b", 7), Entry("state/part/c", 12)]
    assert store.children("state/") == (["part"], [Entry("state/b", 7)])
    assert [one.key for one in store.below("state").list()] == ["b", "part/c"]
    store.delete(["a", "not there", "state/b"])
    assert sorted(one.key for one in store.list()) == ["state/part/c", "stately"]
    store.delete([])


def test_what_is_not_there_is_an_error_to_read(store: Store) -> None:
    store.put("x", [b"1234"])
    into = memoryview(bytearray(3))
    with pytest.raises(FileNotFoundError, match=r"/run/12/y"):
        store.get_into("y", 0, into)
    with pytest.raises(ValueError, match=r"/run/12/x ends before 5 bytes"):
        store.get_into("x", 2, into)


def test_cut_copies_nothing_and_meets_each_multiple() -> None:
    data = bytes(range(10))
    found = list(cut([data[:3], data[3:]], 4))
    assert [len(one) for one in found] == [3, 1, 4, 2]
    assert b"".join(found) == data


@pytest.mark.filterwarnings("ignore:.*fork")  # of JAX's, and of Python's
def test_a_forked_child_gets_an_error_and_does_not_hang(memory: ObjectStore) -> None:
    memory.put("x", [b"1"])
    child = os.fork()
    if not child:
        try:
            memory.get("x")
        except fp.ForkedProcessError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_requests_in_flight_are_bounded() -> None:
    slots = object_store._Slots(3)  # noqa: SLF001
    with slots.take(2) as two, slots.take(5) as one:
        assert (two, one) == (2, 1)
        waiting = threading.Thread(target=lambda: slots.take().__enter__())
        waiting.start()
        waiting.join(0.01)
        assert waiting.is_alive()
    waiting.join()


@pytest.fixture
def run() -> fp.StorePath:
    return fp.StorePath(f"memory://{uuid.uuid4().hex}/run")


def test_a_path_is_looked_at_and_read(run: fp.StorePath) -> None:
    run.store.put("12/a.txt", ["ä".encode()])
    run.store.put("b", [b""])
    assert [one.name for one in run.iterdir()] == ["12", "b"]
    assert (run / "12" / "a.txt").read_text() == "ä"
    looked = [(one.exists(), one.is_file(), one.is_dir()) for one in (run, run / "b", run / "c")]
    assert looked == [(True, False, True), (True, True, False), (False, False, False)]
    with pytest.raises(FileNotFoundError, match="/run/12"):
        (run / "12").read_bytes()


@pytest.mark.parametrize(
    ("url", "says"), [("s3://bucket/x", "AWS_ACCESS_KEY_ID"), ("gs://bucket/x", "GOOGLE_APPLICA")]
)
def test_without_credentials_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, says: str
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(fp.StoreAccessError, match=says):
        fp.save(url, {"a": 1})


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="retry_secs"):
        fp.store_options(retry_secs=0)
    fp.store_options("s3://bucket-of-this-test", access_key_id="k", nonsense="1")
    with pytest.raises(ValueError, match="nonsense"):
        open_store(parse("s3://bucket-of-this-test/x"))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r"pip install '.*\[objects\]'"):
        open_store(parse("s3://another-bucket/x"))


def test_call_beside_which_sessions_always_change_says_what_to_do() -> None:
    path = memory_url()
    fp.save(path, {"w": 1})
    another_process()

    def gone(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        return None if name == "get" and arguments[1].endswith(".open") else request()

    with (
        requests_through(gone),
        pytest.raises(fp.StoreError, match=r"busy: .* nothing was changed .* Call again") as told,
    ):
        fp.save(path, {"v": 1})
    assert path in str(told.value)
    fp.save(path, {"v": 1})
    assert set(fp.status(path).leaves) == {"v", "w"}
