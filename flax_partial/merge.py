"""Parts -> one plan of the whole checkpoint, or every problem at once. Pure.

The rules, which stand here and nowhere else:

1. Of each leaf, the newest generation counts; older ones are superseded.
2. Parts that hold the same generation of a leaf agree on what it is (path, kind, dtype, shape,
   chunks), and a chunk that several of them hold has the same digest in all: it is taken once.
3. A leaf is complete when its chunks cover its shape.
4. The leaves form a tree that a reader can represent (`keypaths.KeyTree`), lists without gaps.
5. Dictionaries of custom metadata merge deeply in the order of the saves; the later value wins.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flax_partial.chunks import chunk_counts
from flax_partial.keypaths import KeyTree
from flax_partial.part import Box, Leaf, Part

KeyRange = tuple[str, str]


@dataclass(frozen=True, slots=True)
class PartCopy:
    """What the checkpoint takes over from one part's database.

    Attributes:
      part: Name of the part.
      ranges: Half-open ranges of keys, in ascending order; None for all of them.
    """

    part: str
    ranges: tuple[KeyRange, ...] | None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A whole checkpoint, or why there is none yet.

    Attributes:
      leaves: The merged leaves, each one whole box.
      copies: What to copy from which part, in the order of the saves.
      custom_metadata: That of all parts, merged.
      started_ns: When the first part was saved, in nanoseconds since the epoch.
      conflicts: Why the parts do not fit together; nothing but another save can mend these.
      missing: Leaves that are not complete, each with what it lacks; more parts would mend these.
    """

    leaves: tuple[Leaf, ...]
    copies: tuple[PartCopy, ...]
    custom_metadata: dict[str, Any]
    started_ns: int
    conflicts: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(slots=True)
class _Held:
    """The newest generation of a leaf: who holds it, and what is dead of what they hold."""

    leaf: Leaf
    by: list[tuple[str, Leaf]]


def merge(parts: Mapping[str, Part]) -> MergePlan:
    """Plans the checkpoint that `parts` (name -> contents) make; linear in their size."""
    ordered = sorted(parts.items(), key=lambda item: (item[1].time_ns, item[0]))
    newest = _newest(ordered)
    dead: dict[str, set[str]] = {}
    conflicts: list[str] = []
    missing: list[str] = []
    leaves: list[Leaf] = []
    for held in newest.values():
        problem = _disagreement(held)
        if problem:
            conflicts.append(problem)
            continue
        leaf, lacking = _whole(held, dead, conflicts)
        leaves.append(leaf)
        if lacking:
            missing.append(lacking)
    conflicts.extend(_tree_problems(leaves))
    return MergePlan(
        leaves=tuple(leaves),
        copies=tuple(_copy(name, part, newest, dead.get(name, set())) for name, part in ordered),
        custom_metadata=merge_metadata(part.custom_metadata for _, part in ordered),
        started_ns=min((part.time_ns for _, part in ordered), default=0),
        conflicts=tuple(conflicts),
        missing=tuple(missing),
    )


