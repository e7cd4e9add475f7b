"""Parts -> one plan of the whole checkpoint, or every problem at once. Pure.

The rules, which stand here and nowhere else:

1. Of each leaf, the newest generation counts; older ones are superseded.
2. Parts that hold the same generation of a leaf agree on what it is (path, kind, dtype, shape,
   chunks), and a chunk that several of them hold has the same digest in all: it is taken once.
3. A leaf is complete when its chunks cover its shape.
4. A placeholder, an empty container, counts only where no part holds a leaf of its name, or
   anything inside of it.
5. The leaves form a tree that a reader can represent (`keypaths.KeyTree`), lists without gaps.
6. Dictionaries of metadata merge deeply in the order of the saves; the later value wins.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from flax_partial.errors import first_few
from flax_partial.format.chunks import chunk_counts
from flax_partial.format.keypaths import KeyTree
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import Box, Contents, Leaf, Part, Place, Run, data_part

Source = tuple[str, Sequence[Place]]
"""Where chunks are that follow one another in C order: their data file, as `data_part` calls it."""

_MOST_NAMED = 10  # processes that an error lists

_Holder = tuple[str, Leaf]
"""The name of a part, and what it holds of a leaf."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A whole checkpoint, or why there is none yet.

    Attributes:
      contents: What it holds: each leaf merged to one whole box; when it is finalized is not known.
      sources: For each leaf, in the same order, where each of its chunks is, in C order; nothing
        where they are in the leaf itself.
      conflicts: Why the parts do not fit together; nothing but another save can mend these.
      missing: Leaves that are not complete, each with what it lacks; more parts would mend these.
    """

    contents: Contents
    sources: tuple[tuple[Source, ...], ...]
    conflicts: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The merged leaves."""
        return self.contents.leaves


def merge(parts: Mapping[str, Part]) -> MergePlan:
    """Plans the checkpoint that `parts` (name -> contents) make; linear in their size."""
    ordered = _ordered(parts)
    conflicts: list[str] = []
    missing: list[str] = []
    leaves: list[Leaf] = []
    sources: list[tuple[Source, ...]] = []
    numbers: dict[str, int] = {}
    for holders in _without_placeholders(_newest(ordered)):
        if _is_whole_inline(holders):  # as small leaves are: all that there is to know is in it
            leaves.append(holders[0][1])
            sources.append(())
            continue
        problem = _disagreement(holders)
        if problem:
            conflicts.append(problem)
            continue
        leaf, found, lacking = _whole(holders, conflicts)
        leaves.append(_located(leaf, found, numbers))
        sources.append(found)
        if lacking:
            missing.append(lacking + _absent(holders, parts))
    conflicts.extend(_tree_problems(leaves))
    contents = Contents(
        started_ns=min((part.time_ns for _, part in ordered), default=0),
        committed_ns=0,
        parts=len(parts),
        custom_metadata=merge_metadata(part.custom_metadata for _, part in ordered),
        training=merge_metadata(part.training for _, part in ordered),
        leaves=tuple(leaves),
        data_parts=tuple(numbers),
        first_part=min(parts, default=""),
    )
    return MergePlan(contents, tuple(sources), tuple(conflicts), tuple(missing))


def leaf_names(parts: Mapping[str, Part]) -> list[str]:
    """Returns the names of the leaves that `parts` hold, each once, without what gives way."""
    return [holders[0][1].name for holders in _without_placeholders(_newest(_ordered(parts)))]


def _ordered(parts: Mapping[str, Part]) -> list[tuple[str, Part]]:
    """The parts by age, oldest first."""
    return sorted(parts.items(), key=lambda item: (item[1].time_ns, item[0]))


def _is_whole_inline(holders: Sequence[_Holder]) -> bool:
    """Whether one part holds all chunks of a leaf, and its table has them."""
    if len(holders) > 1:
        return False
    ((_, leaf),) = holders
    if len(leaf.boxes) != 1 or leaf.file or leaf.compression is not None:
        return False
    (box,) = leaf.boxes
    return box.shape == leaf.shape and tuple not in map(type, box.places)


def _newest(ordered: Iterable[tuple[str, Part]]) -> Iterable[list[_Holder]]:
    """Which parts hold the newest generation of each leaf; a placeholder is older than any leaf."""
    newest: dict[str, list[_Holder]] = {}
    for part, contents in ordered:
        for leaf in contents.leaves:
            name = leaf.name
            holders = newest.get(name)
            if holders is None:
                newest[name] = [(part, leaf)]
                continue
            newest_age, age = _age(holders[0][1]), _age(leaf)
            if newest_age < age:
                holders.clear()
            if newest_age <= age:
                holders.append((part, leaf))
    return newest.values()


def _age(leaf: Leaf) -> tuple[bool, int]:
    return not leaf.placeholder, leaf.generation


def _without_placeholders(found: Iterable[list[_Holder]]) -> Iterable[list[_Holder]]:
    """Leaves out the placeholders inside of which something lies."""
    listed = list(found)
    if not any(holders[0][1].placeholder for holders in listed):
        return listed
    tree = KeyTree()
    for holders in listed:
        leaf = holders[0][1]
        tree.add_place(leaf) if leaf.placeholder else tree.add(leaf)
    return [
        holders
        for holders in listed
        if not (holders[0][1].placeholder and tree.has_inside(holders[0][1]))
    ]


