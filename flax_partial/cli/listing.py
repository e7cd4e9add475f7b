"""What lies in a run's directory: its checkpoints and unfinished sessions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax_partial as fp
from flax_partial.cli import places, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.places import Given
from flax_partial.loading import catalog
from flax_partial.loading.catalog import is_finalized
from flax_partial.runs.completeness import recorded
from flax_partial.runs.directory import unfinished
from flax_partial.storage import directories
from flax_partial.storage.parts import part_names
from flax_partial.storage.paths import CONTENTS, SESSION_SUFFIX, STATE
from flax_partial.storage.place import Place
from flax_partial.storage.store_path import AnyPath


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint or session in a directory, as far as it can be read; as `--json` has it.

    Attributes:
      name: Of its directory.
      state: `FINALIZED`, `UNFINISHED` or `DAMAGED`.
      format: `OURS` or `ORBAX`.
      step: The step that it is of; None where it is not known.
      written_at: When it was finalized, or last saved to, in seconds since the epoch.
      bytes: Array data in it, in bytes.
      leaves: Number of leaves.
      metrics: Those that are stored with it.
      problem: What is wrong with it; None if nothing is.
    """

    name: str
    state: str
    format: str = places.OURS
    step: int | None = None
    written_at: float | None = None
    bytes: int = 0
    leaves: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


def directory(path: Given) -> AnyPath:
    """Takes the path of a run's directory.

    Raises:
      WrongUseError: There is none.
    """
    found = places.given(path)
    if not found.is_dir():
        raise WrongUseError(f"{path} is not a directory" if found.exists() else absent(found))
    if found.resolve().name.endswith(SESSION_SUFFIX) or is_finalized(found):
        raise WrongUseError(f"{path} is a checkpoint, not a directory of them: use show or status")
    return found


def is_run(path: Given) -> bool:
    """Whether a path is that of a directory that is no checkpoint, finalized or not.

    Raises:
      WrongUseError: It cannot name a checkpoint.
    """
    found = places.given(path)
    is_local = isinstance(found, Path)
    if is_local and (found / STATE).exists():
        return False
    is_session = (is_local or bool(found.name)) and places.resolve(path).is_session()
    return not is_session and not is_finalized(found) and found.is_dir()


def entries(directory: AnyPath) -> list[Entry]:
    """Reads what is in a directory: by step, then by name."""
    names = [name for name in directories.names(directory) if not places.is_removed(name)]
    looked = directories.for_each(directory, _entry, [directory / name for name in names])
    found = [entry for entry in looked if entry is not None]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def one_checkpoint(path: Given, out: Output, state: str = places.FINALIZED) -> Given:
    """Takes the path of a checkpoint; that of a run means the newest in it, which a note names.

    Args:
      path: As it stands on the command line.
      out: Where the note goes.
      state: Of the checkpoint, `FINALIZED` or `UNFINISHED`.

    Raises:
      WrongUseError: It cannot name a checkpoint, or is a run that has none in this state.
    """
    if not is_run(path):
        require_something(path)
        return path
    found = _newest_of(path, state)
    out.note(f"{path} is a run: its newest {state} checkpoint is {found}")
    return found


def no_run(path: Given, state: str) -> Place:
    """Takes the path of a checkpoint that is to be changed, which a run does not stand for.

    Args:
      path: As it stands on the command line.
      state: Of the checkpoint, `FINALIZED` or `UNFINISHED`.

    Raises:
      WrongUseError: It cannot name a checkpoint, there is none, or it is that of a run.
    """
    if is_run(path):
        found = _newest_of(path, state)
        raise WrongUseError(f"{path} is a run: its newest {state} checkpoint is {found}")
    require_something(path)
    return places.resolve(path)


def _newest_of(path: Given, state: str) -> AnyPath:
    directory = places.given(path)
    name = newest(directory, state)
    if name is None and not entries(directory):
        raise WrongUseError(f"{path} holds no checkpoint")
    if name is None:
        raise WrongUseError(f"{path} is a run that has no {state} checkpoint of a step")
    return directory / name


def newest(directory: AnyPath, state: str = places.FINALIZED) -> str | None:
    """Returns the checkpoint of the last step; in an object store by its name, without reading."""
    if isinstance(directory, Path):
        return latest(entries(directory), state)
    is_wanted_finalized = state == places.FINALIZED
    found = fp.latest(directory) if is_wanted_finalized else newest_session(directory)
    return None if found is None else found.name


def require_something(path: Given) -> None:
    """Raises WrongUseError, with what there is instead, where there is nothing at a path."""
    where = places.resolve(path)
    if places.is_there(where) or where.is_session():
        return
    parent = places.given(path).parent
    if not parent.is_dir():
        raise WrongUseError(absent(parent))
    names = [entry.name for entry in reversed(entries(parent))]
    if not names:
        raise WrongUseError(absent(places.given(path)))
    has = text.choices(places.given(path).name, names)
    raise WrongUseError(f"there is no checkpoint at {path}; {parent} has {has}")


