"""A run's directory of steps: `directory/<step>/`, each a finalized checkpoint."""

from pathlib import Path

from flax_partial.errors import NoSessionError
from flax_partial.loading import orbax_reader
from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.workers import Task
from flax_partial.storage import checkpoint_dir, files, paths
from flax_partial.storage.paths import STATE, PathLike


def steps(directory: PathLike) -> list[int]:
    """Returns the steps of the finalized checkpoints in a run's directory, ascending.

    A checkpoint counts by what is in it, never by its name alone: sessions, and directories that
    only look like a step, are left out. Steps that Orbax wrote count too. A directory that is not
    there holds none.

    Args:
      directory: The run's directory.
    """
    root = Path(directory)
    return sorted(
        int(name) for name in files.listed(root) if _is_step(name) and is_finalized(root / name)
    )


def latest(directory: PathLike) -> Path | None:
    """Returns the finalized checkpoint of a run's last step; None if it has none.

    Args:
      directory: The run's directory.
    """
    found = steps(directory)
    return Path(directory).absolute() / str(found[-1]) if found else None


def remove(path: PathLike) -> None:
    """Removes a finalized checkpoint, ours or Orbax's, unless somebody is reading it.

    It disappears at once, by a rename, and is deleted then. Killed, or cut off from power, at any
    moment, the checkpoint is there whole, or not at all; what may be left of it lies beside it, as
    `.<name>.<hex>.deleted`, which no reader takes for a checkpoint.

    Args:
      path: The checkpoint.

    Raises:
      CheckpointInUseError: `load`, `metadata` or `verify` reads it now, here or in another process;
        it was left as it is. Orbax's own readers are not known of.
      NoSessionError: There is no finalized checkpoint at `path`.
      OSError: It cannot be removed, or only in part: then it is no checkpoint any more.
    """
    check_not_forked("remove")
    where = paths.resolve(path)
    if paths.names_session(path):  # it was meant for what is unfinished, as it was a moment ago
        raise NoSessionError(f"There is no finalized checkpoint at {where.session}: abort it.")
    if not is_finalized(where.final):
        raise NoSessionError(f"There is no finalized checkpoint at {where.final}.")
    workers.finalizing.run(Task(lambda _: checkpoint_dir.remove_checkpoint(where), Handle[None]()))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def is_finalized(path: Path) -> bool:
    """Whether a directory is a finalized checkpoint, ours or Orbax's."""
    state = path / STATE
    if (path / "_CHECKPOINT_METADATA").is_file() and (state / "_METADATA").is_file():
        return True
    return orbax_reader.is_checkpoint(path)
