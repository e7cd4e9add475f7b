"""Leaves that the target stacks otherwise than the checkpoint: what is read for them. Pure.

The layers of a model are numbered, row-major over the axes along which a leaf stacks them, so that
any two ways to stack them mean the same layer 7. What a device needs of a stacked leaf is looked
up layer by layer, and read in as few boxes as that takes: no leaf is assembled.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_partial.format.chunks import Shape, covering_box
from flax_partial.format.model import Leaf, Region
from flax_partial.loading.host_memory import aligned_empty
from flax_partial.loading.target import BoxRange, Reading


class Source(NamedTuple):
    """What a leaf of the target is loaded from: a leaf like it, or those that hold its layers.

    Attributes:
      leaf: The leaf as if it was stored as the target has it.
      stored: What there is: `leaf` alone, or leaves by the numbers in their names.
      axes: Those of `leaf` that stack layers.
      stored_axes: Those of each of `stored`.
      place: Which leaf of the target it is, of how many that the layers are spread over.
    """

    leaf: Leaf
    stored: Sequence[Leaf]
    axes: Shape = ()
    stored_axes: Shape = ()
    place: tuple[int, int] = (0, 1)

    def reading(self, wanted: Reading) -> Reading:
        """Reads what is needed for a reading of `leaf`."""
        if self.stored[0] is self.leaf:
            return wanted
        boxes = [self._box(start, shape) for _, start, shape in wanted.regions]

        def build(data: Sequence[np.ndarray]) -> Any:
            rest = iter(data)
            return wanted.build([box.build([next(rest) for _ in box.regions]) for box in boxes])

        return Reading([region for box in boxes for region in box.regions], build)

    def _box(self, start: Shape, shape: Shape) -> Reading:
        """Reads one box of `leaf`."""
        by_leaf: dict[int, dict[Shape, Shape]] = {}
        for index, number, row in self._rows_in(start, shape):
            by_leaf.setdefault(number, {})[row] = index
        regions: list[Region] = []
        rows_of: list[tuple[Shape, dict[Shape, Shape]]] = []  # of each region: where it begins
        for number, rows in by_leaf.items():
            leaf = self.stored[number]
            boxes = [(box, self._stored_box(start, shape, box)) for box in _boxes_of(sorted(rows))]
            around = _box_around(rows)
            whole = self._stored_box(start, shape, around)
            if len(boxes) > 1 and _cost(leaf, [whole]) <= _cost(leaf, [box for _, box in boxes]):
                boxes = [(around, whole)]  # they lie in the same chunks, which are read anyhow
            for (first, size), box in boxes:
                inside = (range(at, at + length) for at, length in zip(first, size, strict=True))
                wanted = {row: rows[row] for row in itertools.product(*inside) if row in rows}
                rows_of.append((first, wanted))
                regions.append((leaf, *box))

        def build(data: Sequence[np.ndarray]) -> np.ndarray:
            array = aligned_empty(shape, self.leaf.numpy_dtype)
            layers = _first(self.axes, array)
            for box, (first, rows) in zip(data, rows_of, strict=True):
                stored = _first(self.stored_axes, box)
                for row, index in rows.items():
                    layers[index] = stored[tuple(a - b for a, b in zip(row, first, strict=True))]
            return array

        return Reading(regions, build)

    def _rows_in(self, start: Shape, shape: Shape) -> Iterator[tuple[Shape, int, Shape]]:
        """Yields each layer of a box: where it is in the box, in which stored leaf, and there."""
        number, count = self.place
        stored_sizes = [self.stored[0].shape[axis] for axis in self.stored_axes]
        for index in itertools.product(*(range(shape[axis]) for axis in self.axes)):
            layer = 0
            for at, axis in zip(index, self.axes, strict=True):
                layer = layer * self.leaf.shape[axis] + start[axis] + at
            place, leaf = divmod(layer * count + number, len(self.stored))
            yield index, leaf, tuple(map(int, np.unravel_index(place, stored_sizes)))

    def _stored_box(self, start: Shape, shape: Shape, rows: BoxRange) -> BoxRange:
        """The box of a stored leaf that has these rows, of what a box of the wanted one holds."""
        others = (axis for axis in range(len(shape)) if axis not in self.axes)
        given = dict(zip(self.stored_axes, zip(*rows, strict=True), strict=True))
        for axis in range(len(self.stored[0].shape)):
            if axis not in self.stored_axes:
                other = next(others)
                given[axis] = start[other], shape[other]
        ranges = [given[axis] for axis in sorted(given)]
        return tuple(at for at, _ in ranges), tuple(size for _, size in ranges)


def _first(axes: Shape, array: np.ndarray) -> np.ndarray:
    """A view of an array with these axes before all others."""
    return np.moveaxis(array, axes, range(len(axes)))


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
