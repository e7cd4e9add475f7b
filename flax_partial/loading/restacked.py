"""Leaves that the target stacks otherwise than the checkpoint: what is read for them. Pure.

The layers of a model are numbered, row-major over the axes along which a leaf stacks them, so that
any two ways to stack them mean the same layer 7. What a device needs of a stacked leaf is looked
up layer by layer, and read in as few boxes as that takes: no leaf is assembled.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flax_partial.format.chunks import Shape, covering_box
from flax_partial.format.model import Leaf, Region
from flax_partial.loading.data_reader import aligned_empty
from flax_partial.loading.target import BoxRange, Placement


class Reading(NamedTuple):
    """What to read for one leaf of the target, and what to make of it.

    Attributes:
      regions: Boxes of leaves.
      build: Makes the value, as `Placement.build` does, of the data of these boxes.
    """

    regions: Sequence[Region]
    build: Callable[[Sequence[np.ndarray]], Any]


def as_placed(placement: Placement) -> Reading:
    """Reads a leaf that is stored as it is wanted."""
    leaf, boxes, build = placement
    return Reading([(leaf, *box) for box in boxes], lambda data: build(leaf, data))


@dataclass(frozen=True, slots=True)
class Stored:
    """A leaf of the target that is stored as it is wanted.

    Attributes:
      leaf: The leaf.
    """

    leaf: Leaf

    @property
    def names(self) -> Sequence[str]:
        """Names of the leaves that are read."""
        return (self.leaf.name,)

    def reading(self, placement: Placement) -> Reading:
        """Reads what a placement of `leaf` needs."""
        return as_placed(placement)


class Restacked:
    """A leaf as the target stacks it, whose layers are stored otherwise.

    Attributes:
      leaf: The leaf as if it was stored so.
      stored: What there is instead.
    """

    def __init__(
        self,
        leaf: Leaf,
        stored: Sequence[Leaf],
        *,
        axes: tuple[Shape, Shape],
        numbers: tuple[int, int],
    ) -> None:
        """Takes what is known of the two.

        Args:
          leaf: The leaf as it is wanted.
          stored: The leaves that hold its layers, by their numbers.
          axes: Those that stack layers, in `leaf` and in each of `stored`.
          numbers: Which leaf `leaf` is, of how many.
        """
        self.leaf = leaf
        self.stored = stored
        self._axes, self._stored_axes = axes
        self._number, self._count = numbers
        self._sizes = [leaf.shape[axis] for axis in self._axes]
        self._stored_sizes = [stored[0].shape[axis] for axis in self._stored_axes]
        self._others = [axis for axis in range(len(leaf.shape)) if axis not in self._axes]

    @property
    def names(self) -> Sequence[str]:
        """Names of the leaves that are read."""
        return [leaf.name for leaf in self.stored]

    def reading(self, placement: Placement) -> Reading:
        """Reads what a placement of `leaf` needs."""
        gathers = [_Gather(self, *box) for box in placement.boxes]

        def build(data: Sequence[np.ndarray]) -> Any:
            rest = iter(data)
            boxes = [one.assembled([next(rest) for _ in one.regions]) for one in gathers]
            return placement.build(placement.leaf, boxes)

        return Reading([region for one in gathers for region in one.regions], build)

    def rows_in(self, start: Shape, shape: Shape) -> Iterator[tuple[Shape, int, Shape]]:
        """Yields each layer of a box: where it is in the box, in which stored leaf, and there."""
        ranges = [range(shape[axis]) for axis in self._axes]
        for index in itertools.product(*ranges):
            layer = 0
            for at, axis, size in zip(index, self._axes, self._sizes, strict=True):
                layer = layer * size + start[axis] + at
            layer = layer * self._count + self._number
            place, leaf = divmod(layer, len(self.stored))
            yield index, leaf, _unraveled(place, self._stored_sizes)

    def stored_box(self, start: Shape, shape: Shape, rows: BoxRange) -> BoxRange:
        """The box of a stored leaf that has these rows, of what a box of the wanted one holds."""
        at, size = ([0] * len(self.stored[0].shape) for _ in range(2))
        for axis, first, length in zip(self._stored_axes, *rows, strict=True):
            at[axis], size[axis] = first, length
        others = (axis for axis in range(len(at)) if axis not in self._stored_axes)
        for axis, other in zip(others, self._others, strict=True):
            at[axis], size[axis] = start[other], shape[other]
        return tuple(at), tuple(size)

    def layers_first(self, array: np.ndarray) -> np.ndarray:
        """A view of a box of the wanted leaf."""
        return np.moveaxis(array, self._axes, range(len(self._axes)))

    def stored_layers_first(self, array: np.ndarray) -> np.ndarray:
        """A view of a box of a stored leaf."""
        return np.moveaxis(array, self._stored_axes, range(len(self._stored_axes)))


Source = Stored | Restacked
"""What a leaf of the target is loaded from."""


class _Gather:
    """One box of a restacked leaf: what to read for it.

    Attributes:
      regions: Boxes of stored leaves.
    """

    def __init__(self, view: Restacked, start: Shape, shape: Shape) -> None:
        self._view, self._shape = view, shape
        by_leaf: dict[int, dict[Shape, Shape]] = {}
        for index, leaf, row in view.rows_in(start, shape):
            by_leaf.setdefault(leaf, {})[row] = index
        self.regions: list[Region] = []
        self._rows: list[tuple[Shape, dict[Shape, Shape]]] = []  # of each region: where it begins
        for leaf, rows in by_leaf.items():
            stored = view.stored[leaf]
            boxes = [(box, view.stored_box(start, shape, box)) for box in _boxes_of(sorted(rows))]
            around = _box_around(rows)
            whole = view.stored_box(start, shape, around)
            if len(boxes) > 1 and _cost(stored, [whole]) <= _cost(
                stored, [box for _, box in boxes]
            ):
                boxes = [(around, whole)]  # they lie in the same chunks, which are read anyhow
            for (first, size), box in boxes:
                inside = (range(at, at + length) for at, length in zip(first, size, strict=True))
                wanted = {row: rows[row] for row in itertools.product(*inside) if row in rows}
                self._rows.append((first, wanted))
                self.regions.append((stored, *box))

    def assembled(self, data: Sequence[np.ndarray]) -> np.ndarray:
        """Puts the rows that were read where they are wanted."""
        array = aligned_empty(self._shape, self._view.leaf.numpy_dtype)
        layers = self._view.layers_first(array)
        for box, (first, rows) in zip(data, self._rows, strict=True):
            stored = self._view.stored_layers_first(box)
            for row, index in rows.items():
                layers[index] = stored[tuple(a - b for a, b in zip(row, first, strict=True))]
        return array


def _unraveled(number: int, sizes: Sequence[int]) -> Shape:
    index = []
    for size in reversed(sizes):
        number, at = divmod(number, size)
        index.append(at)
    return tuple(reversed(index))


def _boxes_of(rows: Sequence[Shape]) -> list[BoxRange]:
    """Cuts ascending indices into boxes, each its start and shape."""
    if not rows[0]:
        return [((), ())]
    boxes: list[BoxRange] = []
    before: tuple[int, list[BoxRange]] = (-2, [])
    for at, group in itertools.groupby(rows, lambda row: row[0]):
        inner = _boxes_of([row[1:] for row in group])
        if before == (at - 1, inner):
            last = boxes[-len(inner) :]
            boxes[-len(inner) :] = [(start, (shape[0] + 1, *shape[1:])) for start, shape in last]
        else:
            boxes += [((at, *start), (1, *shape)) for start, shape in inner]
        before = (at, inner)
    return boxes


def _box_around(rows: Iterable[Shape]) -> BoxRange:
    axes = [*zip(*rows, strict=True)]
    return tuple(map(min, axes)), tuple(max(axis) - min(axis) + 1 for axis in axes)


def _cost(leaf: Leaf, boxes: Iterable[BoxRange]) -> int:
    """How many elements are read for some boxes: whole chunks."""
    covering = (covering_box(*box, leaf.chunk, leaf.shape) for box in boxes)
    return sum(math.prod(shape) for _, shape in covering)
