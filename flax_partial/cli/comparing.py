"""By how much the values of two arrays differ, taken piece by piece. Pure.

Elements are *different* when their bits are (so that a NaN equals itself, and 0.0 is not -0.0), or,
where dtypes are not the same, when their values are. Integers are subtracted exactly, everything
else in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_partial.cli import figures

_PIECE = 1 << 18  # elements: what is computed from one lies in the cache of a core


@dataclass(slots=True)
class Difference:
    """How far b is from a, as far as was seen.

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
        """L2 norm of the difference over that of a; None where a is zero."""
        if not self.norm_of_squares:
            return None
        return figures.finite(math.sqrt(self.sum_of_squares / self.norm_of_squares))

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Takes in two arrays of one shape, C-contiguous."""
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for first in range(0, flat_a.size, _PIECE):
            piece = slice(first, first + _PIECE)
            self._add_piece(flat_a[piece], flat_b[piece])

    def _add_piece(self, a: np.ndarray, b: np.ndarray) -> None:
        self.elements += a.size
        wide_a = _widened(a)
        self.norm_of_squares += _sum_of_squares(np.abs(wide_a.astype(_norm_dtype(wide_a))))
        is_different = _is_different(a, b)
        self.different += int(np.count_nonzero(is_different))
        if not is_different.any():
            return
        distances = _distances(wide_a[is_different], _widened(b[is_different]))
        finite = distances[np.isfinite(distances)]
        self.not_finite += distances.size - finite.size
        self.largest = max(self.largest, float(finite.max(initial=0.0)))
        self.sum_of_squares += _sum_of_squares(finite)


def _is_different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype != b.dtype:
        wide_a, wide_b = _widened(a), _widened(b)
        both_nan = (wide_a != wide_a) & (wide_b != wide_b)  # noqa: PLR0124 - for any kind of number
        return np.asarray((wide_a != wide_b) & ~both_nan)
    bits_a, bits_b = (x.view(np.uint8).reshape(x.size, x.dtype.itemsize) for x in (a, b))
    unsigned = f"u{min(a.dtype.itemsize, 8)}"
    return np.asarray((bits_a.view(unsigned) != bits_b.view(unsigned)).any(axis=1))


def _widened(array: np.ndarray) -> np.ndarray:
    """The values in the widest dtype of their kind."""
    dtype: np.dtype[Any] = array.dtype
    if dtype.kind in "biu" or "int" in dtype.name:
        return array if dtype == np.uint64 else array.astype(np.int64)
    return array.astype(np.complex128 if dtype.kind == "c" else np.float64)


def _norm_dtype(array: np.ndarray) -> type:
    return np.complex128 if array.dtype.kind == "c" else np.float64


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if a.dtype == b.dtype and a.dtype.kind in "iu":
            # In unsigned arithmetic: the distance of two int64 may not fit an int64.
            larger, smaller = np.maximum(a, b), np.minimum(a, b)
            return np.asarray((larger.view(np.uint64) - smaller.view(np.uint64)).astype(np.float64))
        return np.asarray(np.abs(a.astype(_common(a, b)) - b.astype(_common(a, b))))


def _common(a: np.ndarray, b: np.ndarray) -> type:
    return np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64


def _sum_of_squares(magnitudes: np.ndarray) -> float:
    finite = magnitudes[np.isfinite(magnitudes)]
    with np.errstate(over="ignore"):
        return float(np.dot(finite, finite))
