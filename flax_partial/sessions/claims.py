"""What this process has claimed in a session, and which of its saves conflict. In memory only.

Invariant: a leaf is held in at least one generation, and of one generation no chunk twice. A claim
costs what the claimed leaves cost, however many are held.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from flax_partial.errors import KeyConflictError
from flax_partial.format.chunks import chunk_numbers
from flax_partial.format.keypaths import KeyTree, form_tree
from flax_partial.format.model import Leaf, Part


@dataclass(slots=True)
class _Generation:
    """What this process has saved, or is saving, of one generation of a leaf.

    Attributes:
      leaf: The leaf as it is in this generation.
      chunks: Numbers of the chunks; None for the whole leaf.
    """

    leaf: Leaf
    chunks: set[int] | None


class Claims:
    """What this process has saved, or is saving, in one session; raises at once for a conflict."""

    def __init__(self) -> None:
        self._tree = KeyTree()
        self._held: dict[str, dict[int, _Generation]] = {}
        self._only: Sequence[Leaf] = ()  # claimed before all others, and not yet held

    def load(self, part: Part) -> None:
        """Claims what a part holds that an earlier run of this process committed."""
        self.hold(part.leaves)

    def hold(self, leaves: Sequence[Leaf]) -> None:
        """Claims leaves, each in its generation, whatever else is claimed."""
        if not (self._held or self._only):
            self._only = leaves
            return
        self._hold_only()
        for leaf in leaves:
            self._hold(leaf, _chunks_of(leaf))

    def _hold_only(self) -> None:
        only, self._only = self._only, ()
        for leaf in only:
            self._hold(leaf, _chunks_of(leaf))

    def claim(
        self,
        leaves: Sequence[Leaf],
        *,
        replace: bool,
        is_tree: bool,
        visible: Callable[[frozenset[str]], Mapping[str, int]],
    ) -> Sequence[Leaf]:
        """Claims leaves for a save; all of them or none.

        Args:
          leaves: The leaves, with their boxes.
          replace: Whether to start a new generation of what is claimed already.
          is_tree: Whether the leaves are known to form a tree: by themselves they have no conflict.
          visible: From names of leaves to the largest generation of those that parts on disk hold;
            called only to replace leaves that this process never wrote.

        Returns:
          The leaves, each in its generation.

        Raises:
          KeyConflictError: Some cannot be claimed; it names all of them.
        """
        if not (replace or self._only or self._tree) and (is_tree or form_tree(leaves)):
            self._only = leaves
            return leaves
        self._hold_only()
        unknown = frozenset(
            leaf.name for leaf in leaves if replace and not self._held.get(leaf.name)
        )
        newest = visible(unknown) if unknown else {}
        problems: list[str] = []
        claimed: list[Leaf] = []
        for given in leaves:
            leaf = given
            if replace and given.placeholder:  # it replaces what is there
                leaf = structs.replace(given, placeholder=False)
            chunks = _chunks_of(leaf)
            generation = self._generation(leaf, chunks, replace, newest)
            if isinstance(generation, str):
                problems.append(generation)
                continue
            placed = _in_generation(leaf, generation)
            claimed.append(placed)
            self._hold(placed, chunks)
        if problems:
            self.release(claimed)
            raise KeyConflictError("\n".join(problems))
        return claimed

    def release(self, leaves: Sequence[Leaf]) -> None:
        """Takes back the claims of a save that failed."""
        if leaves is self._only:
            self._only = ()
            return
        self._hold_only()
        for leaf in leaves:
            if leaf.placeholder:
                self._tree.discard_place(leaf)
                continue
            generations = self._held.get(leaf.name, {})
            held = generations.get(leaf.generation)
            if held is None:
                continue  # the session was forgotten meanwhile
            mine = _chunks_of(leaf)
            if held.chunks is not None and mine is not None and held.chunks - mine:
                held.chunks -= mine
                continue
            del generations[leaf.generation]
            if not generations:
                del self._held[leaf.name]
                self._tree.discard(held.leaf)

    def _generation(
        self,
        leaf: Leaf,
        chunks: frozenset[int] | None,
        replace: bool,  # noqa: FBT001 - private, and always named where it comes from
        newest_on_disk: Mapping[str, int],
    ) -> int | str:
        """Returns the generation in which a leaf can be saved, or why it cannot."""
        gives_way = leaf.placeholder and self._tree.has_inside(leaf)
        problem = None if gives_way else self._tree.problem_with(leaf)
        if problem:
            return problem
        generations = self._held.get(leaf.name)
        if not generations:
            return newest_on_disk.get(leaf.name, -1) + 1 if replace else 0
        newest = max(generations)
        held, others = generations[newest].leaf, generations[newest].chunks
        is_same = _is_same_array(leaf, held)
        is_in_pieces = chunks is not None and others is not None
        if is_same and chunks is not None and others is not None and chunks.isdisjoint(others):
            return newest
        if replace:
            return newest + 1
        if is_in_pieces and not is_same:
            return (
                f"Leaf {leaf.name!r} is in this session as {held.summary}, and this piece of "
                f"it is of {leaf.summary}. Save all pieces with the same kind, dtype and sharding, "
                "cut along the same axes; or all of them again with replace=True."
            )
        what = "is" if chunks is None else "is, or overlaps what is,"
        return (
            f"Leaf {leaf.name!r} {what} already in this session. Pass replace=True to overwrite it."
        )

    def _hold(self, leaf: Leaf, chunks: frozenset[int] | None) -> None:
        if leaf.placeholder:
            self._tree.add_place(leaf)
            return
        generations = self._held.get(leaf.name)
        if not generations:
            if self._tree.add(leaf):
                return  # only parts on disk can conflict; finalize reports that
            generations = self._held[leaf.name] = {}
        held = generations.setdefault(leaf.generation, _Generation(leaf, set()))
        if chunks is None or held.chunks is None:
            held.chunks = None
        else:
            held.chunks |= chunks


def _chunks_of(leaf: Leaf) -> frozenset[int] | None:
    if not leaf.is_array or (len(leaf.boxes) == 1 and leaf.boxes[0].shape == leaf.shape):
        return None
    return frozenset(
        number
        for box in leaf.boxes
        for number in chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)
    )


def _is_same_array(one: Leaf, other: Leaf) -> bool:
    return (one.kind, one.dtype, one.shape, one.chunk) == (
        other.kind,
        other.dtype,
        other.shape,
        other.chunk,
    )


def _in_generation(leaf: Leaf, generation: int) -> Leaf:
    return leaf if generation == leaf.generation else structs.replace(leaf, generation=generation)
