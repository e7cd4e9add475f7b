"""Locks a run's directory: one process at a time, always with the same model and data.

The directory holds the callback's checkpoints and `run.json`: the options that the state depends
on, locked for as long as the run lasts. The system releases it when the process ends in any way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RECORD = "run.json"


class DirectoryError(Exception):
    """The directory cannot be used for this run; the message gives the reason and the remedy."""


@contextlib.contextmanager
def claim(directory: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Locks the directory for this run; makes it if it does not exist.

    Args:
        directory: of the run's checkpoints.
        options: JSON; a run can be continued only with those it began with.

    Raises:
        DirectoryError: It cannot be used, is in use, or holds something else.
    """
    with _open_record(directory) as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryError(f"another run is using '{directory}'") from None
        if _names(directory) == [RECORD]:  # nothing to go on with: the options may change
            record.truncate(0)
            json.dump(options, record)
            record.flush()
        _check_same(directory, options, record)
        yield


def _open_record(directory: Path) -> TextIO:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = _names(directory)
        if names and RECORD not in names:
            raise DirectoryError(f"'{directory}' is not empty, and holds no run of this example")
        return (directory / RECORD).open("a+", encoding="utf-8")
    except (FileExistsError, NotADirectoryError):
        raise DirectoryError(f"'{directory}' is a file, or below one") from None
    except OSError as error:
        raise DirectoryError(f"cannot use '{directory}': {error.strerror}") from None


def _check_same(directory: Path, options: Mapping[str, Any], record: TextIO) -> None:
    record.seek(0)
    try:
        begun_with = dict(json.load(record))
    except (TypeError, ValueError):
        raise DirectoryError(f"'{directory / RECORD}' is damaged: use another directory") from None
    if begun_with != options:
        listed = ", ".join(f"{name} {value}" for name, value in begun_with.items())
        raise DirectoryError(
            f"'{directory}' holds a run with {listed}: go on with these, or use another directory"
        )


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())
