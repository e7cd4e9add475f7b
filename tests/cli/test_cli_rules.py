"""What the command line computes without files: differences, layouts, trees, columns, text."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.cli import safetensors, selection, text
from flax_partial.cli.commands.diff.difference import Difference
from flax_partial.cli.commands.show import tree
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Column, Row, Table, printable
from flax_partial.format.model import DICT, NONE, NUMPY_ARRAY, STRING, Leaf

if TYPE_CHECKING:
    from collections.abc import Callable


# --- by how much two arrays differ


def difference(a: Any, b: Any) -> Difference:
    found = Difference()
    found.add(np.ascontiguousarray(a), np.ascontiguousarray(b))
    return found


@given(
    st.sampled_from(trees.DTYPES),
    st.sampled_from(((), (1,), (5,), (0, 3), (3, 700), (1 << 18,), ((1 << 18) + 3,))),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_difference_is_that_of_exact_arithmetic(
    dtype: str, shape: Any, seed: int, rate: float
) -> None:
    a = trees.random_bits(dtype, shape, seed)
    is_changed = np.random.default_rng(seed).random(shape) < rate
    b = np.where(is_changed, trees.random_bits(dtype, shape, seed + 1), a).astype(a.dtype)
    found = difference(a, b)
    size = a.dtype.itemsize
    bits_a, bits_b = (x.reshape(-1).view(np.uint8).reshape(-1, size) for x in (a, b))
    where = (bits_a != bits_b).any(axis=1)
    assert (found.elements, found.different) == (a.size, int(where.sum()))
    wide = complex if dtype.startswith("complex") else object if "int" in dtype else float
    with np.errstate(all="ignore"):
        distances = np.abs(
            a.reshape(-1)[where].astype(wide) - b.reshape(-1)[where].astype(wide)
        ).astype(float)
    finite = distances[np.isfinite(distances)]
    assert found.not_finite == distances.size - finite.size
    assert found.largest == pytest.approx(finite.max(initial=0.0), rel=1e-15)


def test_relative_difference_is_that_of_l2_norms() -> None:
    a = np.array([3.0, 4.0, np.inf, np.nan])
    b = np.array([3.0, 3.0, np.inf, np.nan])
    found = difference(a, b)
    assert found.relative == pytest.approx(1 / 5)
    assert (found.different, found.not_finite) == (1, 0)  # a NaN is itself
    assert difference([0.0], [1.0]).relative is None
    assert difference([1e300], [2e300]).relative is None  # its square is no number


@pytest.mark.parametrize(
    ("a", "b", "different", "largest"),
    [
        ([-(2**63)], [2**63 - 1], 1, 2.0**64),  # exactly, as integers
        ([2**63 - 1], [-(2**63)], 1, 2.0**64),
        (np.array([0], np.uint64), np.array([2**64 - 1], np.uint64), 1, 2.0**64),
        (np.array([1, np.nan], np.float32), [1, np.nan], 0, 0.0),  # by value: other dtypes
        (np.array([1, 2, 3, np.nan], np.float32), [1, 2, 5, np.nan], 1, 2.0),
        ([1, 2], [1.0, 2.5], 1, 0.5),
        ([1 + 1j], [1.0], 1, 1.0),
    ],
)
def test_numbers_of_any_dtype_are_subtracted(
    a: Any, b: Any, different: int, largest: float
) -> None:
    found = difference(a, b)
    assert (found.different, found.largest) == (different, largest)


# --- the layout of a safetensors file


def leaf(name: str, shape: tuple[int, ...] = (), dtype: str = "float32", kind: str = "") -> Leaf:
    keys = tuple(name.split("."))
    chunk = tuple(max(size, 1) for size in shape)
    if kind:
        return Leaf(keys, "d" * len(keys), kind, text="text" if kind == STRING else "")
    return Leaf(keys, "d" * len(keys), NUMPY_ARRAY, dtype=dtype, shape=shape, chunk=chunk)


def test_every_tensor_is_aligned_and_there_is_no_gap() -> None:
    shapes = [((3,), "int8"), ((5,), "float64"), ((), "bool"), ((7,), "bfloat16"), ((0,), "int32")]
    arrays = safetensors.ordered(leaf(str(i), *one) for i, one in enumerate(shapes))
    layout = safetensors.lay_out(arrays, {"format": "flax"})
    assert len(layout.header) % 8 == 0
    assert int.from_bytes(layout.header[:8], "little") == len(layout.header) - 8
    table = json.loads(layout.header[8:])
    assert table.pop("__metadata__") == {"format": "flax"}
    end = 0
    for one in arrays:
        begin, stop = table[one.name]["data_offsets"]
        assert begin == end
        assert layout.offsets[one.name] == begin + len(layout.header)
        assert layout.offsets[one.name] % one.numpy_dtype.itemsize == 0
        end = stop
    assert layout.bytes == len(layout.header) + end


@given(st.data())
def test_runs_put_a_box_where_it_belongs(data: st.DataObject) -> None:
    whole = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in whole)
    shape = tuple(
        data.draw(st.integers(0, size - at)) for size, at in zip(whole, start, strict=True)
    )
    box = np.arange(1, math.prod(shape) + 1).reshape(shape)
    target = np.zeros(math.prod(whole), int)
    runs = list(safetensors.runs(whole, start, shape))
    for at, index in runs:
        piece = box[index].reshape(-1)
        target[at : at + piece.size] = piece
    expected = np.zeros(whole, int)
    expected[tuple(slice(a, a + b) for a, b in zip(start, shape, strict=True))] = box
    assert np.array_equal(target.reshape(whole), expected)
    if shape == whole:
        assert len(runs) == 1


@pytest.mark.parametrize("dtype", sorted(safetensors.WIDER))
def test_a_wider_dtype_holds_every_value(dtype: str) -> None:
    every = trees.random_bits(dtype, (5000,), 0)
    wide = every.astype(safetensors.stored_dtype(leaf("a", (5000,), dtype)))
    assert len(np.unique(every.view(np.uint8))) >= 4
    assert np.array_equal(wide.astype(float), every.astype(float), equal_nan=True)


def test_what_the_format_cannot_hold_is_named() -> None:
    problems = safetensors.problems([leaf("a"), leaf("b", (), "complex128"), leaf("__metadata__")])
    assert [problem.split()[0] for problem in problems] == ["'b'", "'__metadata__'"]
    with pytest.raises(ValueError, match="header"):
        safetensors.lay_out([], {"a": "x" * 100_000_001})


# --- which leaves


LEAVES = [leaf("params.0.w"), leaf("params.0.b"), leaf("params.10.w"), leaf("step"), leaf("[a]*")]


@pytest.mark.parametrize(
    ("only", "skip", "names"),
    [
        ([], [], "params.0.w params.0.b params.10.w step [a]*"),
        (["params"], [], "params.0.w params.0.b params.10.w"),
        (["params.0"], [], "params.0.w params.0.b"),
        (["*.w"], [], "params.0.w params.10.w"),
        (["params.?"], [], "params.0.w params.0.b"),
        (["step", "*.b"], [], "params.0.b step"),
        ([], ["params"], "step [a]*"),
        (["params"], ["*.b"], "params.0.w params.10.w"),
        (["[a]*"], [], "[a]*"),  # as it stands
        (["param"], [], ""),
        ([], ["x"], ""),
        (["step"], ["s*"], ""),
    ],
)
def test_patterns_choose_leaves_and_subtrees(only: Any, skip: Any, names: str) -> None:
    with pytest.raises(WrongUseError) if not names else nullcontext():
        assert [one.name for one in selection.chosen(LEAVES, only, skip)] == names.split()


# --- the tree


def test_tree_is_drawn_with_its_sums_and_cut_at_a_depth() -> None:
    root = tree.build([leaf("a.b.c", (2,)), leaf("a.b.d", (4,), "int8"), leaf("a.e"), leaf("f")])
    assert (root.leaves, root.bytes) == (4, 20)
    drawn = [before + key for before, key, _ in tree.lines(root)]
    assert drawn == ["├── a", "│   ├── b", "│   │   ├── c", "│   │   └── d", "│   └── e", "└── f"]
    shallow = {before + key: node for before, key, node in tree.lines(root, 2)}
    assert list(shallow) == ["├── a", "│   ├── b", "│   └── e", "└── f"]
    b = shallow["│   ├── b"]
    assert (b.bytes, b.dtypes) == (12, {"float32", "int8"})


# --- columns


COLUMNS = (
    Column("NAME"),
    Column("SIZE", is_number=True, dispensable=1),
    Column("X", dispensable=2),
)
TABLE = Table(COLUMNS, [Row(("層", "1", "x")), Row(("abc", "234", ""))])


def test_columns_that_hold_anything_are_as_wide_as_a_terminal_draws_them() -> None:
    assert list(TABLE.lines()) == ["NAME  SIZE  X", "層       1  x", "abc    234"]
    without_empty = Table(COLUMNS, [Row(("a", "", "b"))])
    assert list(without_empty.lines()) == ["NAME  X", "a     b"]


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(13, []), (12, ["X"]), (10, ["X"]), (9, ["SIZE", "X"]), (3, ["SIZE", "X"])],
)
def test_where_there_is_no_room_the_least_needed_columns_go_first(
    width: int, left_out: list[str]
) -> None:
    drawn, titles = TABLE.drawn(width)
    assert titles == left_out
    assert len(drawn.columns) == 3 - len(left_out)


REPEATING = Table(
    (
        Column("NAME"),
        Column("STEP", is_number=True, dispensable=1),
        Column("STATE"),
        Column("SIZE", dispensable=2),
    ),
    [Row(("10", "10", "fine", "2 B")), Row(("11.new", "11", "fine", "30 B"))],
)


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (25, []),
        (24, ["STEP"]),
        (18, ["STEP", "STATE (fine in each row)"]),
        (11, ["STEP", "STATE (fine in each row)", "SIZE"]),
    ],
)
def test_what_repeats_goes_before_what_is_less_needed(width: int, left_out: list[str]) -> None:
    assert REPEATING.drawn(width)[1] == left_out


# --- text


NAMED = {"shape": [4, 2], "axis_names": ["data", "model"]}
SHORT: list[tuple[Callable[[Any], str], list[tuple[Any, str]]]] = [
    (text.size, [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (102_400, "100 KiB")]),
    (text.size, [(1024**2 - 1, "1.0 MiB"), (1024**5 * 3000, "3000 PiB")]),
    (text.age, [(-5, "now"), (59.9, "59 s ago"), (3600, "1 h ago"), (200_000, "2 d ago")]),
    (text.sharding, [(None, ""), ({**NAMED, "partition_spec": ["data", None]}, "(data=4,-)")]),
    (text.sharding, [({**NAMED, "partition_spec": [["data", "model"]]}, "(data=4+model=2)")]),
    (text.sharding, [({**NAMED, "partition_spec": []}, "replicated x8")]),
    (text.sharding, [({"sharding_type": "Single", "device_str": "cpu:0"}, "cpu:0")]),
    (text.sharding, [({"sharding_type": "Named", "partition_spec": 3}, "Named")]),
    (text.sharding, [({**NAMED, "partition_spec": ["other"]}, "?")]),
    (text.common_prefix, [(["a.b"], "a.b"), (["a.b", "a.c"], "a.*")]),
    (text.common_prefix, [(["a.b", "a.b2"], "a.*"), (["a", "b"], "*")]),
]


@pytest.mark.parametrize(("described", "cases"), SHORT)
def test_text_is_short(described: Callable[[Any], str], cases: list[tuple[Any, str]]) -> None:
    assert [(value, described(value)) for value, _ in cases] == cases


def test_nothing_that_a_checkpoint_holds_moves_the_cursor() -> None:
    assert printable("a\x1b[2J\nb\x9b") == "a\\x1b[2J\\nb\\x9b"
    cells = Table(COLUMNS, [Row(("a\x1bb", "\n", "ä 層"))]).rows[0].cells
    assert cells == ["a\\x1bb", "\\n", "ä 層"]
    assert text.leaf(leaf("s", kind=STRING)) == "'text'"
    assert [text.leaf(leaf("n", kind=kind)) for kind in (NONE, DICT)] == ["None", "{}"]
