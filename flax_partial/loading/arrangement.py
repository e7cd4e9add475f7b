"""Where the leaves of a target are in a checkpoint: under other names, or stacked otherwise."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from flax_partial.format import model as kinds
from flax_partial.format.chunks import Shape
from flax_partial.format.keypaths import STR_KEY, KeyPath
from flax_partial.format.model import Leaf
from flax_partial.format.slices import Slice, SliceError, rows_of, whole_shape
from flax_partial.loading.restacked import Source
from flax_partial.loading.target import shape_and_dtype

_NUMBER = "{}"


@dataclass(frozen=True, slots=True)
class Stack:
    """How the layers of a model are kept: in one leaf, along some of its axes, or in a leaf each.

    Layers are numbered from 0. Where `name` has a `{}`, each number has a leaf of its own:
    `Stack("decoder.layers_{}")`. Otherwise a leaf stacks them along `axes`, row-major:
    `Stack("decoder.layers", (0, 1))` has layer `4 * repeat + stage` at `[repeat, stage, ...]`, if
    there are 4 stages. Where there are both, `{}` counts fastest.

    Attributes:
      name: Keys that follow one another in the paths of the leaves, joined with dots: below it
        stand a layer's parameters, and moments, as they do in `opt_state.0.mu.decoder.layers`.
      axes: Axis or axes of the leaves, in the order in which they count; negative counts from the
        end. A leaf that lacks one of them is no stack, and loaded as it is.
    """

    name: str
    axes: int | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for an invalid description."""
        name: Any = self.name
        axes: Any = self.all_axes
        are_numbers = all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
        if not (isinstance(name, str) and are_numbers):
            raise TypeError(f"{self} is not of a name and axes")
        if self.name.count(_NUMBER) > 1 or not (axes or _NUMBER in self.name) or not self.name:
            raise ValueError(f"{self} has neither axes nor a single {_NUMBER} in its name")

    @property
    def all_axes(self) -> tuple[int, ...]:
        """Its axes as they were given, as a tuple."""
        return self.axes if isinstance(self.axes, tuple) else (self.axes,)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its name."""
        return tuple(self.name.split("."))

    @property
    def is_numbered(self) -> bool:
        """Whether there are several leaves, by the number in their name."""
        return _NUMBER in self.name

    def axes_of(self, rank: int) -> Shape | None:
        """Its axes in an array with so many; None if that lacks one."""
        if not all(-rank <= axis < rank for axis in self.all_axes):
            return None
        axes = tuple(axis % rank for axis in self.all_axes)
        return axes if len(set(axes)) == len(axes) else None

    def keys_of(self, number: int) -> tuple[str, ...]:
        """The keys of its name with a number in it."""
        return tuple(key.replace(_NUMBER, str(number)) for key in self.keys)


class _MisfitError(Exception):
    """A leaf cannot be restacked."""


class Arrangement:
    """Where the leaves of a target are in a checkpoint."""

    def __init__(
        self,
        restack: Mapping[Any, Any] | None,
        renames: Mapping[str, str] | None,
        wanted: Iterable[KeyPath],
        find: Callable[[KeyPath], Leaf | None],
    ) -> None:
        """Takes what a user passes.

        Args:
          restack: From the stack in the checkpoint to the one in the target.
          renames: From keys in the checkpoint's paths to keys in the target's.
          wanted: Paths of the target.
          find: Returns the leaf at a path of the checkpoint.

        Raises:
          TypeError: They map something else.
        """
        self._stacks = [(_stack(saved), _stack(new)) for saved, new in (restack or {}).items()]
        self._renames = [(_keys(saved), _keys(new)) for saved, new in (renames or {}).items()]
        self._stacks.sort(key=lambda pair: -len(pair[1].keys))  # the longest first
        self._renames.sort(key=lambda pair: -len(pair[1]))
        self._unused = {*map(_said, self._stacks), *map(_said, self._renames)}
        self._counts = Counter(
            (new, _around(path, found[0], new.keys))
            for path in map(self._renamed, wanted)
            for _, new in self._stacks
            if new.is_numbered and new.all_axes and (found := _found(new.keys, path.texts))
        )
        self._find = find

    def unused(self) -> list[str]:
        """Returns which names no leaf of the target had."""
        return [f"no leaf of the target is called so: {said}" for said in sorted(self._unused)]

    def said_of(self, path: KeyPath) -> str:
        """Returns under which other name a leaf of the target was looked up, if it was."""
        renamed = self._renamed(path)
        return "" if renamed is path else f", where it would be called {renamed.name!r}"

    def find(self, path: KeyPath, value: Any) -> Source | str | None:
        """Finds what to load a leaf of the target from.

        Args:
          path: Its path in the target.
          value: What stands there.

        Returns:
          What there is; why it cannot be restacked; None if there is none.
        """
        path = self._renamed(path)
        for pair in self._stacks:
            found = _found(pair[1].keys, path.texts)
            if found is not None:
                self._unused.discard(_said(pair))
                try:
                    return self._restacked(path, value, pair, found)
                except _MisfitError as error:
                    return str(error)
        leaf = self._find(path)
        return None if leaf is None else Source(leaf, (leaf,))

    def _renamed(self, path: KeyPath) -> KeyPath:
        for saved, new in self._renames:
            found = _found(new, path.texts)
            if found is not None:
                self._unused.discard(_said((saved, new)))
                return _replaced(path, found[0], new, saved)
        return path

    def _restacked(
        self, path: KeyPath, value: Any, pair: tuple[Stack, Stack], found: tuple[int, int]
    ) -> Source | None:
        (saved, new), (at, number) = pair, found
        stored, shape = self._stored(path, at, saved, new), _wanted_shape(value)
        if not stored:
            return None
        if shape is None:
            raise _MisfitError(f"{path.name!r} is no array in the target, and is to be restacked")
        _require_alike(stored)
        first = stored[0]
        axes, stored_axes = new.axes_of(len(shape)), saved.axes_of(_rank(first))
        is_stack = axes is not None and stored_axes is not None
        if not (is_stack or new.is_numbered or saved.is_numbered):
            return Source(first, (first,))
        misfit = (
            f"{path.name!r}, {list(shape)} in the target, cannot be restacked from {first.name!r}, "
            f"{first.dtype}{list(first.shape)} in the checkpoint"
        )
        if axes is None or stored_axes is None:
            raise _MisfitError(misfit)
        others = [size for axis, size in enumerate(first.shape) if axis not in stored_axes]
        rank = len(shape) + len(first.shape) - _rank(first)  # the data of keys has more axes
        if rank != len(axes) + len(others):
            raise _MisfitError(misfit)
        layers = math.prod(first.shape[axis] for axis in stored_axes) * len(stored)
        count = 1
        if new.is_numbered:
            count = self._counts[new, _around(path, at, new.keys)] if axes else layers
        has = math.prod(shape[axis] for axis in axes) * count
        if has != layers or number >= count:
            which = f", of which it would be number {number}" if new.is_numbered else ""
            raise _MisfitError(f"{misfit}: that has {layers} layers, and the target {has}{which}")
        rest = iter(others)
        whole = tuple(shape[axis] if axis in axes else next(rest) for axis in range(rank))
        is_number = first.kind in (kinds.SCALAR, kinds.NUMPY_SCALAR)
        kind = kinds.JAX_ARRAY if is_number else first.kind
        leaf = structs.replace(
            first, texts=path.texts, key_kinds=path.key_kinds, shape=whole, kind=kind
        )
        return Source(leaf, stored, axes, stored_axes, (number, count))

    def _stored(self, path: KeyPath, at: int, saved: Stack, new: Stack) -> list[Leaf]:
        """The leaves of the checkpoint that hold the layers, in the order of their numbers."""
        stored: list[Leaf] = []
        for number in itertools.count() if saved.is_numbered else range(1):
            leaf = self._find(_replaced(path, at, new.keys, saved.keys_of(number)))
            if leaf is None:
                break
            stored.append(leaf)
        return stored


def _stack(given: Any) -> Stack:
    if isinstance(given, Stack):
        return given
    if isinstance(given, str):
        return Stack(given)
    raise TypeError(f"restack maps a Stack to a Stack, such as 'layers_{{}}'; it has {given!r}")


def _keys(given: Any) -> tuple[str, ...]:
    if not isinstance(given, str):
        raise TypeError(f"renames maps names to names, such as 'params.encoder'; it has {given!r}")
    return tuple(given.split(".")) if given else ()


def _said(pair: tuple[Any, Any]) -> str:
    if isinstance(pair[1], Stack):
        return f"restack, {pair[1].name!r}"
    return f"renames, {'.'.join(pair[1])!r}"


def _found(keys: Sequence[str], texts: tuple[str, ...]) -> tuple[int, int] | None:
    """Finds keys that follow one another in a path: where, and the number in them."""
    for at in range(len(texts) - len(keys) + 1):
        number = 0
        for key, text in zip(keys, texts[at:], strict=False):
            if _NUMBER in key:
                before, after = map(re.escape, key.split(_NUMBER))
                match = re.fullmatch(f"{before}(0|[1-9][0-9]*){after}", text)
                if match is None:
                    break
                number = int(match[1])
            elif key != text:
                break
        else:
            return at, number
    return None


def _around(path: KeyPath, at: int, keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """What a path has before the keys that were found at a place, and after them."""
    return path.texts[:at], path.texts[at + len(keys) :]


def _replaced(path: KeyPath, at: int, keys: Sequence[str], others: Sequence[str]) -> KeyPath:
    """A path with other keys in the place of those that were found there."""
    end = at + len(keys)
    key_kinds = path.key_kinds[:at] + STR_KEY * len(others) + path.key_kinds[end:]
    return KeyPath((*path.texts[:at], *others, *path.texts[end:]), key_kinds)


def _rank(leaf: Leaf) -> int:
    return len(shape_and_dtype(leaf)[0])


def _wanted_shape(value: Any) -> Shape | None:
    """Shape of the whole leaf of which a target has all or some rows."""
    if isinstance(value, Slice):
        shape = _wanted_shape(value.value) or ()
        try:
            return whole_shape(shape, rows_of(value, shape, len(shape)))
        except SliceError:
            return None
    if isinstance(value, (int, float, complex)):
        return ()
    return tuple(value.shape) if hasattr(value, "shape") else None


def _require_alike(stored: Sequence[Leaf]) -> None:
    first = stored[0]
    form = (first.kind, first.dtype, first.shape)
    for leaf in stored:
        if not leaf.is_array or (leaf.kind, leaf.dtype, leaf.shape) != form:
            raise _MisfitError(
                f"{first.name!r} is {first.summary} in the checkpoint, and {leaf.name!r} is "
                f"{leaf.summary}: these are no layers of a stack"
            )
