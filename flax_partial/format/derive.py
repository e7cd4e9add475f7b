"""The files that finalize derives from the parts, and that verify derives again. Pure.

The same plan and the same time of the commit always give the same bytes.
"""

from dataclasses import dataclass

from flax_partial.format import orbax
from flax_partial.format.digests import digest
from flax_partial.format.merge import MergePlan
from flax_partial.format.model import Contents
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


def derive(plan: MergePlan, *, committed_ns: int, contents_bytes: bytes | None = None) -> Derived:
    """Derives the files of a checkpoint.

    Args:
      plan: Its merged parts, without conflicts and with nothing missing.
      committed_ns: When it is finalized, in nanoseconds since the epoch.
      contents_bytes: The `contents.json` of a checkpoint that is there already, which identifies
        its database: another version may have encoded the same contents to other bytes.
    """
    contents = Contents(
        started_ns=plan.started_ns,
        committed_ns=committed_ns,
        parts=plan.parts,
        custom_metadata=plan.custom_metadata,
        leaves=plan.leaves,
        data_parts=plan.data_parts,
        first_part=plan.first_part,
    )
    data = contents_bytes or encode_contents(contents)
    files = orbax.root_files(contents)
    files |= orbax.database_files(contents, plan.sources, uuid=bytes.fromhex(digest(data)))
    return Derived(contents, data, files)
