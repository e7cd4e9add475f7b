"""By how much the values of two arrays differ, taken piece by piece. Pure.

Elements are *different* when their bits are (so that a NaN equals itself, and 0.0 is not -0.0), or,
where dtypes are not the same, when their values are. Integers are subtracted exactly, everything
else in float64.
"""

import math
from dataclasses import dataclass

import numpy as np

_LARGEST_WORD = 8  # bytes that NumPy compares at once
_PIECE = 1 << 18  # elements: what is computed from one lies in the cache of a core


@dataclass(slots=True)
class Difference:
    """How far b is from a, over the elements added so far.

    Attributes:
      elements: Number of elements seen.
      different: Number of those that are not the same.
      largest: Largest absolute difference of finite elements.
      not_finite: Number of different elements whose difference is not a finite number.
      sum_of_squares: Of the finite differences.
      norm_of_squares: Sum of squares of a's finite elements.
    """

    elements: int = 0
    different: int = 0
    largest: float = 0.0
    not_finite: int = 0
    sum_of_squares: float = 0.0
    norm_of_squares: float = 0.0

    @property
    def relative(self) -> float | None:
        """L2 norm of the difference over that of a; None where it is no finite number."""
        if not self.norm_of_squares or not math.isfinite(self.norm_of_squares):
            return None
        relative = math.sqrt(self.sum_of_squares / self.norm_of_squares)
        return relative if math.isfinite(relative) else None

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Takes in two arrays of one shape, C-contiguous."""
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for first in range(0, flat_a.size, _PIECE):
            piece = slice(first, first + _PIECE)
            self._add_piece(flat_a[piece], flat_b[piece])

    def _add_piece(self, a: np.ndarray, b: np.ndarray) -> None:
        self.elements += a.size
        with np.errstate(all="ignore"):  # what is not finite is counted
            wide = _widened(a)
            self.norm_of_squares += _sum_of_squares(wide)
            is_different = _is_different(a, b)
            different = int(np.count_nonzero(is_different))
            self.different += different
            if different == a.size:  # as in training: nothing to pick out
                self._add_distances(_distances(wide, _widened(b)))
            elif different:
                self._add_distances(_distances(wide[is_different], _widened(b[is_different])))

    def _add_distances(self, distances: np.ndarray) -> None:
        squares = _dot(distances)
        if not math.isfinite(squares):
            finite = distances[np.isfinite(distances)]
            self.not_finite += distances.size - finite.size
            distances, squares = finite, _dot(finite)
        self.largest = max(self.largest, float(distances.max(initial=0.0)))
        self.sum_of_squares += squares


def _is_different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype != b.dtype:
        wide_a, wide_b = _widened(a), _widened(b)
        both_nan = (wide_a != wide_a) & (wide_b != wide_b)  # noqa: PLR0124 - for any kind of number
        return np.asarray((wide_a != wide_b) & ~both_nan)
    size = a.dtype.itemsize
    if size <= _LARGEST_WORD:
        return np.asarray(a.view(f"u{size}") != b.view(f"u{size}"))
    words_a, words_b = (x.view(f"u{_LARGEST_WORD}").reshape(x.size, -1) for x in (a, b))
    return np.asarray((words_a != words_b).any(axis=1))


def _widened(array: np.ndarray) -> np.ndarray:
    """The values in the widest dtype of their kind."""
    kind, name = array.dtype.kind, array.dtype.name
    if kind in "biu" or name.startswith("int"):
        return array if name == "uint64" else array.astype(np.int64, copy=False)
    return array.astype(np.complex128 if kind == "c" else np.float64, copy=False)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype == b.dtype and a.dtype.kind in "iu":
        # In unsigned arithmetic: the distance of two int64 may not fit an int64.
        larger, smaller = np.maximum(a, b), np.minimum(a, b)
        return np.asarray((larger.view(np.uint64) - smaller.view(np.uint64)).astype(np.float64))
    common = np.result_type(a, b, np.float64)
    return np.asarray(np.abs(a.astype(common, copy=False) - b.astype(common, copy=False)))


def _sum_of_squares(values: np.ndarray) -> float:
    """Sums the squares of what is finite."""
    parts = values.view(np.float64) if values.dtype.kind == "c" else values.astype(np.float64)
    total = _dot(parts)
    return total if math.isfinite(total) else _dot(parts[np.isfinite(parts)])


def _dot(parts: np.ndarray) -> float:
    # Not np.dot: its threads wait for each other longer than they take for so little.
    return float(np.einsum("i,i->", parts, parts))
