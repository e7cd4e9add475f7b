"""Checks all of a finalized checkpoint: every digest, and every file that finalize derived."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from flax_partial import collector
from flax_partial.errors import CorruptCheckpointError
from flax_partial.format import orbax as orbax_format
from flax_partial.format.derive import Derived, derive
from flax_partial.format.merge import MergePlan, merge
from flax_partial.format.model import Contents
from flax_partial.loading.batches import batches
from flax_partial.loading.checkpoint import open_checkpoint
from flax_partial.reports import VerifyReport
from flax_partial.storage import places
from flax_partial.storage.paths import CONTENTS, STATE, PathLike
from flax_partial.storage.place import Place

_VERIFIED_AT_ONCE_BYTES = 128 << 20


def verify(path: PathLike) -> VerifyReport:
    """Reads all of a finalized checkpoint and checks every digest.

    The files that are derived from the parts are derived once more and compared. Of a checkpoint
    that Orbax wrote, which has no digests, it reports whether everything can be read.

    Args:
      path: The checkpoint.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
    """
    return verify_with(path, progress=lambda _done, _total: None)


def verify_with(path: PathLike, *, progress: Callable[[int, int], None]) -> VerifyReport:
    """Does what `verify` does, and reports after each batch how many bytes of how many are read."""
    where = places.resolve(path)
    with collector.paused(), where.reading():
        return _verify(where, progress)


def _verify(where: Place, progress: Callable[[int, int], None]) -> VerifyReport:
    try:
        checkpoint = open_checkpoint(where)
    except CorruptCheckpointError as error:
        where.require_unremoved()
        return VerifyReport(where.final, 0, 0, {str(where.final): str(error)})
    leaves = checkpoint.contents.leaves
    bad = dict(_derived_problems(where, checkpoint.contents)) if checkpoint.contents.parts else {}
    bad |= {name: str(why) for name, why in checkpoint.composition.broken.items()}
    # Orbax's shapes have no digest: one of absurd size has to fail whole, not be read forever.
    is_cut = bool(checkpoint.contents.parts)
    at_once = _VERIFIED_AT_ONCE_BYTES
    for batch in batches(leaves, most_bytes=at_once, progress=progress, cut=is_cut):
        for (leaf, _, _), outcome in zip(batch, checkpoint.read(batch), strict=True):
            if isinstance(outcome, Exception):
                bad[leaf.name] = str(outcome)
    if bad:
        where.require_unremoved()
    return VerifyReport(where.final, len(leaves), sum(leaf.bytes for leaf in leaves), bad)


def _derive_again(
    plan: MergePlan, contents: Contents, contents_bytes: bytes | None
) -> Derived | None:
    if plan.conflicts or plan.missing:
        return None
    return derive(
        plan,
        committed_ns=contents.committed_ns,
        has_inline=contents.has_inline,
        contents_bytes=contents_bytes,
    )


def _derived_problems(where: Place, contents: Contents) -> Iterator[tuple[str, str]]:
    """Derives the root files from the parts once more; yields those that differ, and why."""
    found = where.read_own_parts()
    yield from ((f"{STATE}/{name}", why) for name, why in found.damaged.items())
    yield from ((f"{STATE}/{name}", "it has no table of contents") for name in found.torn)
    derived = None
    if not found.torn and not found.damaged:
        derived = _derive_again(merge(found.committed), contents, where.contents_bytes())
        if derived is None or derived.contents != contents:
            yield f"{STATE}/{CONTENTS}", "it is not what the parts add up to"
        else:
            derived = replace(derived, contents=contents)  # so that the parts' leaves can go
    derived_files = orbax_format.root_files(contents) if derived is None else derived.root_files()
    del found, derived
    for name, pieces in derived_files:
        if not where.holds(name, pieces):
            yield name, "it is missing, or not what the parts add up to"
