"""The files that finalize derives from the parts, and that verify derives again. Pure.

The same plan and the same time of the commit always give the same bytes.
"""

from dataclasses import dataclass

from flax_partial.format import orbax
from flax_partial.format.digests import digest
from flax_partial.format.merge import MergePlan
from flax_partial.format.model import Box, Contents, Leaf
from flax_partial.format.orbax import Pieces
from flax_partial.format.tables import encode_contents


@dataclass(frozen=True, slots=True)
class Derived:
    """What is in a finalized checkpoint beside its parts.

    Attributes:
      contents: What it holds.
      contents_bytes: The bytes of its `contents.json`.
      root_files: All other files: path below the checkpoint -> content.
    """

    contents: Contents
    contents_bytes: bytes
    root_files: dict[str, Pieces]


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
    contents = Contents(
        started_ns=plan.started_ns,
        committed_ns=committed_ns,
        parts=plan.parts,
        custom_metadata=plan.custom_metadata,
        leaves=plan.leaves if has_inline else tuple(map(_without_places, plan.leaves)),
        data_parts=plan.data_parts,
        first_part=plan.first_part,
        has_inline=has_inline,
    )
    data = contents_bytes or encode_contents(contents)
    files = orbax.root_files(contents)
    files |= orbax.database_files(contents, plan.sources, uuid=bytes.fromhex(digest(data)))
    return Derived(contents, data, files)


def _without_places(leaf: Leaf) -> Leaf:
    boxes = [Box(box.start, box.shape, box.digests) for box in leaf.boxes]
    return leaf.with_boxes(tuple(boxes), leaf.runs)
