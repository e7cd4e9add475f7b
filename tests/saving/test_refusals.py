"""Bad input is refused before anything is written, by name; paths are spelled in any way."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import QUICK, X, listing

import flax_partial as fp


def loop() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


BAD_STATES: dict[str, tuple[Any, type[Exception]]] = {
    "nothing": ({}, fp.EmptyStateError),
    "None": (None, fp.EmptyStateError),
    "empty list": ([], fp.EmptyStateError),
    "object array": ({"ok": X, "bad": np.array([None])}, fp.UnsupportedLeafError),
    "string array": ({"ok": X, "bad": np.array(["a"])}, fp.UnsupportedLeafError),
    "bytes": ({"ok": X, "bad": b"abc"}, fp.UnsupportedLeafError),
    "dates": ({"ok": X, "bad": np.zeros(2, "M8[s]")}, fp.UnsupportedLeafError),
    "long double": ({"ok": X, "bad": np.longdouble(1)}, fp.UnsupportedLeafError),
    "records": ({"ok": X, "bad": np.zeros(2, [("x", int)])}, fp.UnsupportedLeafError),
    "uint4": ({"ok": X, "bad": jnp.zeros(2, jnp.uint4)}, fp.UnsupportedLeafError),
    "float0": ({"ok": X, "bad": np.zeros(2, jax.dtypes.float0)}, fp.UnsupportedLeafError),
    "masked": ({"ok": X, "bad": np.ma.array([1, 2], mask=[0, 1])}, fp.UnsupportedLeafError),
    "large integer": ({"ok": X, "bad": 2**64}, fp.UnsupportedLeafError),
    "small integer": ({"ok": X, "bad": -(2**63) - 1}, fp.UnsupportedLeafError),
    "set": ({"ok": X, "bad": {1, 2}}, fp.UnsupportedLeafError),
    "object": ({"ok": X, "bad": object()}, fp.UnsupportedLeafError),
    "abstract array": (
        {"ok": X, "bad": jax.ShapeDtypeStruct((3,), jnp.float32)},
        fp.UnsupportedLeafError,
    ),
    "lone surrogate": ({"ok": X, "bad": "\ud800"}, fp.UnsupportedLeafError),
    "lone surrogate in a key": ({"ok": X, "bad\ud800": X}, fp.UnsupportedLeafError),
    "tuple key": ({("bad", 1): X}, fp.UnsupportedLeafError),
    "None key": ({None: {"bad": X}}, fp.UnsupportedLeafError),
    "bool key": ({True: {"bad": X}}, fp.UnsupportedLeafError),
    "float key": ({1.5: {"bad": X}}, fp.UnsupportedLeafError),
    "keys that cannot be sorted": ({"bad": {1: X, "a": X}}, fp.UnsupportedLeafError),
    "names that collide": ({"ok": X, "bad.b": X, "bad": {"b": X}}, fp.KeyConflictError),
    "trailing slash": ({"ok": X, "bad": X, "bad/": X}, fp.KeyConflictError),
    "rows outside": ({"bad": fp.Slice(X, 2, 4)}, fp.UnsupportedLeafError),
    "rows before": ({"bad": fp.Slice(X, -1, 4)}, fp.UnsupportedLeafError),
    "no rows": ({"bad": fp.Slice(X[:0], 0, 4)}, fp.UnsupportedLeafError),
    "no such axis": ({"bad": fp.Slice(X, 0, 4, axis=1)}, fp.UnsupportedLeafError),
    "rows of a number": ({"bad": fp.Slice(3, 0, 4)}, fp.UnsupportedLeafError),
    "rows of a scalar": ({"bad": fp.Slice(np.array(3), 0, 4)}, fp.UnsupportedLeafError),
    "fractional row": ({"bad": fp.Slice(X, 0.5, 4)}, fp.UnsupportedLeafError),
}
BAD_METADATA: dict[str, Any] = {
    "tuple": {"bad": (1, 2)},
    "NaN": {"bad": [1.0, math.nan]},
    "infinity": {"a": {"bad": math.inf}},
    "array": {"bad": X},
    "NumPy integer": {"bad": np.int64(3)},
    "bytes": {"bad": b"x"},
    "object": {"bad": object()},
    "integer key": {"bad": {1: 2}},
    "no dict": ["bad"],
    "lone surrogate": {"bad": "\ud800"},
    "lone surrogate in a key": {"bad\ud800": 1},
    "integer beyond text": {"bad": 10**5000},
    "itself": loop(),
    "bottomless": deep(100_000),
}
CALLS = {"save": fp.save, "save_async": fp.save_async}


@pytest.fixture(params=[False, True], ids=["new", "session"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint's path, where there is nothing or a session."""
    if request.param:
        fp.save(tmp_path / "c", {"first": X})
    return tmp_path / "c"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_state_is_refused_before_anything_is_written(path: Path, case: str, call: str) -> None:
    state, error = BAD_STATES[case]
    before = listing(path.parent)
    with pytest.raises(error) as caught:
        CALLS[call](path, state)
    assert isinstance(caught.value, fp.PartialCheckpointError)
    assert error is fp.EmptyStateError or "bad" in str(caught.value)  # it says which
    assert listing(path.parent) == before
    fp.save(path, {"ok": X})  # and claimed nothing