def runs_in(directory: AnyPath) -> str:
    """Returns which runs a directory without checkpoints holds, to be added to that; or nothing."""
    meant = catalog.probably_meant(directory)
    return f".{meant}" if meant else ""


def absent(path: AnyPath) -> str:
    """Returns a sentence: nothing is at the path; with names beside it that are like its own."""
    close = text.close(path.name, directories.names(path.parent))
    return f"{path} does not exist" + (f"; there is {path.parent / close[0]}" if close else "")


def newest_session(directory: AnyPath) -> AnyPath | None:
    """Returns the unfinished checkpoint of ours that is called by the last step; reads none."""
    if not isinstance(directory, Path):
        steps = dict(unfinished(directory))
        return steps[max(steps)] if steps else None
    found = [
        (step, name)
        for name in directories.names(directory)
        if name.endswith(SESSION_SUFFIX)
        and (step := step_in_name(name)) is not None
        and not places.is_foreign(places.resolve(directory / name))
    ]
    return directory / max(found)[1] if found else None


def latest(entries: Sequence[Entry], state: str = places.FINALIZED) -> str | None:
    """Returns the checkpoint of the last step; of two that which is called by it."""
    ranked = [
        (one.step, one.name == str(one.step), one.name)
        for one in entries
        if one.state == state and one.step is not None
    ]
    return max(ranked)[-1] if ranked else None


def best(entries: Sequence[Entry], monitor: str | None, mode: str) -> str | None:
    """Returns the finalized checkpoint with the best score, the newer of equals.

    Raises:
      WrongUseError: None of them has this metric, though there are some.
    """
    finalized = [entry for entry in entries if entry.state == places.FINALIZED]
    if monitor is None or not finalized:
        return None
    sign = 1 if mode == "min" else -1
    scored = [one for one in finalized if monitor in one.metrics]
    if not scored:
        known = ", ".join(sorted({name for one in finalized for name in one.metrics}))
        raise WrongUseError(f"no checkpoint has a metric {monitor!r}; they have {known or 'none'}")
    return min(scored, key=lambda one: (sign * one.metrics[monitor], -(one.step or 0))).name


def _entry(path: AnyPath) -> Entry | None:
    """Returns None for what is neither a checkpoint nor a session."""
    try:
        if not isinstance(path, Path):
            return _finalized(path) if is_finalized(path) else _unfinished(path)
        if not path.is_dir():
            return None
        if path.name.endswith(SESSION_SUFFIX):
            return _unfinished(path)
        is_ours = (path / STATE / CONTENTS).exists() or part_names(path / STATE)
        if is_ours or is_finalized(path):
            return _finalized(path)
    except (fp.PartialCheckpointError, WrongUseError, OSError) as error:
        return Entry(path.name, places.DAMAGED, step=_step(path, {}), problem=str(error))
    return None


def _finalized(path: AnyPath) -> Entry:
    found = fp.metadata(places.resolve(path).final)
    is_whole = is_finalized(path)
    return Entry(
        name=path.name,
        state=places.FINALIZED if is_whole else places.DAMAGED,
        format=places.written_by(found),
        step=_step(path, recorded(found)),
        written_at=found.committed_at,
        bytes=found.bytes,
        leaves=len(found.leaves),
        metrics=_numbers(found.custom_metadata.get("metrics")),
        problem=None if is_whole else "_CHECKPOINT_METADATA or state/_METADATA is missing",
    )


def _unfinished(path: AnyPath) -> Entry | None:
    where = places.resolve(path)
    if isinstance(path, Path) and places.is_foreign(where):
        return Entry(path.name, places.UNFINISHED, places.ORBAX, _step(where.final, {}))
    try:
        status = fp.status(where.final)
    except fp.NoSessionError:  # finalized or dropped meanwhile
        return None
    return Entry(
        name=path.name,
        state=places.UNFINISHED,
        step=_step(where.final, recorded(status)),
        written_at=max((part.written_at for part in status.parts), default=None),
        bytes=status.bytes,
        leaves=len(status.leaves),
        metrics=_numbers(status.custom_metadata.get("metrics")),
    )


def _step(path: AnyPath, metadata: dict[str, Any]) -> int | None:
    step = metadata.get("step")
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    return step_in_name(path.name)


def step_in_name(name: str) -> int | None:
    """Returns the step that a checkpoint or session is called by: 12 in `prefix_0000012`."""
    return catalog.step_in_name(name.removesuffix(SESSION_SUFFIX))


def _numbers(metrics: object) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    }
