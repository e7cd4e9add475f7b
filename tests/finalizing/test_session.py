"""An unfinished checkpoint: what saves add to it, what conflicts, and how it ends."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import QUICK, Element, X, listing

import flax_partial as fp
from flax_partial.storage import session_dir

if TYPE_CHECKING:
    from pathlib import Path

CALLS = {"save": fp.save, "save_async": fp.save_async}


# What the session holds, what is saved then, and whether replace=True allows it.
CONFLICTS: dict[str, tuple[Any, Any, bool]] = {
    "same key": ({"a": X}, {"a": X}, True),
    "same key, other kind": ({"a": X}, {"a": "text"}, True),
    "same key, other shape": ({"a": X}, {"a": np.zeros((2, 2))}, True),
    "integer key and its text": ({"a": {1: X}}, {"a": {"1": X}}, True),
    "string": ({"a": "x"}, {"a": "x"}, True),
    "None": ({"a": None}, {"a": None}, True),
    "inside a leaf": ({"a": X}, {"a": {"b": X}}, False),
    "inside None": ({"a": None}, {"a": {"b": X}}, False),
    "over a subtree": ({"a": {"b": {"c": X}}}, {"a": X}, False),
    "None over a subtree": ({"a": {"b": X}}, {"a": None}, False),
    "list beside dict": ({"a": [X]}, {"a": {"b": X}}, False),
    "list over dict": ({"a": {"0": X, "b": X}}, {"a": [X]}, False),
    "joined names": ({"a": {"b": X}}, {"a.b": X}, False),
    "trailing slash": ({"a": X}, {"a/": X}, False),
    "some rows": ({"a": fp.Slice(X, 0, 9)}, {"a": fp.Slice(X, 2, 9)}, True),
    "whole over rows": ({"a": fp.Slice(X, 0, 9)}, {"a": np.arange(9)}, True),
    "rows over whole": ({"a": np.arange(9)}, {"a": fp.Slice(X, 0, 9)}, True),
    "root": (X, {"a": X}, False),
}


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same process", "next process"])
@pytest.mark.parametrize("case", CONFLICTS)
def test_conflict_with_an_earlier_save_is_refused_and_changes_nothing(
    tmp_path: Path, case: str, *, is_fresh: bool
) -> None:
    first, second, is_replaceable = CONFLICTS[case]
    path = tmp_path / "c"
    fp.save(path, first)
    if is_fresh:  # a directory that this process has never seen
        path = tmp_path / "moved"
        (tmp_path / "c.partial_save").rename(tmp_path / "moved.partial_save")
    before = listing(tmp_path)
    with pytest.raises(fp.KeyConflictError) as caught:
        fp.save(path, {"new": X, **second} if isinstance(second, dict) else second)
    assert "a" in str(caught.value)
    assert ("replace=True" in str(caught.value)) == is_replaceable
    if not is_replaceable:
        with pytest.raises(fp.KeyConflictError):
            fp.save(path, second, replace=True)
    assert listing(tmp_path) == before
    if is_replaceable:
        fp.save(path, second, replace=True)
        assert len(fp.status(path).parts) == 2


def test_leaf_of_a_tree_that_was_saved_before_is_refused_around_an_empty_container(
    tmp_path: Path,
) -> None:
    for name in ("before", "c"):
        if name == "c":
            fp.save(tmp_path / name, {"a": {"b": {}}}, options=QUICK)
            with pytest.raises(fp.KeyConflictError, match="cannot also be a subtree"):
                fp.save(tmp_path / name, {"a": X}, options=QUICK)
        else:
            fp.save(tmp_path / name, {"a": X}, options=QUICK)


def test_empty_container_can_be_filled_otherwise_after_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    fp.save(tmp_path / "c", {"a": {}}, options=QUICK)
    monkeypatch.setattr(session_dir, "commit_part", fail)
    with pytest.raises(OSError, match="No space left"):
        fp.save(tmp_path / "c", {"a": [X]}, options=QUICK)
    monkeypatch.undo()
    fp.save(tmp_path / "c", {"a": {"b": X}}, options=QUICK)
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"a": {"b": X}})


def test_every_conflict_is_told_in_one_error(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": X, "b": {"c": X}, "d": X})
    with pytest.raises(fp.KeyConflictError) as caught:
        fp.save(tmp_path / "c", {"a": X, "b": X, "d": X, "e": X})
    for name in ("'a'", "'b'", "'d'"):
        assert name in str(caught.value)
    assert "'e'" not in str(caught.value)


def test_replaced_leaf_has_the_newest_value_whatever_it_was(tmp_path: Path) -> None:
    versions: list[Any] = [
        np.arange(100_000.0),
        np.arange(3, dtype=np.int8),
        "text",
        None,
        {},
        5,
        jnp.ones((2, 2)),
        np.arange(100_000.0)[::-1],
        [],
        np.arange(99_991.0),
    ]
    fp.save(tmp_path / "c", {"a": versions[0], "b": X, "z": X}, options=QUICK)
    for version in versions[1:]:
        fp.save(tmp_path / "c", {"a": version}, replace=True, options=QUICK)
    fp.save(tmp_path / "c", {"b": X + 1, "new": X}, replace=True, options=QUICK)
    fp.finalize(tmp_path / "c")
    expected = {"a": versions[-1], "b": X + 1, "new": X, "z": X}
    trees.assert_same(fp.load(tmp_path / "c"), expected)
    assert fp.verify(tmp_path / "c").ok


def test_replaced_rows_are_saved_anew_and_old_ones_do_not_come_back(tmp_path: Path) -> None:
    old, new = np.zeros((4, 5)), np.ones((4, 5))
    for row in range(4):
        fp.save(tmp_path / "c", {"w": fp.Slice(old[row : row + 1], row, 4)})
    for row in (2, 0):
        fp.save(tmp_path / "c", {"w": fp.Slice(new[row : row + 1], row, 4)}, replace=True)
    with pytest.raises(fp.IncompleteCheckpointError, match="w"):
        fp.finalize(tmp_path / "c")
    for row in (1, 3):
        fp.save(tmp_path / "c", {"w": fp.Slice(new[row : row + 1], row, 4)})
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"w": new})


def test_rows_of_a_stacked_leaf_that_lives_on_several_devices(tmp_path: Path) -> None:
    sharding = jax.sharding.NamedSharding(trees.mesh("xy"), jax.P(None, "x", "y"))
    stacked = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)
    for layer in (1, 2, 0):
        value = jax.device_put(stacked[layer : layer + 1], sharding)
        fp.save_async(tmp_path / "c", {"w": fp.Slice(value, layer, 3)})
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"w": jax.device_put(stacked)})
    assert fp.metadata(tmp_path / "c").leaves["w"].shape == (3, 8, 6)


def test_custom_metadata_merges_deeply_and_the_later_value_wins(tmp_path: Path) -> None:
    saves: list[dict[str, Any]] = [
        {"step": 1, "config": {"lr": 0.1, "layers": [1, 2]}, "note": {"a": 1}},
        {"step": 2, "config": {"layers": [3], "wd": None}, "note": "text"},
        {"config": {"größe": "ü", "deep": {"er": True}}, "z": -0.5},
    ]
    for index, custom_metadata in enumerate(saves):
        fp.save(tmp_path / "c", {f"leaf{index}": X}, custom_metadata=custom_metadata)
        custom_metadata["step"] = 99  # the caller's own again
    fp.save(tmp_path / "c", {"without": X})
    expected = {
        "step": 2,
        "config": {"lr": 0.1, "layers": [3], "wd": None, "größe": "ü", "deep": {"er": True}},
        "note": "text",
        "z": -0.5,
    }
    assert fp.status(tmp_path / "c").custom_metadata == expected
    assert fp.finalize(tmp_path / "c").custom_metadata == expected
    assert fp.metadata(tmp_path / "c").custom_metadata == expected


def test_custom_metadata_of_a_save_in_flight_is_its_own(tmp_path: Path) -> None:
    mine = {"inner": {"step": 1}, "list": [1]}
    handle = fp.save_async(tmp_path / "c", {"a": X}, custom_metadata=mine)
    mine["inner"]["step"] = 2  # type: ignore[index]
    mine["list"].append(2)  # type: ignore[attr-defined]
    handle.result()
    assert fp.status(tmp_path / "c").custom_metadata == {"inner": {"step": 1}, "list": [1]}


EXPECT: dict[str, tuple[list[str], list[str]]] = {
    "leaves": (["a", "tree.b"], []),
    "subtree": (["tree"], []),
    "slashes": (["tree/b"], []),
    "rows": (["rows"], []),
    "nothing": ([], []),
    "missing leaf": (["a", "tree.c"], ["tree.c"]),
    "missing subtree": (["other", "another", "a"], ["other", "another"]),
    "part of a name": (["tre"], ["tre"]),
    "below a leaf": (["a.x"], ["a.x"]),
}


@pytest.mark.parametrize("case", EXPECT)
def test_expected_leaves_and_subtrees_have_to_be_there(tmp_path: Path, case: str) -> None:
    expect, missing = EXPECT[case]
    state = {"a": X, "tree": {"b": X}, "rows": fp.Slice(X, 0, 3), "opt": [X, X]}
    fp.save(tmp_path / "c", state)
    if missing:
        before = listing(tmp_path)
        with pytest.raises(fp.IncompleteCheckpointError) as caught:
            fp.finalize(tmp_path / "c", expect=expect)
        for name in missing:
            assert name in str(caught.value)
        assert listing(tmp_path) == before  # nothing is lost
    fp.finalize(tmp_path / "c", expect=iter(set(expect) - set(missing)))
    trees.assert_same(fp.load(tmp_path / "c"), {**state, "rows": X})


def test_missing_rows_are_told_and_waited_for(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"w": fp.Slice(X, 0, 6)})
    started = time.monotonic()
    with pytest.raises(fp.IncompleteCheckpointError, match="w"):
        fp.finalize(tmp_path / "c", timeout_secs=0.3)
    assert 0.3 <= time.monotonic() - started < 5
    handle = fp.finalize_async(tmp_path / "c", expect=["w", "later"], timeout_secs=60)
    time.sleep(0.1)
    fp.save(tmp_path / "c", {"w": fp.Slice(X + 3, 3, 6)})
    assert not handle.done()
    fp.save(tmp_path / "c", {"later": 1})
    assert set(handle.result(250).leaves) == {"w", "later"}
    trees.assert_same(fp.load(tmp_path / "c"), {"w": np.arange(6), "later": 1})


@pytest.mark.parametrize("secs", [-1, math.nan])
def test_timeout_below_zero_or_of_no_length_is_refused(tmp_path: Path, secs: float) -> None:
    fp.save(tmp_path / "c", {"w": fp.Slice(X, 0, 6)}, options=QUICK)
    for call in (fp.finalize, fp.finalize_async, fp.abort):
        with pytest.raises(ValueError, match="timeout_secs"):
            call(tmp_path / "c", timeout_secs=secs)


def test_list_with_a_gap_is_refused_and_filled_later(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"list": Element(2, X), "other": X})
    fp.save(tmp_path / "c", {"list": Element(0, X)})
    with pytest.raises(fp.PartialCheckpointError, match=r"list.*1"):
        fp.finalize(tmp_path / "c")
    fp.save(tmp_path / "c", {"list": Element(1, X)})
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"list": [X, X, X], "other": X})


def test_status_names_no_empty_container_that_holds_a_leaf(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"tree": {"x": 1}}, options=QUICK)
    fp.save(tmp_path / "c", {"tree": {}, "empty": {}}, options=QUICK)
    assert fp.status(tmp_path / "c").leaves == ("empty", "tree.x")


def test_status_tells_parts_leaves_and_torn_ones(tmp_path: Path) -> None:
    one = fp.save(tmp_path / "c", {"b": X, "a": 1}, custom_metadata={"step": 1})
    two = fp.save(tmp_path / "c", {"b": X + 1}, replace=True)
    torn = tmp_path / "c.partial_save" / "state" / f"{one.part[:-1]}x"
    torn.mkdir()
    found = fp.status(tmp_path / "c")
    assert found.path == tmp_path / "c"
    assert [part.name for part in found.parts] == [one.part, two.part]
    assert [set(part.leaves) for part in found.parts] == [{"a", "b"}, {"b"}]
    assert found.parts[0].custom_metadata == {"step": 1}
    assert found.parts[0].written_at <= one.committed_at <= two.committed_at
    assert found.leaves == ("a", "b")
    assert found.torn == (torn.name,)
    assert found.processes == (0,)
    assert found.bytes == one.bytes + two.bytes
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"a": 1, "b": X + 1})
    assert not (tmp_path / "c" / "state" / torn.name).exists()


def test_report_of_a_save(tmp_path: Path) -> None:
    report = fp.save(tmp_path / "c", {"w": np.zeros((4, 5), np.float32), "n": None, "i": 3})
    assert report.path == tmp_path / "c"
    assert (tmp_path / "c.partial_save" / "state" / report.part / "part.json").is_file()
    assert (report.leaves, report.bytes) == (3, 88)
    assert 0 < report.write_secs <= report.blocked_secs < 60
    assert report.budget_secs == 0
    assert abs(report.committed_at - time.time()) < 60


def test_finalized_checkpoint_is_never_touched_again(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": X})
    fp.finalize(tmp_path / "c")
    before = listing(tmp_path)
    for save in CALLS.values():
        with pytest.raises(fp.CheckpointExistsError):
            save(tmp_path / "c", {"b": X}, replace=True)
    with pytest.raises(fp.CheckpointExistsError):
        fp.finalize(tmp_path / "c")
    for call in (fp.abort, fp.status):
        with pytest.raises(fp.NoSessionError):
            call(tmp_path / "c")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("obstacle", ["file", "empty directory", "directory", "dangling link"])
def test_finalize_replaces_nothing_that_appeared_at_its_path(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "c"
    fp.save(path, {"a": X})
    match obstacle:
        case "file":
            path.write_text("precious")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case _:
            path.mkdir()
            if obstacle == "directory":
                (path / "precious").write_text("data")
    before = listing(tmp_path)
    with pytest.raises(fp.CheckpointExistsError):
        fp.finalize(path)
    assert listing(tmp_path) == before
    path.rename(tmp_path / "away")
    trees.assert_whole(fp.finalize(path).path, {"a": X})


@pytest.mark.parametrize("what", ["nothing", "empty", "torn"])
def test_finalize_needs_a_committed_part(tmp_path: Path, what: str) -> None:
    if what != "nothing":
        (tmp_path / "c.partial_save").mkdir()
    if what == "torn":
        (tmp_path / "c.partial_save" / "state" / "part.1.p0.x").mkdir(parents=True)
    error = fp.NoSessionError if what == "nothing" else fp.IncompleteCheckpointError
    with pytest.raises(error):
        fp.finalize(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_directory_made_beforehand_becomes_the_session(tmp_path: Path) -> None:
    (tmp_path / "c.partial_save").mkdir()
    fp.save(tmp_path / "c", {"a": X})
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"a": X})


def test_abort_drops_the_session_and_only_that(tmp_path: Path) -> None:
    for name in ("c", "other", "done"):
        fp.save(tmp_path / name, {"a": X})
    fp.finalize(tmp_path / "done")
    fp.abort(tmp_path / "c")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["done", "other.partial_save"]
    with pytest.raises(fp.NoSessionError):
        fp.abort(tmp_path / "c")
    fp.save(tmp_path / "c", {"a": X + 1})  # a new one, which owes the old nothing
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"a": X + 1})


def test_session_that_vanished_and_came_back_is_read_anew(tmp_path: Path) -> None:
    """As when another process aborts, and starts over."""
    fp.save(tmp_path / "c", {"a": X, "b": X})
    (tmp_path / "c.partial_save").rename(tmp_path / "away")
    fp.save(tmp_path / "c", {"a": X})
    with pytest.raises(fp.KeyConflictError):
        fp.save(tmp_path / "c", {"a": X})
    (tmp_path / "c.partial_save").rename(tmp_path / "away too")
    (tmp_path / "away").rename(tmp_path / "c.partial_save")
    with pytest.raises(fp.KeyConflictError):
        fp.save(tmp_path / "c", {"b": X})
    fp.save(tmp_path / "c", {"c": X})
    fp.finalize(tmp_path / "c")
    assert set(fp.load(tmp_path / "c")) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "other",
    [jnp.zeros((1, 4, 4), jnp.float32), np.zeros((1, 4, 4), np.int32)],
    ids=["kind", "dtype"],
)
def test_rows_of_one_leaf_that_are_not_alike_are_refused_as_such(
    tmp_path: Path, other: Any
) -> None:
    """Replacing is no way out for such a row alone: it would take the others with it."""
    rows = np.ones((1, 4, 4), np.float32)
    fp.save(tmp_path / "c", {"w": fp.Slice(rows, 0, 2)})
    with pytest.raises(fp.KeyConflictError, match="Save all pieces with the same kind"):
        fp.save(tmp_path / "c", {"w": fp.Slice(other, 1, 2)})
    fp.save(tmp_path / "c", {"w": fp.Slice(rows, 1, 2)})
    trees.assert_whole(fp.finalize(tmp_path / "c").path, {"w": np.ones((2, 4, 4), np.float32)})


def test_path_through_a_link_that_is_pointed_elsewhere_leads_there(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "link"
    link.symlink_to("one")
    fp.save(link / "c", {"a": 1})
    link.unlink()
    link.symlink_to("two")
    fp.save(link / "c", {"b": 2})
    assert fp.status(tmp_path / "one" / "c").leaves == ("a",)
    assert fp.status(tmp_path / "two" / "c").leaves == ("b",)
    (tmp_path / "two").rename(tmp_path / "three")
    link.unlink()
    link.symlink_to("three")
    fp.save(link / "c", {"d": 3})
    assert fp.status(tmp_path / "three" / "c").leaves == ("b", "d")
