"""Names, trees, paths and objects that mean harm: refused by name, or stored like any other.

Nothing is ever written outside of the session, and loading runs nothing that a checkpoint holds.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forged
import jax
import numpy as np
import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st
from isolated import Isolated
from things import OBSTACLES, QUICK, X, listing, run_or_skip, stored, unchanged

import flax_partial as fp

# --- names ----------------------------------------------------------------------------------------

NAMES = (
    *(
        "",
        " ",
        "a b",
        "a b ",
        ".",
        "..",
        "...",
        "../..",
        "../../escape",
        "/",
        "//",
        "/etc/passwd",
        "a/b",
        "a//b",
    ),
    *("\0", "a\0b", "\n", "\r\n", "\t", "\x7f", "\ufeff", "\uffff", "\u202e", "e\u0301"),
    *("\U0001f4a9", "~", "~0", "~1", "$HOME", "`id`", "{}", "[0]", "*", "None", "0", "-1"),
    *("zarr.json", "c", "c/0", "c/0/0", ".zarray", ".zgroup", "d", "manifest.ocdbt", "_METADATA"),
    *("part.json", "contents.json", "state", "data", "_sharding", "_strings.json", "part.0.p0.x"),
    *("'", '"', "\\", "%2e%2e", "a b", "a b "),
    *("__class__", "__proto__", "__reduce__", "x" * 5_000, "\u00e9" * 3_000, "a" * 300 + "/" * 300),
)
SIZES = {"within the table": 3, "in the data file": 400, "large": 40_000}


def outside(directory: Path) -> list[str]:
    """What lies beside the checkpoint and its session."""
    return [line for line in listing(directory) if not line.startswith(("c ", "c/", "c.partial"))]


@pytest.mark.parametrize("size", SIZES)
def test_any_name_is_stored_like_any_other(tmp_path: Path, size: str) -> None:
    state = {name: np.arange(SIZES[size]) + at for at, name in enumerate(NAMES)}
    del state[""]  # which is "/" but for a slash
    state |= {"text": {name: "x" for name in NAMES if name != "/"}}
    fp.save(tmp_path / "c", state, options=QUICK)
    session = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("*")}
    assert all(len(parts) <= 4 for parts in session)  # no name has become a directory
    trees.assert_whole(fp.finalize(tmp_path / "c").path, state)
    for name in state.keys() - {"text"}:
        wanted = {name: state[name]}
        trees.assert_same(fp.load(tmp_path / "c", wanted, partial=True), wanted)
    assert not outside(tmp_path)


_pieces = st.sampled_from((*"./\\~\0\n", "..", "c", "0", "zarr.json", "\u00e9", "a"))
_names = st.lists(_pieces, max_size=4).map("".join)
_hostile = st.recursive(
    st.sampled_from((np.arange(3), np.arange(400), "text", None)),
    lambda inner: st.dictionaries(_names, inner, min_size=1, max_size=4),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


def stored_names(tree: Any, *keys: str) -> Iterator[str]:
    """What each leaf is called in the database: keys that give the same name conflict."""
    if not isinstance(tree, dict):
        name = ".".join(keys)
        yield "" if name in {"", "/"} else name if name.endswith("/") else name + "/"
        return
    for key, inner in tree.items():
        yield from stored_names(inner, *keys, key)


@given(_hostile)
def test_names_are_at_odds_or_come_back(state: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "c")
        names = list(stored_names(state))
        if len(set(names)) < len(names):
            with unchanged(path.parent), pytest.raises(fp.KeyConflictError):
                fp.save(path, state, options=QUICK)
            return
        stored(path, state)
        trees.assert_whole(path, state)
        assert not outside(path.parent)


# --- trees ----------------------------------------------------------------------------------------


def deep(levels: int, leaf: Any) -> Any:
    for level in range(levels):
        leaf = {"k": leaf} if level % 2 else [leaf]
    return leaf


def test_tree_that_jax_cannot_flatten_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    """JAX would leave the thread without any recursion depth: every later call would fail."""
    around: dict[str, Any] = {}
    around["again"] = around
    too_deep = 1_000 if sys.version_info < (3, 12) else 50_000  # which no limit of Python's bounds
    for tree in ({"deep": deep(too_deep, 1)}, {"deep": deep(200_000, 1)}, around):
        for call in (fp.save, fp.save_async):
            with pytest.raises(fp.UnsupportedLeafError, match="nested"):
                call(tmp_path / "c", tree)
    assert not listing(tmp_path)
    stored(tmp_path / "c", {"deep": deep(700, X)})
    with pytest.raises(fp.UnsupportedLeafError, match="nested"):
        fp.load(tmp_path / "c", around)
    trees.assert_same(fp.load(tmp_path / "c"), {"deep": deep(700, X)})


def in_depth(path: Path) -> bool:
    """Saves and loads a tree of 1,000 levels in a process that allows for it."""
    sys.setrecursionlimit(4_000)
    fp.save(path, {"deep": deep(1_000, X)}, custom_metadata={"deep": deep(300, 1)})
    fp.finalize(path, expect=["deep", "deep" + ".k.0" * 500])
    found = fp.load(path)["deep"]
    while isinstance(found, (dict, list)):
        found = found["k"] if isinstance(found, dict) else found[0]
    return bool((found == X).all()) and fp.verify(path).ok


def test_tree_of_a_thousand_levels_is_stored(tmp_path: Path, apart: Isolated) -> None:
    assert apart.value(in_depth, tmp_path / "c")


@pytest.mark.parametrize("width", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_wide_tree_is_stored(tmp_path: Path, width: int) -> None:
    state = {"dict": {f"k{index}": index for index in range(width)}, "list": ["x"] * width}
    fp.save(tmp_path / "c", state, options=QUICK)
    fp.finalize(tmp_path / "c", expect=["list", f"dict.k{width - 1}"])
    assert fp.load(tmp_path / "c") == state


# --- objects --------------------------------------------------------------------------------------


class Failing:
    """Fails in whatever NumPy, JAX or a message asks of it."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    __jax_array__ = __len__ = __iter__ = __float__ = __index__ = __array__
    dtype = shape = property(__array__)


