"""Every call does in an object store what it does on a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from hypothesis import given, settings
from s3_server import S3Server, serving
from stores import another_process, memory, requests_through
from things import stored

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stores import Request

BIG = np.arange(200_000, dtype=np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as found:
        yield found


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, server: S3Server) -> str:
    another_process()
    return memory() if request.param == "memory" else server.url("/run/12")


def test_what_was_saved_is_loaded(url: str) -> None:
    report = fp.save(url, {"a": {"w": BIG, "b": jnp.ones(3, jnp.bfloat16)}, "text": "ä"})
    assert str(report.path) == url
    late = fp.save_async(
        url, {"c": BIG * 2, "key": jax.random.key(3)}, custom_metadata={"step": 12}
    )
    assert late.result().bytes == BIG.nbytes + 8
    status = fp.status(url)
    assert [len(part.leaves) for part in status.parts] == [3, 2]
    found = fp.finalize(url, expect=["a", "c"])
    assert str(found.path) == url
    assert found.custom_metadata == {"step": 12}
    assert fp.metadata(url).leaves.keys() == found.leaves.keys()
    got = fp.load(url)
    assert (got["a"]["w"] == BIG).all()
    assert got["a"]["b"].dtype == jnp.bfloat16
    assert got["text"] == "ä"
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(jax.random.key(3))).all()
    target = {"c": jax.ShapeDtypeStruct(BIG.shape, np.float32)}
    assert (fp.load(url, target, partial=True)["c"] == BIG * 2).all()
    assert fp.verify(url).ok


@pytest.mark.parametrize("compression", ["zstd", "blosc"])
def test_compressed_leaves_are_read(url: str, compression: Any) -> None:
    options = fp.SaveOptions(compression=compression, chunk_bytes=64 << 10)
    state = {"w": BIG.reshape(1000, 200), "small": np.arange(5), "none": np.empty((0, 3))}
    fp.save(url, state, options=options)
    fp.finalize(url)
    got = fp.load(url)
    for name, value in state.items():
        assert (got[name] == value).all()
    rows = fp.load(url, {"w": fp.Slice(state["w"][300:310], 300, 1000)}, partial=True)
    assert (np.asarray(getattr(rows["w"], "value", rows["w"])) == state["w"][300:310]).all()
    assert fp.verify(url).ok


@settings(max_examples=15)
@given(trees.trees, trees.options)
def test_trees_come_back(tree: Any, options: fp.SaveOptions) -> None:
    url = memory()
    stored(url, tree, options=options)
    target = jax.tree.map(trees.emptied, tree, is_leaf=trees.is_empty)
    trees.assert_whole(url, tree, target=target)


def test_replaced_leaves_have_their_last_value(url: str) -> None:
    fp.save(url, {"a": BIG})
    with pytest.raises(fp.KeyConflictError):
        fp.save(url, {"a": BIG})
    another_process()
    with pytest.raises(fp.KeyConflictError):  # also in the next process
        fp.save(url, {"a": BIG})
    fp.save(url, {"a": BIG + 1}, replace=True)
    fp.finalize(url)
    assert (fp.load(url)["a"] == BIG + 1).all()


def test_what_is_missing_is_told_and_can_be_saved(url: str) -> None:
    fp.save(url, {"w": fp.Slice(np.ones((2, 3)), 0, 4)})
    with pytest.raises(fp.IncompleteCheckpointError, match="w"):
        fp.finalize(url)
    fp.save(url, {"w": fp.Slice(np.zeros((2, 3)), 2, 4)})
    fp.finalize(url)
    assert fp.load(url)["w"].sum() == 6


def test_aborted_session_is_gone_and_another_begins(url: str) -> None:
    fp.save(url, {"a": BIG})
    fp.abort(url)
    for call in (fp.status, fp.finalize, fp.abort, fp.load):
        with pytest.raises(fp.NoSessionError):
            call(url)
    fp.save(url, {"b": 2})
    fp.finalize(url)
    assert fp.load(url) == {"b": 2}


def test_finalized_checkpoint_is_not_written_to(url: str) -> None:
    fp.save(url, {"a": 1})
    fp.finalize(url)
    for call in (fp.finalize, lambda path: fp.save(path, {"b": 1})):
        with pytest.raises(fp.CheckpointExistsError):
            call(url)
    for call in (fp.status, fp.abort):
        with pytest.raises(fp.NoSessionError, match="is finalized already"):
            call(url)
    assert fp.load(url) == {"a": 1}
    fp.remove(url)
    with pytest.raises(fp.NoSessionError):
        fp.load(url)
    fp.save(url, {"b": 2})
    fp.finalize(url)
    assert fp.load(url) == {"b": 2}


def test_session_may_be_named(url: str) -> None:
    fp.save(url, {"a": 1})
    path, _, query = url.partition("?")
    session = f"{path}.partial_save" + (f"?{query}" if query else "")
    assert fp.status(session).leaves == ("a",)
    fp.finalize(session)
    assert fp.load(url) == {"a": 1}


def put_over(url: str, ending: str, change: Callable[[bytes], bytes]) -> None:
    store = fp.StorePath(url).store
    (key,) = (entry.key for entry in store.list() if entry.key.endswith(ending))
    data = store.get(key)
    assert data is not None
    store.put(key, [change(data)])


@pytest.mark.parametrize("ending", ["/data", "contents.json"])
@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]],
    ids=["a bit", "cut short"],
)
def test_damage_is_found(ending: str, change: Callable[[bytes], bytes]) -> None:
    url = memory()
    fp.save(url, {"w": BIG})
    fp.finalize(url)
    put_over(url, ending, change)
    with pytest.raises(fp.CorruptCheckpointError):
        fp.load(url)
    assert not fp.verify(url).ok


def test_reader_that_meets_a_removal_is_told(url: str) -> None:
    fp.save(url, {"w": BIG})
    fp.finalize(url)

    def hook(name: str, _arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "get_into" and fp.StorePath(url).store.size("commit_success.txt") is not None:
            fp.remove(url)
        return request()

    with requests_through(hook), pytest.raises(fp.NoSessionError, match="was removed while"):
        fp.load(url)


def test_failed_save_counts_for_nothing(url: str) -> None:
    fp.save(url, {"a": 1})

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "list" and arguments[1:] == ("state/session/",):
            raise fp.StoreError("its last listing")
        return request()

    with requests_through(hook), pytest.raises(fp.StoreError, match="its last listing"):
        fp.save(url, {"b": BIG})
    another_process()
    fp.finalize(url)
    assert fp.load(url) == {"a": 1}
    assert not [key for key, _ in fp.StorePath(url).store.list() if "withdrawn" in key]
