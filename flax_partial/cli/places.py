"""What a command's path leads to: a finalized checkpoint, or an unfinished one."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax_partial.cli.errors import WrongUseError
from flax_partial.errors import CheckpointInUseError, NoSessionError
from flax_partial.finalizing.status import status_of
from flax_partial.format.merge import MergePlan, merge
from flax_partial.format.model import Contents, Part
from flax_partial.loading.catalog import is_finalized
from flax_partial.loading.checkpoint import (
    Checkpoint,
    describe_checkpoint,
    described,
    open_checkpoint,
)
from flax_partial.reports import CheckpointMetadata, SessionStatus
from flax_partial.runs import completeness, liveness
from flax_partial.storage import directories, places
from flax_partial.storage.paths import DELETED_SUFFIX, STATE
from flax_partial.storage.place import Place
from flax_partial.storage.store_path import AnyPath, StorePath, in_store

Given = str | AnyPath
FINALIZED, UNFINISHED, DAMAGED, DROPPED = "finalized", "unfinished", "damaged", "dropped"
OURS, ORBAX = "flax_partial", "orbax"


def argument(text: str) -> str | StorePath:
    """Takes an argument of the command line: in what is said of a URL no secret of it is shown.

    Raises:
      WrongUseError: It is a URL that names nothing.
    """
    try:
        return in_store(text) or text
    except ValueError as error:
        raise WrongUseError(str(error)) from error


def given(path: Given) -> AnyPath:
    """Takes a path, or URL, as it stands on a command line, and leaves it relative where it is.

    Raises:
      WrongUseError: It is a URL that nothing serves, or what serves it is not installed.
    """
    try:
        return directories.given(path)
    except (ImportError, ValueError) as error:
        raise WrongUseError(str(error)) from error


def local(path: Given) -> Path:
    """Takes the path of a file as it stands on a command line, as `given` does.

    Raises:
      WrongUseError: It is a URL.
    """
    found = given(path)
    if not isinstance(found, Path):
        raise WrongUseError(f"{found} is a URL, and has to be the path of a local file")
    return found


def resolve(path: Given) -> Place:
    """Takes the path of a checkpoint, or of its session, as it stands on a command line.

    Raises:
      WrongUseError: It cannot name a checkpoint.
    """
    try:
        where = places.resolve(path)
    except (ImportError, ValueError) as error:
        raise WrongUseError(str(error)) from error
    if is_removed(where.final.name):
        raise WrongUseError(
            f"{path} is what is left of a checkpoint that was removed; nothing needs it"
        )
    return where


def is_removed(name: str) -> bool:
    """Whether a directory is what is left of a checkpoint, or session, that was removed."""
    return name.startswith(".") and name.endswith(DELETED_SUFFIX)


def is_there(where: Place) -> bool:
    """Whether anything is where a finalized checkpoint would be."""
    final = where.final
    return os.path.lexists(final) if isinstance(final, Path) else is_finalized(final)


def is_session_meant(path: Given, where: Place) -> bool:
    """Whether a path is that of a session, not of a checkpoint that may lie beside it."""
    return places.names_session(path) and where.is_session()


def finalized(path: Given) -> Place:
    """Takes the path of a checkpoint that has to be finalized.

    Raises:
      WrongUseError: It cannot name a checkpoint, or is that of a session.
    """
    where = resolve(path)
    if is_session_meant(path, where):
        raise WrongUseError(f"{where.session} is not finalized: finalize it first")
    return where


@contextmanager
def open_finalized(path: Given) -> Iterator[Checkpoint]:
    """Opens a finalized checkpoint, which no process can remove before the context ends.

    Raises:
      WrongUseError: `path` is that of a session.
      NoSessionError: There is none.
      CorruptCheckpointError: Its table of contents is damaged.
    """
    where = finalized(path)
    with where.reading():
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

    where: Place
    parts: dict[str, Part]
    status: SessionStatus
    plan: MergePlan

    @property
    def lacking(self) -> list[str]:
        """What the callback that saves into it had not saved yet: a sentence, or none.

        None, too, where no callback saves into it: then it is not known what is to come.
        """
        recorded = completeness.recorded(self.status)
        if not completeness.is_by_callbacks(recorded):
            return []
        missing = completeness.missing(self.status, recorded.get("step", -1))
        return [missing] if missing else []


def shown(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without what callbacks keep to recover from a crash."""
    hidden = "session" if completeness.is_by_callbacks(metadata) else None
    return {key: value for key, value in metadata.items() if key != hidden}


def read_session(where: Place, known: dict[str, Part] | None = None) -> Session:
    """Looks at an unfinished checkpoint, without waiting for saves that are under way.

    Args:
      where: Its paths.
      known: Parts read before, by name.

    Raises:
      NoSessionError: There is none.
    """
    if not where.is_session():
        raise where.no_session()
    if is_foreign(where):
        raise NoSessionError(
            f"{where.session} is not an unfinished checkpoint of flax_partial: only the program "
            "that began it can finish it, perhaps Orbax."
        )
    found = where.read_parts(known=known)
    parts = found.committed
    return Session(where, parts, status_of(where.final, found), merge(parts))


def require_ended(where: Place) -> None:
    """Raises CheckpointInUseError if a run that lives saves into a session's directory."""
    run = liveness.living(where.final.parent)
    if run is not None:
        raise CheckpointInUseError(
            f"{where.session} is left as it is: a run trains in its directory ({run}), and would "
            "fail. Wait for it to end, or pass --anyway."
        )


def is_foreign(where: Place) -> bool:
    """Whether a session's directory holds something, but nothing of ours."""
    names = directories.names(where.session)
    return bool(names) and STATE not in names


def read_contents(path: Given) -> tuple[Contents, CheckpointMetadata, str]:
    """Returns what is, or will be, in a checkpoint: of a session, what was saved so far.

    Returns:
      The table of contents, its description, and `FINALIZED` or `UNFINISHED`.

    Raises:
      NoSessionError: There is neither.
      CorruptCheckpointError: It is damaged.
    """
    where = resolve(path)
    if not where.is_session() or (is_there(where) and not is_session_meant(path, where)):
        with where.reading():
            checkpoint = open_checkpoint(where)
            return checkpoint.contents, describe_checkpoint(where, checkpoint), FINALIZED
    session = read_session(where)
    newest_ns = max((part.time_ns for part in session.parts.values()), default=0)
    contents = replace(session.plan.contents, committed_ns=newest_ns)
    return contents, described(where, contents), UNFINISHED
