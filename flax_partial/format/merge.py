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

from flax_partial.format.chunks import chunk_counts
from flax_partial.format.keypaths import KeyTree
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import Box, Leaf, Part, Place, Run, data_part

Source = tuple[str, Place]
"""Where a chunk of the checkpoint is: the data file, as `data_part` calls it, and its place."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A whole checkpoint, or why there is none yet.

    Attributes:
      leaves: The merged leaves, each one whole box.
      sources: For each leaf, in the same order, where each of its chunks is, in C order.
      data_parts: The data files that the leaves' runs number, each called as by `data_part`.
      custom_metadata: That of all parts, merged.
      started_ns: When the first part was saved, in nanoseconds since the epoch.
      parts: Number of parts.
      first_part: The smallest name of a part; empty without parts.
      conflicts: Why the parts do not fit together; nothing but another save can mend these.
      missing: Leaves that are not complete, each with what it lacks; more parts would mend these.
    """

    leaves: tuple[Leaf, ...]
    sources: tuple[tuple[Source, ...], ...]
    data_parts: tuple[str, ...]
    custom_metadata: dict[str, Any]
    started_ns: int
    parts: int
    first_part: str
    conflicts: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(slots=True)
class _Held:
    """The newest generation of a leaf, and who holds it."""

    leaf: Leaf
    by: list[tuple[str, Leaf]]


def merge(parts: Mapping[str, Part]) -> MergePlan:
    """Plans the checkpoint that `parts` (name -> contents) make; linear in their size."""
    ordered = sorted(parts.items(), key=lambda item: (item[1].time_ns, item[0]))
    newest = _newest(ordered)
    conflicts: list[str] = []
    missing: list[str] = []
    leaves: list[Leaf] = []
    sources: list[tuple[Source, ...]] = []
    numbers: dict[str, int] = {}
    for held in newest.values():
        problem = _disagreement(held)
        if problem:
            conflicts.append(problem)
            continue
        leaf, found, lacking = _whole(held, conflicts)
        runs = _runs(leaf, found, numbers)
        leaves.append(leaf.with_boxes(leaf.boxes, runs) if runs else leaf)
        sources.append(found)
        if lacking:
            missing.append(lacking)
    conflicts.extend(_tree_problems(leaves))
    return MergePlan(
        leaves=tuple(leaves),
        sources=tuple(sources),
        data_parts=tuple(numbers),
        custom_metadata=merge_metadata(part.custom_metadata for _, part in ordered),
        started_ns=min((part.time_ns for _, part in ordered), default=0),
        parts=len(parts),
        first_part=min(parts, default=""),
        conflicts=tuple(conflicts),
        missing=tuple(missing),
    )


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


def _whole(held: _Held, conflicts: list[str]) -> tuple[Leaf, tuple[Source, ...], str | None]:
    """Puts the boxes of a leaf together: the whole leaf, its sources, and what is lacking."""
    leaf = held.leaf
    if not leaf.is_array:
        return leaf, (), None
    if len(held.by) == 1 and len(leaf.boxes) == 1 and leaf.boxes[0].shape == leaf.shape:
        (box,), part = leaf.boxes, data_part(held.by[0][0], leaf.file)
        whole = Box(box.start, box.shape, box.digests)
        return leaf.with_boxes((whole,)), tuple((part, place) for place in box.places), None
    chunks: dict[str, tuple[str, Source]] = {}
    for name, held_leaf in held.by:
        clash = _collect(name, held_leaf, chunks)
        if clash:
            conflicts.append(
                f"Leaf {leaf.name!r}: {name} saved {clash}, which another save holds with other "
                "content. Save it again with replace=True."
            )
            return leaf, (), None
    return _joined(leaf, chunks)


def _joined(
    leaf: Leaf, chunks: Mapping[str, tuple[str, Source]]
) -> tuple[Leaf, tuple[Source, ...], str | None]:
    """Makes one whole box of a leaf's chunks, by their keys; says what is lacking."""
    whole = Box((0,) * len(leaf.shape), leaf.shape)
    total = math.prod(chunk_counts(leaf.shape, leaf.chunk))
    if len(chunks) != total:
        lacking = (
            f"{leaf.name} ({len(chunks)} of {total} chunks of {leaf.dtype}{list(leaf.shape)} "
            f"were saved)"
        )
        return leaf.with_boxes((whole,)), (), lacking
    ordered = [chunks[key] for key in leaf.keys_of(whole)]
    digests = tuple(digest for digest, _ in ordered)
    if any(digests):
        whole = Box(whole.start, whole.shape, digests)
    return leaf.with_boxes((whole,)), tuple(source for _, source in ordered), None


def _runs(leaf: Leaf, sources: Iterable[Source], numbers: dict[str, int]) -> tuple[Run, ...]:
    """Joins chunks that follow one another in a data file; numbers the files as they come."""
    if leaf.compression is not None:
        return ()
    runs: list[Run] = []
    end = (-1, 0)
    for part, place in sources:
        if isinstance(place, bytes):
            return ()
        offset, size = place
        number = numbers.setdefault(part, len(numbers))
        if end == (number, offset):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((number, offset, 1))
        end = number, offset + size
    return tuple(runs)


def _collect(part: str, leaf: Leaf, chunks: dict[str, tuple[str, Source]]) -> str | None:
    """Adds a part's chunks of a leaf to those known, each once; says what clashes."""
    part = data_part(part, leaf.file)
    for box in leaf.boxes:
        digests = box.digests or ("",) * len(box.places)
        for key, digest, place in zip(leaf.keys_of(box), digests, box.places, strict=True):
            known = chunks.setdefault(key, (digest, (part, place)))
            if known[1] != (part, place) and (not digest or known[0] != digest):
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
