"""Pieces of a leaf that are cut along some of its axes: `Slice`, and its boxes."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_partial.format.chunks import Shape


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a leaf, such as one layer of a stacked `[layers, ...]`: to be saved, or to be loaded.

    On disk, and when loaded as a whole, the leaf is one ordinary array. Where it is cut along
    several axes, `start`, `size` and `axis` are tuples, an item for each: `Slice(x, (2, 0), (4, 3),
    (0, 1))` is stage 0 of repeat 2 of a `[repeats=4, stages=3, ...]`. All pieces of a leaf that
    are saved are cut along the same axes. In the target of a `load`, `value` says as what to load
    these rows, which are what is returned in its place, and no others are read; they may be
    cut along any axes.

    Attributes:
      value: `jax.Array` or `np.ndarray`, in a target `jax.ShapeDtypeStruct` too; holds rows
        `start : start + value.shape[axis]`.
      start: First row that `value` holds.
      size: Number of rows of the whole leaf.
      axis: The axis that is cut; negative counts from the end.
      sharding: That of the whole leaf, where `value` was cut out of its shards: Orbax restores the
        leaf as it was. None if it has none, and `value`'s own is as good.
    """

    value: Any
    start: int | tuple[int, ...]
    size: int | tuple[int, ...]
    axis: int | tuple[int, ...] = 0
    sharding: Any = None


class Rows(NamedTuple):
    """Where a piece lies along an axis that is cut.

    Attributes:
      start: Its first row.
      size: How many rows the whole leaf has.
    """

    start: int
    size: int


class SliceError(ValueError):
    """An invalid `Slice`.

    Attributes:
      what: What it is.
      way_out: What to do.
    """

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(what, way_out)
        self.what, self.way_out = what, way_out


def rows_of(cut: Slice, shape: Shape, rank: int) -> dict[int, Rows]:
    """Returns where the rows of a slice lie along each axis that is cut.

    Args:
      cut: The slice.
      shape: Shape of its piece as it is stored: a key's data has more axes than the key.
      rank: Number of the piece's axes, which are the first ones of `shape`.

    Raises:
      SliceError: It is invalid.
    """
    rows = _rows_given(cut, rank)
    if not rows:
        raise SliceError(
            f"is a Slice with start={cut.start!r}, size={cut.size!r}, axis={cut.axis!r} of an "
            f"array of shape {shape}",
            "start and size are integers, and axis is one of the array's; or all three are tuples "
            "of the same length, of different axes.",
        )
    for axis, (start, size) in rows.items():
        if start < 0 or start + shape[axis] > size or not shape[axis]:
            raise SliceError(
                f"is a Slice of rows {start} to {start + shape[axis]} of {size} along axis {axis}",
                "Give at least one row, all of them inside the leaf.",
            )
    return rows


def _rows_given(cut: Slice, rank: int) -> dict[int, Rows]:
    """Returns start and size of a slice by axis; nothing if it is invalid."""
    try:
        starts, sizes, given = map(_integers, (cut.start, cut.size, cut.axis))
        axes = [range(rank)[axis] for axis in given]
    except (TypeError, IndexError):
        return {}
    if not len(set(axes)) == len(axes) == len(starts) == len(sizes):
        return {}
    return dict(zip(axes, map(Rows, starts, sizes), strict=True))


def _integers(given: int | tuple[int, ...]) -> list[int]:
    return [*map(operator.index, given if isinstance(given, tuple) else (given,))]


def whole_shape(shape: Shape, rows: Mapping[int, Rows]) -> Shape:
    """Shape of the leaf of which a piece of that shape has these rows."""
    if not rows:
        return shape
    return tuple(rows[axis].size if axis in rows else size for axis, size in enumerate(shape))


def moved(start: Shape, rows: Mapping[int, Rows]) -> Shape:
    """Where a box of a piece, which begins there in it, begins in the whole leaf."""
    if not rows:
        return start
    return tuple(at + rows[axis].start if axis in rows else at for axis, at in enumerate(start))