def _disagreement(holders: Sequence[_Holder]) -> str | None:
    if len(holders) == 1:
        return None
    first_part, first = holders[0]
    identity = _identity(first)
    for part, leaf in holders[1:]:
        if _identity(leaf) != identity:
            return (
                f"Leaf {leaf.name!r} was saved as {first.summary} by {first_part} and "
                f"as {leaf.summary} by {part}. Save it again with replace=True."
            )
    return None


def _identity(leaf: Leaf) -> tuple[object, ...]:
    return (
        leaf.texts,
        leaf.kind,
        leaf.dtype,
        leaf.shape,
        leaf.chunk,
        leaf.compression,
        leaf.text,
        leaf.data,
    )


def _whole(
    holders: Sequence[_Holder], conflicts: list[str]
) -> tuple[Leaf, tuple[Source, ...], str | None]:
    """Puts the boxes of a leaf together: the whole leaf, its sources, and what is lacking."""
    part, leaf = holders[0]
    if not leaf.is_array:
        return leaf, (), None
    if len(holders) == 1 and len(leaf.boxes) == 1 and leaf.boxes[0].shape == leaf.shape:
        return leaf, ((data_part(part, leaf.file), leaf.boxes[0].places),), None
    chunks: dict[str, tuple[str, str, Place]] = {}
    for name, piece in holders:
        clash = _collect(name, piece, chunks)
        if clash:
            conflicts.append(
                f"Leaf {leaf.name!r}: {name} saved {clash}, which another save holds with other "
                "content. Save it again with replace=True."
            )
            return leaf, (), None
    return _joined(leaf, chunks)


def _joined(
    leaf: Leaf, chunks: Mapping[str, tuple[str, str, Place]]
) -> tuple[Leaf, tuple[Source, ...], str | None]:
    """Makes one whole box of a leaf's chunks, by their keys; returns what is missing."""
    whole = Box((0,) * len(leaf.shape), leaf.shape)
    total = math.prod(chunk_counts(leaf.shape, leaf.chunk))
    if len(chunks) != total:
        lacking = (
            f"{leaf.name} ({len(chunks)} of {total} chunks of {leaf.dtype}{list(leaf.shape)} "
            f"were saved)"
        )
        return leaf.with_boxes((whole,)), (), lacking
    ordered = [chunks[key] for key in leaf.keys_of(whole)]
    digests = tuple(digest for digest, _, _ in ordered)
    whole.digests = digests if any(digests) else ()
    whole.places = tuple(place for _, _, place in ordered)
    sources = tuple((part, (place,)) for _, part, place in ordered)
    return leaf.with_boxes((whole,)), sources, None


def _absent(holders: Sequence[_Holder], parts: Mapping[str, Part]) -> str:
    """Returns which processes that write a leaf together have not saved their share."""
    came = {parts[name].process for name, leaf in holders if leaf.boxes}
    ranges = [range(*of_one) for _, leaf in holders for of_one in leaf.writers]
    absent = (process for some in ranges for process in some if process not in came)
    count = sum(map(len, ranges)) - sum(process in some for some in ranges for process in came)
    if count <= 0:
        return ""
    shown = ", ".join(first_few(map(str, absent), most=_MOST_NAMED, count=count))
    return f", without the share of process {shown}"


def _located(leaf: Leaf, sources: Iterable[Source], numbers: dict[str, int]) -> Leaf:
    """The leaf as a checkpoint's contents have it: with the bytes of its chunks, or their runs."""
    if not leaf.is_array:
        return leaf
    (box,) = leaf.boxes[:1]
    if leaf.writers:
        leaf = structs.replace(leaf, writers=())
    is_plain = leaf.compression is None
    if is_plain and {bytes}.issuperset(map(type, box.places)):
        return leaf if not leaf.file else leaf.with_boxes(leaf.boxes)
    runs = _runs(sources, numbers) if is_plain else ()
    return leaf.with_boxes((Box(box.start, box.shape, box.digests),), runs)


def _runs(sources: Iterable[Source], numbers: dict[str, int]) -> tuple[Run, ...]:
    """Joins chunks that follow one another in a data file; numbers the files as they come."""
    runs: list[Run] = []
    end = (-1, 0)
    for part, places in sources:
        for place in places:
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


def _collect(part: str, leaf: Leaf, chunks: dict[str, tuple[str, str, Place]]) -> str | None:
    """Adds a part's chunks of a leaf to those known, each once; returns conflicts."""
    part = data_part(part, leaf.file)
    for box in leaf.boxes:
        digests = box.digests or ("",) * len(box.places)
        for key, digest, place in zip(leaf.keys_of(box), digests, box.places, strict=True):
            known = chunks.setdefault(key, (digest, part, place))
            if known[1:] != (part, place) and (not digest or known[0] != digest):
                return f"{list(box.shape)} at {list(box.start)}"
    return None


def _tree_problems(leaves: Iterable[Leaf]) -> list[str]:
    tree = KeyTree()
    problems = [problem for leaf in leaves if (problem := tree.add(leaf)) is not None]
    return problems or list(tree.gaps())
