"""A run's directory of steps: `directory/<step>/`, each a finalized checkpoint.

Orbax's managers may call a step `ckpt_20` (`step_prefix`), or `00000020` (a fixed length). Such
names count where Orbax wrote the checkpoint: `exp_1` that this package saved is no step of a run.
"""

from collections.abc import Iterable
from pathlib import Path

from flax_partial.errors import NoSessionError, first_few
from flax_partial.format import orbax as orbax_format
from flax_partial.loading import orbax_reader
from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.workers import Task
from flax_partial.storage import files, paths, places
from flax_partial.storage.paths import CONTENTS, SESSION_SUFFIX, STATE, PathLike

_MARKS = (
    orbax_format.CHECKPOINT_METADATA,
    orbax_format.V1_MARKER,
    orbax_format.TREE_METADATA,
)
_SHOWN = 5
_MOST_RUNS = 50  # that are looked at, to say which was meant


def steps(directory: PathLike) -> list[int]:
    """Returns the steps of the finalized checkpoints in a run's directory, ascending.

    A checkpoint counts by what is in it, never by its name alone: sessions, and directories that
    only look like a step, are left out. Steps that Orbax wrote count too. A directory that is not
    there holds none.

    Args:
      directory: The run's directory.
    """
    return list(checkpoints(directory))


def latest(directory: PathLike) -> Path | None:
    """Returns the finalized checkpoint of a run's last step; None if it has none.

    Args:
      directory: The run's directory.
    """
    return next(reversed(checkpoints(directory).values()), None)


def checkpoints(directory: PathLike) -> dict[int, Path]:
    """Returns the finalized checkpoints in a run's directory by step, ascending; absolute paths.

    Of two that are of one step, that counts which is called by it.
    """
    root = Path(paths.absolute(directory))
    found: dict[int, Path] = {}
    for name in files.listed(root):
        step = step_in_name(name)
        is_plain = name == str(step)
        if step is None or (step in found and not is_plain) or not is_finalized(root / name):
            continue
        if is_plain or not (root / name / STATE / CONTENTS).exists():
            found[step] = root / name
    return dict(sorted(found.items()))


def step_in_name(name: str) -> int | None:
    """Returns the step that a checkpoint is called by: 12 in `12`, `0000012` and `prefix_12`."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def checkpoint_around(path: Path) -> Path | None:
    """Returns the checkpoint, finalized or not, that a path lies in or is; None if in none."""
    for place in (*reversed(path.parents), path):
        is_session = place.name.endswith(SESSION_SUFFIX) and (place / STATE).is_dir()
        if is_session or any((place / mark).is_file() for mark in _MARKS):
            return place
    return None


def probably_meant(path: Path) -> str:
    """Returns, as a sentence after a space, which checkpoint was probably meant."""
    try:
        return _meant(path)
    except OSError:  # of a directory that this process may not read
        return ""


def _meant(path: Path) -> str:
    around = checkpoint_around(path)
    if around is not None and around != path:
        return f" The path lies in the checkpoint {around}."
    found = checkpoints(path)
    if found:
        newest = next(reversed(found.values()))
        return f" It is a run: its newest checkpoint is {newest}, its steps are {_listed(found)}."
    beside = checkpoints(path.parent) if step_in_name(path.name) is not None else {}
    if beside:
        return f" {path.parent} holds steps {_listed(beside)}."
    names = sorted(files.listed(path))[:_MOST_RUNS]
    runs = {name: held for name in names if (held := checkpoints(path / name))}
    if runs:
        said = [f"{name} (steps {_listed(held)})" for name, held in runs.items()]
        return f" It holds runs: {', '.join(first_few(said, most=_SHOWN, count=len(said)))}."
    return ""


def _listed(steps: Iterable[int]) -> str:
    """The last ones of ascending steps, as text."""
    shown = [str(step) for step in steps]
    return ", ".join(["...", *shown[-_SHOWN:]] if len(shown) > _SHOWN else shown)


def remove(path: PathLike) -> None:
    """Removes a finalized checkpoint, ours or Orbax's, unless it is being read.

    It disappears at once, by a rename, and is deleted then. Killed, or cut off from power, at any
    moment, the checkpoint is there whole, or not at all; what may be left of it lies beside it, as
    `.<name>.<hex>.deleted`, which no reader takes for a checkpoint.

    Args:
      path: The checkpoint.

    Raises:
      CheckpointInUseError: `load`, `metadata` or `verify` reads it now, here or in another process;
        it was left as it is. Orbax's own readers are not detected.
      NoSessionError: There is no finalized checkpoint at `path`.
      OSError: It cannot be removed, or only in part: then it is no checkpoint any more.
    """
    check_not_forked("remove")
    where = places.resolve(path)
    if places.names_session(path):  # it was meant for what is unfinished, as it was a moment ago
        raise NoSessionError(f"There is no finalized checkpoint at {where.session}: abort it.")
    if isinstance(where.final, Path) and not is_finalized(where.final):
        raise NoSessionError(f"There is no finalized checkpoint at {where.final}.")
    workers.finalizing.run(Task(lambda _: where.remove_checkpoint(), Handle[None]()))


def is_finalized(path: Path) -> bool:
    """Whether a directory is a finalized checkpoint, ours or Orbax's."""
    state = path / STATE
    if (path / "_CHECKPOINT_METADATA").is_file() and (state / "_METADATA").is_file():
        return True
    return orbax_reader.is_checkpoint(path)
