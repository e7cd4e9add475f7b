"""Parts of several processes -> one plan, or every problem at once. No disk."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flax_partial.format.merge import merge
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import NUMPY_ARRAY, SCALAR, STRING, Box, Leaf, Part

ROWS = 4


def rows(start: int, stop: int, *, content: str = "x", **changes: Any) -> Leaf:
    """Rows of an array of four, each row a chunk with the digest `content` + its number."""
    digests = tuple(f"{content}{row}" for row in range(start, stop))
    places = tuple((16 * row, 16) for row in range(stop - start))
    leaf = Leaf(
        ("w",),
        "d",
        NUMPY_ARRAY,
        dtype="int64",
        shape=(ROWS, 2),
        chunk=(1, 2),
        boxes=(Box((start, 0), (stop - start, 2), digests, places),),
    )
    return replace(leaf, **changes)


def text(value: str, *keys: str, **changes: Any) -> Leaf:
    leaf = Leaf(keys or ("s",), "d" * max(len(keys), 1), STRING, text=value)
    return replace(leaf, **changes)


def parts(*leaves: Leaf) -> dict[str, Part]:
    """Each leaf saved by a process of its own, one after another."""
    return {
        f"part.{index}": Part(index, 100 + index, {"by": index}, (leaf,), 0)
        for index, leaf in enumerate(leaves)
    }


FITTING = {
    "one after another": ([rows(0, 2), rows(2, 4)], ["x0", "x1", "x2", "x3"]),
    "from files that are shared": (
        [rows(0, 2, file=3), rows(2, 4), rows(0, 1, file=1)],
        ["x0", "x1", "x2", "x3"],
    ),
    "in any order": ([rows(3, 4), rows(0, 1), rows(1, 3)], ["x0", "x1", "x2", "x3"]),
    "replicas agree": ([rows(0, 4), rows(0, 4)], ["x0", "x1", "x2", "x3"]),
    "replicas of rows": ([rows(0, 3), rows(1, 4)], ["x0", "x1", "x2", "x3"]),
    "replaced": ([rows(0, 4), rows(0, 4, content="y", generation=1)], ["y0", "y1", "y2", "y3"]),
    "replaced first": (
        [rows(0, 4, content="y", generation=1), rows(0, 4)],
        ["y0", "y1", "y2", "y3"],
    ),
    "replaced by pieces": (
        [rows(0, 4), rows(2, 4, content="y", generation=3), rows(0, 2, content="y", generation=3)],
        ["y0", "y1", "y2", "y3"],
    ),
}


@pytest.mark.parametrize("case", FITTING)
def test_parts_that_fit_make_one_whole_leaf(case: str) -> None:
    leaves, digests = FITTING[case]
    plan = merge(parts(*leaves))
    assert not plan.conflicts
    assert not plan.missing
    (leaf,) = plan.leaves
    assert leaf.boxes == (Box((0, 0), (ROWS, 2), tuple(digests)),)
    (sources,) = plan.sources
    found = [(name, place) for name, places in sources for place in places]
    assert len(found) == ROWS  # each chunk once
    for digest, (name, place) in zip(digests, found, strict=True):
        part = name.split("/")[0]
        held = leaves[int(part[-1])]
        assert name == (f"{part}/data.{held.file}" if held.file else part)
        (box,) = held.boxes
        assert box.digests[box.places.index(place)] == digest


CONFLICTING = {
    "other content": [rows(0, 4), rows(0, 4, content="y")],
    "one row of other content": [rows(0, 2), rows(1, 4, content="y")],
    "no digests to compare": [
        rows(0, 4, boxes=(Box((0, 0), (ROWS, 2), places=((0, 16),) * ROWS),)),
        rows(0, 4, boxes=(Box((0, 0), (ROWS, 2), places=((0, 16),) * ROWS),)),
    ],
    "other shape": [rows(0, 4), rows(0, 4, shape=(5, 2))],
    "other dtype": [rows(0, 4), rows(0, 4, dtype="int32")],
    "other chunks": [rows(0, 4), rows(0, 4, chunk=(2, 2))],
    "other kind": [rows(0, 4), text("x", "w")],
    "other text": [text("x"), text("y")],
    "inside a leaf": [text("x", "s"), text("y", "s", "inner")],
    "over a subtree": [text("y", "s", "inner"), text("x", "s")],
    "one name": [text("x", "a.b"), text("y", "a", "b")],
    "list and dict": [
        Leaf(("l", "0"), "ds", SCALAR, dtype="int64", boxes=(Box((), ()),)),
        text("x", "l", "k"),
    ],
    "list with a gap": [
        Leaf(("l", "1"), "ds", SCALAR, dtype="int64", boxes=(Box((), ()),)),
    ],
}


@pytest.mark.parametrize("case", CONFLICTING)
def test_parts_that_do_not_fit_are_a_conflict(case: str) -> None:
    assert merge(parts(*CONFLICTING[case])).conflicts
    assert merge(parts(*reversed(CONFLICTING[case]))).conflicts


def test_replacement_settles_a_conflict() -> None:
    leaves = [rows(0, 4), rows(0, 4, content="y"), rows(0, 4, content="z", generation=1)]
    assert not merge(parts(*leaves)).conflicts


def test_equal_small_leaves_of_many_processes_are_one() -> None:
    plan = merge(parts(text("same"), text("same"), text("same")))
    assert not plan.conflicts
    assert [leaf.text for leaf in plan.leaves] == ["same"]


def test_all_that_is_wrong_is_told_at_once() -> None:
    leaves = [rows(0, 4), rows(0, 4, content="y"), text("x"), text("y"), text("z", "s", "in")]
    told = "\n".join(merge(parts(*leaves)).conflicts)
    assert "'w'" in told
    assert "'s'" in told


@given(st.sets(st.integers(0, ROWS - 1), min_size=1))
def test_leaf_is_complete_when_its_rows_tile_it(held: set[int]) -> None:
    plan = merge(parts(*[rows(row, row + 1) for row in held]))
    assert not plan.conflicts
    assert bool(plan.missing) == (len(held) < ROWS)
    assert not plan.missing or "w" in plan.missing[0]


_json = st.recursive(
    st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)
_dictionaries = st.dictionaries(st.sampled_from("abc"), _json, max_size=3)


@given(_dictionaries, _dictionaries, _dictionaries)
def test_metadata_merges_in_any_grouping_and_leaves_its_input_alone(
    one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]
) -> None:
    def paths(value: Any, *at: str) -> dict[tuple[str, ...], Any]:
        if not isinstance(value, dict):
            return {at: value}
        return {k: v for key, item in value.items() for k, v in paths(item, *at, key).items()}

    before = repr((one, two, three))
    merged = merge_metadata([one, two, three])
    assert repr((one, two, three)) == before
    assert merge_metadata([one, {}]) == one
    later = paths(three)
    assert later.items() <= paths(merged).items()  # the later value wins
    assert merge_metadata([merged, three]) == merged