class FailingArray(np.ndarray):
    """An array that fails when it is copied, or as soon as another is made of it."""

    def copy(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    def __array_finalize__(self, _: Any) -> None:
        if type(self).is_armed:
            raise ZeroDivisionError

    is_armed = False


class FailingText(str):
    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        raise ZeroDivisionError


class FailingNode:
    """A node of a tree that fails when it is flattened."""


def _fail(_: Any) -> Any:
    raise ZeroDivisionError


jax.tree_util.register_pytree_node(FailingNode, _fail, lambda *_: FailingNode())


@pytest.mark.parametrize("call", [fp.save, fp.save_async], ids=["save", "save_async"])
@pytest.mark.parametrize("kind", ["object", "node", "array", "text", "metadata", "key"])
def test_object_that_fails_fails_the_save_and_nothing_else(
    tmp_path: Path, kind: str, call: Any
) -> None:
    fp.save(tmp_path / "c", {"first": X})
    before = listing(tmp_path)
    armed = np.arange(3).view(FailingArray)
    bad: dict[str, Any] = {
        "object": Failing(),
        "node": FailingNode(),
        "array": armed,
        "text": FailingText("x"),
        "metadata": X,
        "key": {Failing(): X},
    }
    options: dict[str, Any] = {"custom_metadata": {"bad": Failing()}} if kind == "metadata" else {}
    FailingArray.is_armed = True
    try:
        with contextlib.suppress(ZeroDivisionError, fp.UnsupportedLeafError):
            call(tmp_path / "c", {"ok": X, "bad": bad[kind]}, **options)
            assert kind == "array"  # its memory may be taken without asking it
            fp.finalize(tmp_path / "c")
            assert (fp.load(tmp_path / "c")["bad"] == np.arange(3)).all()
            return
    finally:
        FailingArray.is_armed = False
    assert listing(tmp_path) == before
    stored(tmp_path / "c", {"ok": X, "bad": X})
    trees.assert_whole(tmp_path / "c", {"first": X, "ok": X, "bad": X})


# --- code -----------------------------------------------------------------------------------------

_RUNS = ("compile", "exec", "import", "marshal.loads", "pickle.find_class", "ctypes.dlopen")
_RUNS += ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect")


def events_of(path: Path) -> list[str]:
    """What Python was asked to run while a checkpoint was read, twice."""
    events: list[str] = []
    is_on = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on and event in _RUNS:
            events.append(f"{event} {arguments[:1]}")

    def read() -> None:
        for call in (fp.load, fp.verify, fp.metadata, fp.status):
            with contextlib.suppress(fp.PartialCheckpointError):
                call(path)

    read()  # what is imported when first needed
    sys.addaudithook(hear)
    is_on = True
    read()
    is_on = False
    return events


def test_reading_runs_nothing_that_a_checkpoint_holds(tmp_path: Path, apart: Isolated) -> None:
    for name in ("whole", *forged.ROWS):
        path = tmp_path / name.replace(" ", "_")
        report = stored(path, {"a": jax.numpy.arange(3), "b": "__import__('os')"})
        if name != "whole":
            table = forged.table(name, forged.contents_head(report.part))
            (path / "state" / "contents.json").write_bytes(table)
        assert not apart.value(events_of, path), name


def test_package_knows_nothing_that_runs_data() -> None:
    spec = importlib.util.find_spec("flax_partial")
    assert spec is not None
    assert spec.origin is not None
    for file in Path(spec.origin).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, file
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "compile", "__import__"}, file


