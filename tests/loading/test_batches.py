"""Batches cover every element once, stay within their size, and never cut a chunk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.format.model import NONE, NUMPY_ARRAY, Leaf
from flax_partial.loading.batches import MOST_AT_ONCE, batches, region_bytes


def leaf(name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str = "float32") -> Leaf:
    return Leaf((name,), "d", NUMPY_ARRAY, dtype=dtype, shape=shape, chunk=chunk)


def cut_up(found: list[Leaf], **how: Any) -> list[list[Any]]:
    seen: list[tuple[int, int]] = []
    made = list(batches(found, progress=lambda *amounts: seen.append(amounts), **how))
    sizes = [sum(map(region_bytes, batch)) for batch in made]
    assert seen == [(sum(sizes[: at + 1]), sum(sizes)) for at in range(len(sizes))]
    return made


@st.composite
def leaves(draw: st.DrawFn) -> list[Leaf]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
        chunk = tuple(draw(st.integers(1, max(size, 1))) for size in shape)
        found.append(leaf(str(number), shape, chunk))
    return found


@given(leaves(), st.sampled_from((1, 16, 64, 1000)))
def test_every_element_is_in_one_batch(found: list[Leaf], most_bytes: int) -> None:
    seen = {one.name: np.zeros(one.shape, int) for one in found}
    order = []
    for batch in cut_up(found, most_bytes=most_bytes):
        assert batch
        for one, start, shape in batch:
            order.append(one.name)
            seen[one.name][tuple(slice(a, a + b) for a, b in zip(start, shape, strict=True))] += 1
            for at, size, whole, step in zip(start, shape, one.shape, one.chunk, strict=True):
                assert at % step == 0
                assert at + size == whole or size % step == 0
    assert all((counts == 1).all() for counts in seen.values())
    assert order == sorted(order)


@given(leaves(), st.sampled_from((1, 16, 64, 1000)))
def test_batch_is_larger_than_asked_for_only_where_one_chunk_is(
    found: list[Leaf], most_bytes: int
) -> None:
    for batch in cut_up(found, most_bytes=most_bytes):
        chunks = [math.prod(one.chunk) * one.numpy_dtype.itemsize for one, _, _ in batch]
        assert sum(map(region_bytes, batch)) <= most_bytes or len(chunks) == 1
        assert sum(map(region_bytes, batch)) <= max(most_bytes, *chunks, 0)


@pytest.mark.parametrize(
    ("shape", "chunk", "sizes"),
    [
        ((100, 2), (10, 2), [(60, 2), (40, 2)]),  # slabs of whole rows
        ((4, 100), (2, 10), [(2, 60), (2, 40)] * 2),  # long runs, where whole rows do not fit
        ((2, 1000), (2, 1000), [(2, 1000)]),  # one chunk, larger than a batch
    ],
)
def test_large_leaf_is_cut_along_its_first_axes(shape: Any, chunk: Any, sizes: list[Any]) -> None:
    found = cut_up([leaf("a", shape, chunk)], most_bytes=480)
    assert [box for batch in found for _, _, box in batch] == sizes


def test_batch_holds_some_thousand_leaves_however_small() -> None:
    found = [leaf(str(number), (1,), (1,)) for number in range(2 * MOST_AT_ONCE + 1)]
    sizes = [len(batch) for batch in cut_up(found, most_bytes=1 << 40)]
    assert sizes == [MOST_AT_ONCE, MOST_AT_ONCE, 1]


def test_leaves_without_data_are_left_out() -> None:
    assert not cut_up([Leaf(("a",), "d", NONE)], most_bytes=1)


def test_leaves_that_are_not_to_be_cut_stay_whole() -> None:
    sizes = [(100,), (4,), (4,), (4,)]
    found = [leaf(str(number), shape, (2,)) for number, shape in enumerate(sizes)]
    boxes = [[box for _, _, box in batch] for batch in cut_up(found, most_bytes=40, cut=False)]
    assert boxes == [[(100,)], [(4,), (4,)], [(4,)]]
