"""The files that finalize derives from the parts, and that verify derives again. Pure.

The same plan and the same time of the commit always give the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flax_partial.format import orbax
from flax_partial.format.digests import digest
from flax_partial.format.merge import MergePlan, Source
from flax_partial.format.model import Box, Contents, Leaf
from flax_partial.format.orbax import Pieces
from flax_partial.format.tables import encode_contents


@dataclass(frozen=True, slots=True)
class Derived:
    """What is in a finalized checkpoint beside its parts.

    Attributes:
      contents: What it holds.
      contents_bytes: The bytes of its `contents.json`.
      sources: For each leaf where its chunks are; nothing where they are in the leaf itself.
    """

    contents: Contents
    contents_bytes: bytes
    sources: Sequence[Sequence[Source]]

    def root_files(self) -> Iterator[tuple[str, Pieces]]:
        """Yields all other files, each encoded when it is yielded: path below the checkpoint."""
        yield from orbax.root_files(self.contents)
        uuid = bytes.fromhex(digest(self.contents_bytes))
        yield from orbax.database_files(self.contents, self.sources, uuid=uuid)


def derive(
    plan: MergePlan,
    *,
    committed_ns: int,
    contents_bytes: bytes | None = None,
    has_inline: bool = True,
) -> Derived:
    """Derives the files of a checkpoint.

    Args:
      plan: Its merged parts, without conflicts and with nothing missing.
      committed_ns: When it is finalized, in nanoseconds since the epoch.
      contents_bytes: The `contents.json` of a checkpoint that is there already, which identifies
        its database: another version may have encoded the same contents to other bytes.
      has_inline: Whether the contents hold inline chunks, as they do since version 3.
    """
    contents = replace(plan.contents, committed_ns=committed_ns, has_inline=has_inline)
    sources: Sequence[Sequence[Source]] = plan.sources
    if not has_inline:
        sources = [*map(_sources_of, plan.leaves, sources)]
        contents = replace(contents, leaves=tuple(map(_without_places, plan.leaves)))
    return Derived(contents, contents_bytes or encode_contents(contents), sources)


def _sources_of(leaf: Leaf, found: Sequence[Source]) -> Sequence[Source]:
    return found or [("", box.places) for box in leaf.boxes]


def _without_places(leaf: Leaf) -> Leaf:
    boxes = [Box(box.start, box.shape, box.digests) for box in leaf.boxes]
    return leaf.with_boxes(tuple(boxes), leaf.runs)
