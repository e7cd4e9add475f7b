"""A run's directory of steps: `directory/<step>/`, each a finalized checkpoint.

Orbax's managers may call a step `ckpt_20` (`step_prefix`), or `00000020` (a fixed length). Such
names count where Orbax wrote the checkpoint: `exp_1` that this package saved is no step of a run.

In an object store a step is called by its number alone, and counts once it is published.
"""

import difflib
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from flax_partial.errors import NoSessionError, StoreAccessError, first_few
from flax_partial.format import orbax as orbax_format
from flax_partial.loading import orbax_reader
from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.workers import Task
from flax_partial.storage import directories, places
from flax_partial.storage.object_place import StorePlace
from flax_partial.storage.paths import CONTENTS, SESSION_SUFFIX, STATE, PathLike
from flax_partial.storage.store_path import AnyPath, StorePath

_LOG = logging.getLogger("flax_partial")
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


def latest(directory: PathLike) -> AnyPath | None:
    """Returns the finalized checkpoint of a run's last step; None if it has none.

    Older steps are not looked at: in an object store it takes the requests of one listing of names,
    one for each step at the end that is not finalized, and three for the one that is. The mark of a
    checkpoint that was removed may be there, put late: such steps at the end are skipped, with a
    warning, and one that is damaged is not.

    Args:
      directory: The run's directory, or its URL.
    """
    root = directories.absolute(directory)
    found = (_of_step(root, names) for names in reversed(names_by_step(root).values()))
    return next((path for path in found if path is not None and _is_there(path)), None)


def checkpoints(directory: PathLike) -> dict[int, AnyPath]:
    """Returns the finalized checkpoints in a run's directory by step, ascending; absolute paths.

    Of two that are of one step, that counts which is called by it. At the end, what `latest` skips
    is left out.
    """
    root = directories.absolute(directory)
    named = names_by_step(root)
    paths = directories.for_each(root, partial(_of_step, root), named.values())
    found = {step: path for step, path in zip(named, paths, strict=True) if path is not None}
    while found and not _is_there(next(reversed(found.values()))):
        found.popitem()
    return found


def _is_there(path: AnyPath) -> bool:
    """Whether a checkpoint that is marked as finalized was not removed before the mark was put."""
    is_there = isinstance(path, Path) or StorePlace(path).is_more_than_a_mark()
    if not is_there:
        _warn_of_mark(path)
    return is_there


@cache
def _warn_of_mark(path: AnyPath) -> None:
    _LOG.warning(
        "Skipped %s: the checkpoint was removed. If a process that died later has put its "
        "commit_success.txt again, fp.remove deletes that.",
        path,
    )


def names_by_step(root: AnyPath) -> dict[int, list[str]]:
    """Returns the names in a directory that may be those of a step, ascending; reads nothing.

    Those that are called just by the step come first.
    """
    named: dict[int, list[str]] = {}
    for name in directories.names(root):
        step = step_in_name(name)
        is_plain = name == str(step)
        if step is None or (isinstance(root, StorePath) and not is_plain):
            continue
        names = named.setdefault(step, [])
        names.insert(0 if is_plain else len(names), name)
    return dict(sorted(named.items()))


def _of_step(root: AnyPath, names: Sequence[str]) -> AnyPath | None:
    """Returns the first finalized one of the names of a step."""
    for name in names:
        path = root / name
        is_plain = name == str(step_in_name(name))
        if is_finalized(path) and (is_plain or not (path / STATE / CONTENTS).exists()):
            return path
    return None


def step_in_name(name: str) -> int | None:
    """Returns the step that a checkpoint is called by: 12 in `12`, `0000012` and `prefix_12`."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def checkpoint_around(path: AnyPath) -> AnyPath | None:
    """Returns the checkpoint, finalized or not, that a path lies in or is; None if in none.

    In an object store only finalized ones are seen, and what may not be looked at is none.
    """
    around: list[AnyPath] = [path, *path.parents]
    around.reverse()
    are_checkpoints = directories.for_each(path, _is_checkpoint, around)
    return next((one for one, is_one in zip(around, are_checkpoints, strict=True) if is_one), None)


def _is_checkpoint(path: AnyPath) -> bool:
    if isinstance(path, StorePath):
        with suppress(StoreAccessError):
            return directories.is_published(path)
        return False
    is_session = path.name.endswith(SESSION_SUFFIX) and (path / STATE).is_dir()
    return is_session or any((path / mark).is_file() for mark in _MARKS)


def probably_meant(path: AnyPath) -> str:
    """Returns, as a sentence after a space, which checkpoint was probably meant."""
    try:
        return _meant(path)
    except OSError:  # of a directory that this process may not read
        return ""


def _meant(path: AnyPath) -> str:
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
    names = sorted(directories.names(path))[:_MOST_RUNS]
    runs = {name: found for name in names if (found := checkpoints(path / name))}
    if runs:
        said = [f"{name} (steps {_listed(found)})" for name, found in runs.items()]
        return f" It holds runs: {', '.join(first_few(said, most=_SHOWN, count=len(said)))}."
    return ""


def called_alike(path: Path) -> str:
    """Returns, as a sentence after a space, what stands beside a path that is not there."""
    if path.exists():
        return ""
    close = difflib.get_close_matches(path.name, directories.names(path.parent), n=1)
    return f" There is {path.parent / close[0]}." if close else ""


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
        raise NoSessionError(
            f"There is no finalized checkpoint at {where.final}.{probably_meant(where.final)}"
        )
    workers.finalizing.run(Task(lambda _: where.remove_checkpoint(), Handle[None]()))


def is_finalized(path: AnyPath) -> bool:
    """Whether a directory is a finalized checkpoint, ours or Orbax's."""
    if isinstance(path, StorePath):
        return directories.is_published(path)
    if (path / "_CHECKPOINT_METADATA").is_file() and (path / STATE / "_METADATA").is_file():
        return True
    return orbax_reader.is_checkpoint(path)