def merge_metadata(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges dictionaries deeply; the later value wins, and lists are values."""
    merged: dict[str, Any] = {}
    for dictionary in dictionaries:
        _merge_into(merged, dictionary)
    return merged


def _merge_into(merged: dict[str, Any], dictionary: Mapping[str, Any]) -> None:
    for key, value in dictionary.items():
        if not isinstance(value, Mapping):
            merged[key] = value
            continue
        if not isinstance(merged.get(key), dict):
            merged[key] = {}  # a dict of our own: what was passed stays as it is
        _merge_into(merged[key], value)


def _newest(ordered: list[tuple[str, Part]]) -> dict[str, _Held]:
    newest: dict[str, _Held] = {}
    for name, part in ordered:
        for leaf in part.leaves:
            held = newest.get(leaf.name)
            if held is None or held.leaf.generation < leaf.generation:
                newest[leaf.name] = _Held(leaf, [(name, leaf)])
            elif held.leaf.generation == leaf.generation:
                held.by.append((name, leaf))
    return newest


def _disagreement(held: _Held) -> str | None:
    first = _identity(held.leaf)
    for name, leaf in held.by[1:]:
        if _identity(leaf) != first:
            return (
                f"Leaf {leaf.name!r} was saved as {held.leaf.summary} by {held.by[0][0]} and "
                f"as {leaf.summary} by {name}. Save it again with replace=True."
            )
    return None


def _identity(leaf: Leaf) -> tuple[object, ...]:
    return (
        leaf.path.texts,
        leaf.kind,
        leaf.dtype,
        leaf.shape,
        leaf.chunk,
        leaf.compression,
        leaf.text,
    )


def _whole(held: _Held, dead: dict[str, set[str]], conflicts: list[str]) -> tuple[Leaf, str | None]:
    """Puts the boxes of a leaf together; notes duplicates in `dead`, and says what is lacking."""
    leaf = held.leaf
    if not leaf.is_array:
        return leaf, None
    if len(held.by) == 1 and len(leaf.boxes) == 1 and leaf.boxes[0].shape == leaf.shape:
        return leaf, None
    digests: dict[str, str] = {}
    for name, held_leaf in held.by:
        clash = _collect(held_leaf, digests, dead.setdefault(name, set()))
        if clash:
            conflicts.append(
                f"Leaf {leaf.name!r}: {name} saved {clash}, which another save holds with other "
                "content. Save it again with replace=True."
            )
            return leaf, None
    total = math.prod(chunk_counts(leaf.shape, leaf.chunk))
    lacking = None
    if len(digests) != total:
        lacking = (
            f"{leaf.name} ({len(digests)} of {total} chunks of {leaf.dtype}{list(leaf.shape)} "
            f"were saved)"
        )
    whole = Box((0,) * len(leaf.shape), leaf.shape)
    if lacking is None and any(digests.values()):
        found = tuple(digests[key] for key in leaf.keys_of(whole))
        whole = Box(whole.start, whole.shape, found)
    return leaf.with_boxes((whole,)), lacking


def _collect(leaf: Leaf, digests: dict[str, str], dead: set[str]) -> str | None:
    """Adds a leaf's chunks to `digests`, those held already to `dead`; says what clashes."""
    for box in leaf.boxes:
        values = box.digests or ("",) * math.prod(chunk_counts(box.shape, leaf.chunk))
        for key, value in zip(leaf.keys_of(box), values, strict=True):
            if key not in digests:
                digests[key] = value
            elif value and digests[key] == value:
                dead.add(key)
            else:
                return f"{list(box.shape)} at {list(box.start)}"
    return None


def _tree_problems(leaves: list[Leaf]) -> list[str]:
    tree = KeyTree()
    problems = []
    for leaf in leaves:
        problem = tree.problem_with(leaf.path)
        if problem is None:
            tree.add(leaf.path)
        else:
            problems.append(problem)
    return problems or list(tree.gaps())


def _copy(name: str, part: Part, newest: Mapping[str, _Held], duplicates: set[str]) -> PartCopy:
    """Plans the copy of one part: everything, or the ranges between what is dead of it."""
    superseded = {
        leaf.name
        for leaf in part.leaves
        if leaf.is_array and leaf.generation < newest[leaf.name].leaf.generation
    }
    if not superseded and not duplicates:
        return PartCopy(name, None)
    keys = sorted(
        (key.encode(), leaf.name not in superseded and key not in duplicates)
        for leaf in part.leaves
        if leaf.is_array
        for box in leaf.boxes
        for key in leaf.keys_of(box)
    )
    return PartCopy(name, tuple(_runs(keys)))


def _runs(keys: list[tuple[bytes, bool]]) -> list[KeyRange]:
    """Joins neighbouring live keys to ranges that hold no dead one."""
    ranges: list[KeyRange] = []
    first = last = None
    for key, is_live in keys:
        if is_live:
            first, last = first or key.decode(), key.decode()
        elif first is not None and last is not None:
            ranges.append((first, last + "\0"))
            first = last = None
    if first is not None and last is not None:
        ranges.append((first, last + "\0"))
    return ranges