# --- places ---------------------------------------------------------------------------------------


def works(path: Path) -> None:
    fp.save(path, {"a": X})
    fp.save_async(path, {"b": np.arange(40_000)}).result()
    trees.assert_whole(fp.finalize(path).path, {"a": X, "b": np.arange(40_000)})


def save_a(path: Path) -> fp.SaveReport:
    return fp.save(path, {"a": X})


def names_in(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def refuses(path: Path, error: type[Exception]) -> None:
    """Both kinds of save are refused, and a later call does not hang or fail otherwise."""
    for call in (fp.save, fp.save_async):
        with pytest.raises(error):
            call(path, {"a": X})
    with pytest.raises((fp.NoSessionError, error)):
        fp.finalize(path)


@pytest.mark.parametrize("name", ["file/c", "file/deeper/c"])
def test_path_below_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with unchanged(tmp_path):
        refuses(tmp_path / name, NotADirectoryError)


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "pipe"])
def test_what_is_at_the_path_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    OBSTACLES[kind](path)
    with unchanged(tmp_path):
        refuses(path, fp.CheckpointExistsError)
        with pytest.raises(fp.NoSessionError):
            fp.load(path)
    assert not fp.steps(path)


def test_parent_that_is_a_dangling_link_is_refused_or_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    works(tmp_path / "link" / "c")
    assert (tmp_path / "target" / "c").is_dir()


def test_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    refuses(tmp_path / "circle" / "c", OSError)


def test_other_file_system_through_a_link(tmp_path: Path) -> None:
    shared = Path("/dev/shm")  # noqa: S108 - another file system is the point
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        (tmp_path / "link").symlink_to(directory)
        works(tmp_path / "link" / "c")
        works(Path(directory) / "d")


def as_another_user(path: Path) -> list[str]:
    """What saving, finalizing and reading come to for a user who may not write here."""
    calls: list[Callable[[], Any]] = [
        lambda: fp.save(path / "new", {"a": X}),
        lambda: fp.abort(path / "session"),
        lambda: fp.finalize(path / "session"),
        lambda: fp.load(path / "closed"),
        lambda: fp.load(path / "open"),
    ]
    os.seteuid(65534)
    try:
        return list(map(_outcome, calls))
    finally:
        os.seteuid(0)


def _outcome(call: Any) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is looked at outside
        return type(error).__name__
    return "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_user_without_permission_is_told_so_and_changes_nothing(apart: Isolated) -> None:
    """What may not be read is not called damaged."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        for checkpoint in ("open", "closed"):
            stored(directory / checkpoint, {"a": np.arange(40_000)})
        (part,) = directory.glob("closed/state/part.*")
        (part / "data").chmod(0)
        fp.save(directory / "session", {"a": X})
        with unchanged(directory):
            outcomes = apart.value(as_another_user, directory)
        assert outcomes == ["PermissionError"] * 4 + ["ok"]
        fp.finalize(directory / "session")


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """No process can write into a directory, not even root's."""
    run_or_skip(["chattr", "+i", directory])
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", directory], check=True)


