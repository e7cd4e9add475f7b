"""Boxes and chunks: a grid that covers each array once, whatever it is saved in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.format.chunks import (
    choose_chunk_shape,
    chunk_keys,
    chunk_numbers,
    chunk_regions,
    covering_box,
)


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    """An array's shape, the shape of a shard that divides it, and how it is to be cut."""
    unit = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    counts = tuple(draw(st.integers(1, 4)) for _ in unit)
    pinned = draw(st.sets(st.integers(0, len(unit) - 1), max_size=1)) if unit else set()
    return {
        "shape": tuple(a * b for a, b in zip(unit, counts, strict=True)),
        "unit": unit,
        "pinned": frozenset(pinned),
        "itemsize": draw(st.sampled_from((1, 2, 4, 8, 16))),
        "target_bytes": draw(st.sampled_from((1, 7, 64, 1000, 10**6))),
    }


@given(grids())
def test_shards_and_slices_are_unions_of_whole_chunks(grid: dict[str, Any]) -> None:
    chunk = choose_chunk_shape(**grid)
    for axis, length in enumerate(chunk):
        assert length >= 1
        if axis in grid["pinned"]:
            assert length == 1
        elif grid["unit"][axis] != grid["shape"][axis]:
            assert grid["unit"][axis] % length == 0


@given(grids())
def test_chunk_of_an_array_on_one_device_is_hardly_larger_than_wanted(grid: dict[str, Any]) -> None:
    chunk = choose_chunk_shape(**{**grid, "shape": grid["unit"]})
    assert math.prod(chunk) * grid["itemsize"] <= max(4 * grid["target_bytes"], grid["itemsize"])


@given(grids(), st.data())
def test_chunks_of_a_box_cover_it_once_and_have_keys_of_their_own(
    grid: dict[str, Any], data: st.DataObject
) -> None:
    shape, chunk = grid["shape"], choose_chunk_shape(**grid)
    low = tuple(data.draw(st.integers(0, size)) for size in shape)
    high = tuple(data.draw(st.integers(a, size)) for a, size in zip(low, shape, strict=True))
    wanted = tuple(b - a for a, b in zip(low, high, strict=True))
    start, box = covering_box(low, wanted, chunk, shape)
    for a, b, at, size, step, whole in zip(low, high, start, box, chunk, shape, strict=True):
        assert at <= a
        assert at + size >= b
        assert at % step == 0
        assert (at + size) % step == 0 or at + size == whole
    seen = np.zeros(box, int)
    for region in chunk_regions(box, chunk):
        seen[region] += 1
    assert (seen == 1).all()
    keys = list(chunk_keys("leaf/", start, box, chunk))
    numbers = list(chunk_numbers(start, box, chunk, shape))
    assert len(keys) == len(numbers) == len(list(chunk_regions(box, chunk)))
    assert len(set(keys)) == len(set(numbers)) == len(keys)
    everything = list(chunk_keys("leaf/", (0,) * len(shape), shape, chunk))
    assert [everything[number] for number in numbers] == keys
