"""Bad input is refused before anything is written, by name; paths are spelled in any way."""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import OBSTACLES, QUICK, X, listing, stored, unchanged

import flax_partial as fp

LOOP: dict[str, Any] = {}
LOOP["again"] = LOOP


def deep(levels: int) -> dict[str, Any]:
    return functools.reduce(lambda value, _: {"a": value}, range(levels), {})


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


BAD_LEAVES: dict[str, Any] = {
    "object array": np.array([None]),
    "string array": np.array(["a"]),
    "dates": np.zeros(2, "M8[s]"),
    "long double": np.longdouble(1),
    "records": np.zeros(2, [("x", int)]),
    "uint4": jnp.zeros(2, jnp.uint4),
    "float0": np.zeros(2, jax.dtypes.float0),
    "masked": np.ma.array([1, 2], mask=[0, 1]),
    "large integer": 2**64,
    "small integer": -(2**63) - 1,
    "set": {1, 2},
    "object": object(),
    "abstract array": jax.ShapeDtypeStruct((3,), jnp.float32),
    "lone surrogate": "\ud800",
    "keys that cannot be sorted": {1: X, "a": X},
    "rows outside": fp.Slice(X, 2, 4),
    "rows before": fp.Slice(X, -1, 4),
    "no rows": fp.Slice(X[:0], 0, 4),
    "no such axis": fp.Slice(X, 0, 4, axis=1),
    "rows of a number": fp.Slice(3, 0, 4),
    "rows of a scalar": fp.Slice(np.array(3), 0, 4),
    "fractional row": fp.Slice(X, 0.5, 4),
    "more rows than any array has": fp.Slice(X, 0, 2**60),
    "rows of ragged lists": fp.Slice([[1], [1, 2]], 0, 4),
    "rows of what is on a text": fp.Slice(X, 0, 4, sharding="x"),
    "rows of what is on no device": fp.Slice(
        X, 0, 4, sharding=jax.sharding.NamedSharding(jax.sharding.AbstractMesh((1,), "x"), jax.P())
    ),
    "empty container that JAX does not know": collections.Counter(),
    "deleted array": deleted(),
}
BAD_STATES: dict[str, tuple[Any, type[Exception]]] = {
    "nothing": ({}, fp.EmptyStateError),
    "None": (None, fp.EmptyStateError),
    "empty list": ([], fp.EmptyStateError),
    "lone surrogate in a key": ({"ok": X, "bad\ud800": X}, fp.UnsupportedLeafError),
    "tuple key": ({("bad", 1): X}, fp.UnsupportedLeafError),
    "None key": ({None: {"bad": X}}, fp.UnsupportedLeafError),
    "bool key": ({True: {"bad": X}}, fp.UnsupportedLeafError),
    "float key": ({1.5: {"bad": X}}, fp.UnsupportedLeafError),
    "names that collide": ({"ok": X, "bad.b": X, "bad": {"b": X}}, fp.KeyConflictError),
    "trailing slash": ({"ok": X, "bad": X, "bad/": X}, fp.KeyConflictError),
    **{
        name: ({"ok": X, "bad": leaf}, fp.UnsupportedLeafError) for name, leaf in BAD_LEAVES.items()
    },
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
    "itself": LOOP,
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
    which = None if error is fp.EmptyStateError else "bad"
    with unchanged(path.parent), pytest.raises(error, match=which) as caught:
        CALLS[call](path, state)
    assert isinstance(caught.value, fp.PartialCheckpointError)
    fp.save(path, {"ok": X})  # and claimed nothing


@pytest.mark.parametrize("call", CALLS)
def test_traced_array_is_refused(path: Path, call: str) -> None:
    with unchanged(path.parent), pytest.raises(fp.UnsupportedLeafError, match="bad"):
        jax.jit(lambda x: CALLS[call](path, {"ok": X, "bad": x}))(jnp.ones(3))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_custom_metadata_is_refused_before_anything_is_written(
    path: Path, case: str, call: str
) -> None:
    metadata, error = BAD_METADATA[case], fp.UnsupportedLeafError
    with unchanged(path.parent), pytest.raises(error, match="custom_metadata"):
        CALLS[call](path, {"ok": X}, custom_metadata=metadata)
    fp.save(path, {"ok": X})


@pytest.mark.parametrize(
    "bad",
    [
        *(("chunk_bytes", value) for value in (0, -1, 1.5)),
        *(("max_inflight_bytes", value) for value in (0, True)),
        ("compression", "gzip"),
    ],
    ids=repr,
)
def test_options_that_cannot_be_honoured_are_refused(bad: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match=bad[0]):
        fp.SaveOptions(**dict([bad]))


@pytest.mark.parametrize("options", [{"durable": True}, {}, False])
def test_options_are_of_their_own_type(tmp_path: Path, options: Any) -> None:
    with pytest.raises(TypeError, match="SaveOptions"):
        fp.save(tmp_path / "c", {"a": X}, options=options)
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        *((path, ValueError) for path in ("", "/", "a\0b", "a\udc80", ".partial_save")),
        *((path, TypeError) for path in (b"bytes", 3, None)),
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
    stored(tmp_path / "c", {"a": X})
    trees.assert_whole(tmp_path / "c", {"a": X})


@pytest.mark.parametrize("obstacle", ["file", "directory", "link", "dangling link"])
def test_session_of_somebody_else_is_left_alone(tmp_path: Path, obstacle: str) -> None:
    session = tmp_path / "c.partial_save"
    OBSTACLES[obstacle](session)
    if obstacle == "directory":
        (session / "precious").write_text("data")
    with unchanged(tmp_path):
        for save in CALLS.values():
            with pytest.raises(fp.CheckpointExistsError, match=r"c\.partial_save"):
                save(tmp_path / "c", {"a": X})
        for call in (fp.abort, fp.finalize):
            with pytest.raises(fp.PartialCheckpointError):
                call(tmp_path / "c")


SPELLINGS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "trailing slash": lambda path: f"{path}/",
    "session": lambda path: f"{path}.partial_save",
    "session, trailing slash": lambda path: f"{path}.partial_save/",
    "relative": os.path.relpath,
    "relative session": lambda path: os.path.relpath(path) + ".partial_save",
    "dots": lambda path: f"{path.parent}/./x/../{path.name}",
    "doubled slash": lambda path: f"{path.parent}//{path.name}",
    "os.PathLike": lambda path: Path(path).with_name(path.name),
}


@pytest.mark.parametrize(
    "name",
    [
        *("c", "ünï 层 with spaces", "c.d", "-rf", "a~", "$HOME", "a'b\"", "100%"),
        *(" ", "a b", "\n", "c.partial_save.d", "x" * 242),
    ],
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
    stored(tmp_path / "c", {"a": X})
    (tmp_path / "best").symlink_to("c")
    trees.assert_whole(tmp_path / "best", {"a": X})
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


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"a": object()}, fp.UnsupportedLeafError),
        ({"a.b": 1, "a": {"b": 2}}, fp.KeyConflictError),
        ({}, fp.EmptyStateError),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_raises_what_save_would_and_saves_nothing(
    tmp_path: Path, state: Any, kind: Any
) -> None:
    with pytest.raises(kind):
        fp.save(tmp_path / "c", state)
    with pytest.raises(kind):
        fp.check(state)
    fp.check({"a": np.ones(3), "b": [1, "x", b"y", None], "c": {}})
    assert list(tmp_path.iterdir()) == []
