"""Looks at an unfinished checkpoint."""

from flax_partial.format.merge import leaf_names
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import Part
from flax_partial.reports import PartStatus, SessionStatus
from flax_partial.sessions.registry import failed_parts
from flax_partial.storage import places
from flax_partial.storage.parts import SessionParts
from flax_partial.storage.paths import PathLike
from flax_partial.storage.store_path import AnyPath


def status(path: PathLike) -> SessionStatus:
    """Looks at the unfinished checkpoint of `path`; waits for nothing and changes nothing.

    Args:
      path: The checkpoint, or its session `<path>.partial_save`.

    Raises:
      NoSessionError: There is no session.
    """
    where = places.resolve(path)
    if not where.is_session():
        raise where.no_session()
    return status_of(where.final, where.read_parts(failed=failed_parts(where)))


def status_of(final: AnyPath, found: SessionParts) -> SessionStatus:
    """Returns the public description of a session's parts."""
    parts = found.committed
    ordered = sorted(parts.items(), key=lambda item: (item[1].time_ns, item[0]))
    return SessionStatus(
        path=final,
        parts=tuple(_part_status(name, part) for name, part in ordered),
        torn=tuple(found.torn),
        damaged=tuple(found.damaged),
        leaves=tuple(sorted(leaf_names(parts))),
        bytes=sum(part.bytes for part in parts.values()),
        processes=tuple(sorted({part.process for part in parts.values()})),
        custom_metadata=merge_metadata(part.custom_metadata for _, part in ordered),
        training=merge_metadata(part.training for _, part in ordered),
    )


def _part_status(name: str, part: Part) -> PartStatus:
    return PartStatus(
        name=name,
        process=part.process,
        written_at=part.time_ns / 1e9,
        leaves=tuple(leaf.name for leaf in part.leaves),
        bytes=part.bytes,
        custom_metadata=part.custom_metadata,
        training=part.training,
    )