def test_directory_that_takes_no_files_fails_and_harms_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    fp.save(runs / "session", {"a": X})
    stored(runs / "done", {"a": X})
    calls = ((fp.finalize, "session"), (fp.abort, "session"), (save_a, "new"))
    with unchanged(runs / "done"):
        with read_only(runs):
            for call, name in calls:
                with pytest.raises(OSError, match="not permitted"):
                    call(runs / name)
            trees.assert_whole(runs / "done", {"a": X})
        with read_only(runs / "session.partial_save" / "state"):
            handle = fp.save_async(runs / "session", {"b": X})
            with pytest.raises(OSError, match="not permitted"):
                handle.result()
    assert names_in(runs) == {"done", "session.partial_save"}
    trees.assert_whole(fp.finalize(runs / "session").path, {"a": X})


@contextlib.contextmanager
def mounted_read_only(directory: Path) -> Iterator[None]:
    """The file system itself takes no changes, as a snapshot or a dead disk."""
    run_or_skip(["mount", "--bind", directory, directory])
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_read_only_file_system_is_read_and_refuses_every_change(tmp_path: Path) -> None:
    stored(tmp_path / "1", {"a": X})
    fp.save(tmp_path / "2", {"a": X})
    changes: list[Callable[[], Any]] = [
        lambda: fp.save(tmp_path / "2", {"b": X}),
        lambda: fp.save_async(tmp_path / "2", {"b": X}).result(),
        lambda: fp.save(tmp_path / "3", {"a": X}),
        lambda: fp.finalize(tmp_path / "2"),
        lambda: fp.abort(tmp_path / "2"),
    ]
    with mounted_read_only(tmp_path), unchanged(tmp_path):
        for change in changes:
            with pytest.raises(OSError, match="Read-only file system"):
                change()
        trees.assert_whole(tmp_path / "1", {"a": X})
        assert fp.steps(tmp_path) == [1]
        assert fp.status(tmp_path / "2").leaves == ("a",)
    stored(tmp_path / "2", {"b": X})
    trees.assert_whole(tmp_path / "2", {"a": X, "b": X})


def test_session_that_is_a_mount_point_is_kept(tmp_path: Path) -> None:
    """It cannot be renamed: finalize says so, and everything is still there."""
    session = tmp_path / "c.partial_save"
    session.mkdir()
    run_or_skip(["mount", "-t", "tmpfs", "tmpfs", session])
    try:
        fp.save(tmp_path / "c", {"a": X})
        for _ in range(2):
            with pytest.raises(OSError, match="busy"):
                fp.finalize(tmp_path / "c")
        assert fp.status(tmp_path / "c").leaves == ("a",)
    finally:
        subprocess.run(["umount", "-l", session], check=True)


# --- sessions and checkpoints of another program -------------------------------------------------


def test_session_whose_state_is_elsewhere_is_refused(tmp_path: Path) -> None:
    """What finalize derives would be cleared and written there: in another checkpoint, perhaps."""
    stored(tmp_path / "other", {"a": X})
    (tmp_path / "c.partial_save").mkdir()
    (tmp_path / "c.partial_save" / "state").symlink_to(tmp_path / "other" / "state")
    with unchanged(tmp_path / "other"):
        for call in (fp.finalize, save_a, fp.abort):
            with pytest.raises(fp.CheckpointExistsError, match="symbolic link"):
                call(tmp_path / "c")
    assert fp.verify(tmp_path / "other").ok


@pytest.mark.parametrize("what", ["pipe", "directory", "device"])
@pytest.mark.timeout(30)
def test_table_that_is_no_file_is_damage(tmp_path: Path, what: str) -> None:
    """Reading a pipe would wait for ever, and some devices never end."""

    def replace(table: Path) -> None:
        table.unlink()
        OBSTACLES[what](table)

    report = stored(tmp_path / "c", {"a": X})
    replace(tmp_path / "c" / "state" / report.part / "part.json")
    replace(tmp_path / "c" / "state" / "_METADATA")
    trees.assert_same(fp.load(tmp_path / "c"), {"a": X})  # it needs neither
    assert {f"state/{report.part}", "state/_METADATA"} <= set(fp.verify(tmp_path / "c").bad)
    replace(tmp_path / "c" / "state" / "contents.json")
    with pytest.raises(fp.CorruptCheckpointError, match=r"contents\.json"):
        fp.load(tmp_path / "c")
    report = fp.save(tmp_path / "d", {"a": X})
    replace(tmp_path / "d.partial_save" / "state" / report.part / "part.json")
    assert fp.status(tmp_path / "d").damaged == (report.part,)
    with pytest.raises(fp.CorruptCheckpointError, match=report.part):
        fp.finalize(tmp_path / "d")