@pytest.mark.parametrize("call", CALLS)
def test_deleted_and_traced_arrays_are_refused(path: Path, call: str) -> None:
    before = listing(path.parent)
    with pytest.raises(fp.UnsupportedLeafError, match="bad"):
        CALLS[call](path, {"ok": X, "bad": deleted()})
    with pytest.raises(fp.UnsupportedLeafError, match="bad"):
        jax.jit(lambda x: CALLS[call](path, {"ok": X, "bad": x}))(jnp.ones(3))
    assert listing(path.parent) == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_custom_metadata_is_refused_before_anything_is_written(
    path: Path, case: str, call: str
) -> None:
    before = listing(path.parent)
    with pytest.raises(fp.UnsupportedLeafError, match="custom_metadata"):
        CALLS[call](path, {"ok": X}, custom_metadata=BAD_METADATA[case])
    assert listing(path.parent) == before
    fp.save(path, {"ok": X})


@pytest.mark.parametrize(
    "bad",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": -1},
        {"chunk_bytes": 1.5},
        {"max_inflight_bytes": 0},
        {"max_inflight_bytes": True},
        {"compression": "gzip"},
    ],
    ids=repr,
)
def test_options_that_cannot_be_honoured_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        fp.SaveOptions(**bad)


def test_options_are_of_their_own_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SaveOptions"):
        fp.save(tmp_path / "c", {"a": X}, options={"durable": True})  # type: ignore[arg-type]
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", ValueError),
        ("/", ValueError),
        ("a\0b", ValueError),
        (b"bytes", TypeError),
        (3, TypeError),
        (None, TypeError),
        ("a\udc80", ValueError),
        (".partial_save", ValueError),
    ],
    ids=repr,
)
def test_path_that_names_no_checkpoint_is_refused_by_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (fp.finalize, fp.finalize_async, fp.load, fp.status, fp.abort, fp.metadata):
        with pytest.raises(error):
            call(path)
    for save in CALLS.values():
        with pytest.raises(error):
            save(path, {"a": X})
    assert not listing(tmp_path)


def test_path_that_the_system_refuses_harms_no_other(tmp_path: Path) -> None:
    too_long = tmp_path / ("n" * 250)
    for call in (fp.finalize, fp.abort, lambda path: fp.save(path, {"a": X})):
        with pytest.raises(OSError, match="long"):
            call(too_long)
    fp.save(tmp_path / "c", {"a": X})
    fp.finalize(tmp_path / "c")
    trees.assert_same(fp.load(tmp_path / "c"), {"a": X})


@pytest.mark.parametrize("obstacle", ["file", "foreign directory", "link", "dangling link"])
def test_session_of_somebody_else_is_left_alone(tmp_path: Path, obstacle: str) -> None:
    session = tmp_path / "c.partial_save"
    match obstacle:
        case "file":
            session.write_text("precious")
        case "foreign directory":
            session.mkdir()
            (session / "precious").write_text("data")
        case "link":
            (tmp_path / "elsewhere").mkdir()
            session.symlink_to(tmp_path / "elsewhere")
        case "dangling link":
            session.symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for save in CALLS.values():
        with pytest.raises(fp.CheckpointExistsError, match=r"c\.partial_save"):
            save(tmp_path / "c", {"a": X})
    for call in (fp.abort, fp.finalize):
        with pytest.raises(fp.PartialCheckpointError):
            call(tmp_path / "c")
    assert listing(tmp_path) == before


def relative(path: Path) -> str:
    return os.path.relpath(path)


SPELLINGS = {
    "str": str,
    "trailing slash": lambda path: f"{path}/",
    "session": lambda path: f"{path}.partial_save",
    "session, trailing slash": lambda path: f"{path}.partial_save/",
    "relative": relative,
    "relative session": lambda path: relative(path) + ".partial_save",
    "dots": lambda path: f"{path.parent}/./x/../{path.name}",
    "doubled slash": lambda path: f"{path.parent}//{path.name}",
    "os.PathLike": lambda path: Path(path).with_name(path.name),
}


@pytest.mark.parametrize(
    "name", ["c", "ünï 层 with spaces", "c.d", "-rf", "~", "$HOME", "a'b\"", "100%"]
)
def test_every_spelling_of_a_path_is_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    for key, spelled in SPELLINGS.items():
        assert fp.save(spelled(path), {key: X}, options=QUICK).path == path
        with pytest.raises(fp.KeyConflictError):
            fp.save_async(path, {key: X})
        assert key in fp.status(spelled(path)).leaves
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{name}.partial_save"]
    fp.finalize(SPELLINGS["relative session"](path))
    for spelled in SPELLINGS.values():
        assert set(fp.load(spelled(path))) == set(SPELLINGS)
        assert fp.metadata(spelled(path)).path == path
        assert fp.verify(spelled(path)).ok
        with pytest.raises(fp.CheckpointExistsError):
            fp.finalize(spelled(path))


def test_linked_directory_is_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fp.save(tmp_path / "link" / "c", {"a": X})
    with pytest.raises(fp.KeyConflictError):
        fp.save(tmp_path / "real" / "c", {"a": X})
    fp.finalize(tmp_path / "real" / "c")
    trees.assert_same(fp.load(tmp_path / "link" / "c"), {"a": X})


def test_link_to_a_checkpoint_is_loaded_and_never_written_through(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": X})
    fp.finalize(tmp_path / "c")
    (tmp_path / "best").symlink_to("c")
    trees.assert_same(fp.load(tmp_path / "best"), {"a": X})
    assert fp.verify(tmp_path / "best").ok
    with pytest.raises(fp.CheckpointExistsError):
        fp.save(tmp_path / "best", {"b": X})


def test_working_directory_may_change_while_saves_are_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    handle = fp.save_async("c", {"a": X})
    finalizing = fp.finalize_async("c")
    monkeypatch.chdir(tmp_path / "elsewhere")
    handle.result()
    finalizing.result()
    trees.assert_same(fp.load(tmp_path / "c"), {"a": X})
