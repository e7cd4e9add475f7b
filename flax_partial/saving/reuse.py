"""Which leaves of a save an earlier checkpoint holds already, by digest. Pure.

A data file is never changed once its part is committed, so that two checkpoints may share it: a
leaf whose chunks all lie in one file of the earlier checkpoint need not be written again, and that
file becomes, by a link, one of the new part's. What is compared are digests: those of the data to
be saved, which are taken here, and those in the earlier part's table of contents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_partial.format.chunks import chunk_numbers
from flax_partial.format.digests import digests_of
from flax_partial.format.model import Box, Leaf, Part, data_file_bytes, data_part

# A link has to be made durable, in a time in which a disk writes more than this.
_LEAST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of a committed part.

    Attributes:
      path: Where it is.
      bytes: How large it is. A part's table has only how much of it that part uses.
      durable: Whether it is on the disk for certain.
    """

    path: Path
    bytes: int
    durable: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk in a data file: the file, the chunk's digest, its offset and length."""

    file: DataFile
    digest: str
    place: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Held:
    """What an earlier checkpoint has of a leaf: how it is cut and stored, and its chunks."""

    form: tuple[object, ...]
    chunks: dict[int, _Chunk]


@dataclass(frozen=True, slots=True)
class Shared:
    """A data file to link, and what of a save it holds.

    Attributes:
      file: The file.
      leaves: Position of each leaf in the save -> the leaf with digests and places.
    """

    file: DataFile
    leaves: dict[int, Leaf]


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a save is not written, and what is written by itself.

    Attributes:
      shared: The data files that are linked, each at least half in use by that: what else lies in
        them stays on the disk with them.
      apart: Positions of leaves that are unchanged, too, but lie in files that hold much else: in a
        file of their own the next save can share them.
    """

    shared: tuple[Shared, ...] = ()
    apart: frozenset[int] = frozenset()


def plan_of(found: Mapping[DataFile, dict[int, Leaf]]) -> Plan:
    """Decides which files are worth a link, given what of a save each of them holds."""
    shared, apart = [], set[int]()
    for file, kept in found.items():
        used = sum(map(_stored_bytes, kept.values()))
        if used >= _LEAST_BYTES and 2 * used >= file.bytes:
            shared.append(Shared(file, kept))
        elif used >= _LEAST_BYTES:
            apart |= kept.keys()
    return Plan(tuple(shared), frozenset(apart))


def form_of(leaf: Leaf) -> tuple[object, ...]:
    """What has to agree for chunks of equal digests to be stored as the same bytes."""
    return leaf.dtype, leaf.shape, leaf.chunk, leaf.compression


class Earlier:
    """What the data files of an earlier checkpoint hold."""

    def __init__(self, parts: Mapping[str, Part], files: Mapping[str, DataFile]) -> None:
        """Takes any of its parts, by name, and their data files as `data_part` calls them."""
        self._held: dict[str, _Held] = {}
        for name, part in sorted(parts.items()):  # a later part has the newer value
            used = data_file_bytes(part.leaves)
            for leaf in part.leaves:
                file = files.get(data_part(name, leaf.file))
                if file is not None and used.get(leaf.file, 0) <= file.bytes:
                    self._add(file, leaf)

    def _add(self, file: DataFile, leaf: Leaf) -> None:
        held = self._held.get(leaf.name)
        if held is None or held.form != form_of(leaf):
            held = self._held[leaf.name] = _Held(form_of(leaf), {})
        for box in leaf.boxes:
            numbers = chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)
            for number, digest, place in zip(numbers, box.digests, box.places, strict=False):
                if digest and isinstance(place, tuple):
                    held.chunks[number] = _Chunk(file, digest, place)

    def plan(self, leaves: Sequence[Leaf], data: Sequence[Iterable[np.ndarray]]) -> Plan:
        """Finds what need not be written; reads data only as far as it is what was saved before.

        Args:
          leaves: What is to be saved.
          data: The data of each of their boxes, C order.
        """
        found: dict[DataFile, dict[int, Leaf]] = {}
        for position, (leaf, arrays) in enumerate(zip(leaves, data, strict=True)):
            chunks = self._find(leaf)
            if chunks and _is_same(chunks, leaf, arrays):
                found.setdefault(chunks[0].file, {})[position] = _placed(leaf, chunks)
        return plan_of(found)

    def _find(self, leaf: Leaf) -> list[_Chunk] | None:
        """The chunks of a leaf's boxes, in order, if they all lie in one file."""
        held = self._held.get(leaf.name)
        if held is None or held.form != form_of(leaf):
            return None
        chunks = [held.chunks.get(number) for number in _numbers(leaf)]
        known = [chunk for chunk in chunks if chunk is not None]
        is_whole = known and len(known) == len(chunks)
        return known if is_whole and all(one.file is known[0].file for one in known) else None


def _numbers(leaf: Leaf) -> Iterator[int]:
    for box in leaf.boxes:
        yield from chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)


def _is_same(chunks: Sequence[_Chunk], leaf: Leaf, arrays: Iterable[np.ndarray]) -> bool:
    digests = (digest for array in arrays for digest in digests_of(array, leaf.chunk))
    return all(chunk.digest == digest for chunk, digest in zip(chunks, digests, strict=True))


def _placed(leaf: Leaf, chunks: Sequence[_Chunk]) -> Leaf:
    boxes, rest = [], iter(chunks)
    for box in leaf.boxes:
        count = sum(1 for _ in chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape))
        held = [next(rest) for _ in range(count)]
        digests = tuple(chunk.digest for chunk in held)
        boxes.append(Box(box.start, box.shape, digests, tuple(chunk.place for chunk in held)))
    return leaf.with_boxes(tuple(boxes))


def _stored_bytes(leaf: Leaf) -> int:
    places = (place for box in leaf.boxes for place in box.places)
    return sum(place[1] for place in places if isinstance(place, tuple))
