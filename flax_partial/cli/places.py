"""What a command's path leads to: a finalized checkpoint, or an unfinished one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_partial.cli.errors import WrongUseError
from flax_partial.errors import CheckpointInUseError, NoSessionError
from flax_partial.finalizing.status import status_of
from flax_partial.format.merge import MergePlan, merge
from flax_partial.format.model import Contents, Part
from flax_partial.loading.checkpoint import (
    Checkpoint,
    describe_checkpoint,
    described,
    open_checkpoint,
)
from flax_partial.reports import CheckpointMetadata, SessionStatus
from flax_partial.runs import completeness, liveness
from flax_partial.storage import checkpoint_dir, files, paths, places, session_dir
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.parts import read_parts
from flax_partial.storage.paths import DELETED_SUFFIX, SESSION_SUFFIX, STATE

FINALIZED, UNFINISHED, DAMAGED, DROPPED = "finalized", "unfinished", "damaged", "dropped"
OURS, ORBAX = "flax_partial", "orbax"


def local(path: str) -> Path:
    """Takes a path as it stands on a command line, and leaves it relative where it is.

    Raises:
      WrongUseError: It is a URL.
    """
    try:
        return Path(paths.expanded(path))
    except ValueError as error:
        raise WrongUseError(str(error)) from error


def resolve(path: str) -> LocalPlace:
    """Takes the path of a checkpoint, or of its session, as it stands on a command line.

    Raises:
      WrongUseError: It cannot name a checkpoint.
    """
    try:
        where = places.resolve(path)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    if not isinstance(where, LocalPlace):
        raise WrongUseError(f"{path} is a URL of an object store, where this command does not go")
    if is_removed(where.final.name):
        raise WrongUseError(
            f"{path} is what is left of a checkpoint that was removed; nothing needs it"
        )
    return where


def is_removed(name: str) -> bool:
    """Whether a directory is what is left of a checkpoint, or session, that was removed."""
    return name.startswith(".") and name.endswith(DELETED_SUFFIX)


def is_session_meant(path: str, where: LocalPlace) -> bool:
    """Whether a path is that of a session, not of a checkpoint that may lie beside it."""
    return path.rstrip("/").endswith(SESSION_SUFFIX) and session_dir.is_session(where)


def finalized(path: str) -> LocalPlace:
    """Takes the path of a checkpoint that has to be finalized.

    Raises:
      WrongUseError: It cannot name a checkpoint, or is that of a session.
    """
    where = resolve(path)
    if is_session_meant(path, where):
        raise WrongUseError(f"{where.session} is not finalized: finalize it first")
    return where


@contextmanager
def open_finalized(path: str) -> Iterator[Checkpoint]:
    """Opens a finalized checkpoint, which no process can remove before the context ends.

    Raises:
      WrongUseError: `path` is that of a session.
      NoSessionError: There is none.
      CorruptCheckpointError: Its table of contents is damaged.
    """
    where = finalized(path)
    with checkpoint_dir.reading(where.final):
        yield open_checkpoint(where)


def written_by(metadata: CheckpointMetadata) -> str:
    """Which program wrote a finalized checkpoint."""
    return OURS if metadata.parts else ORBAX


@dataclass(frozen=True, slots=True)
class Session:
    """An unfinished checkpoint, at one moment.

    Attributes:
      where: Its paths.
      parts: Name of each committed part -> what it holds.
      status: What the parts are.
      plan: What finalize would make of them.
    """

    where: LocalPlace
    parts: dict[str, Part]
    status: SessionStatus
    plan: MergePlan

    @property
    def lacking(self) -> str:
        """What the callback that saves into it had not saved yet; empty if it is all there.

        Also empty where no callback saves into it: then it is not known what is to come.
        """
        metadata = self.status.custom_metadata
        if metadata == users_metadata(metadata):
            return ""
        return completeness.missing(self.status, metadata.get("step", -1)) or ""


def users_metadata(custom_metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Custom metadata without what the callback keeps there to recover from a crash."""
    session = custom_metadata.get("session")  # perhaps the user's own, and of any type
    if isinstance(session, dict) and isinstance(session.get("saved"), dict):
        return {key: value for key, value in custom_metadata.items() if key != "session"}
    return dict(custom_metadata)


def read_session(where: LocalPlace, known: dict[str, Part] | None = None) -> Session:
    """Looks at an unfinished checkpoint, without waiting for saves that are under way.

    Args:
      where: Its paths.
      known: Parts read before, by name.

    Raises:
      NoSessionError: There is none.
    """
    if not session_dir.is_session(where):
        raise session_dir.no_session(where)
    if is_foreign(where):
        raise NoSessionError(
            f"{where.session} is not an unfinished checkpoint of flax_partial: only the program "
            "that began it can finish it, perhaps Orbax."
        )
    found = read_parts(where.state, known=known)
    parts = found.committed
    return Session(where, parts, status_of(where.final, found), merge(parts))


def require_ended(where: LocalPlace) -> None:
    """Raises CheckpointInUseError if a run that lives saves into a session's directory."""
    run = liveness.living(where.final.parent)
    if run is not None:
        raise CheckpointInUseError(
            f"{where.session} is left as it is: a run trains in its directory ({run}), and would "
            "fail. Wait for it to end, or pass --anyway."
        )


def is_foreign(where: LocalPlace) -> bool:
    """Whether a session's directory holds something, but nothing of ours."""
    names = files.listed(where.session)
    return bool(names) and STATE not in names


def read_contents(path: str) -> tuple[Contents, CheckpointMetadata, str]:
    """Returns what is, or will be, in a checkpoint: of a session, what was saved so far.

    Returns:
      The table of contents, its description, and `FINALIZED` or `UNFINISHED`.

    Raises:
      NoSessionError: There is neither.
      CorruptCheckpointError: It is damaged.
    """
    where = resolve(path)
    is_there = where.final.exists() and not is_session_meant(path, where)
    if is_there or not session_dir.is_session(where):
        checkpoint = open_checkpoint(where)
        return checkpoint.contents, describe_checkpoint(where, checkpoint), FINALIZED
    session = read_session(where)
    contents = Contents(
        started_ns=session.plan.started_ns,
        committed_ns=max((part.time_ns for part in session.parts.values()), default=0),
        parts=len(session.parts),
        custom_metadata=session.plan.custom_metadata,
        leaves=session.plan.leaves,
    )
    return contents, described(where, contents), UNFINISHED
