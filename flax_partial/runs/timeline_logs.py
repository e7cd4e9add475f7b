"""Where the lines of a timeline are written: into a file, or into objects of an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import jax

from flax_partial.runs.timeline import FOLDER, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flax_partial.storage.store_path import AnyPath, StorePath

_MOST_BYTES = 16 << 20  # of a file, or of a run's objects; then the oldest ones go
_OBJECT_BYTES = 256 << 10
_MOST_OBJECTS = _MOST_BYTES // _OBJECT_BYTES


class Log(Protocol):
    """What this process writes of a run's timeline; one thread at a time."""

    takes_often: bool
    """Whether to append costs little."""

    def begin(self, run: str) -> None:
        """Has what follows belong to another run."""
        ...

    def append(self, lines: Sequence[str]) -> None:
        """Appends lines.

        Raises:
          OSError: They cannot be written.
        """
        ...


def log_of(directory: AnyPath) -> Log:
    """Returns the log of this process in a run's directory."""
    return FileLog(directory) if isinstance(directory, Path) else ObjectLog(directory)


class FileLog:
    """Appends to a file; see `Log`."""

    takes_often = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._run = ""
        self._has_begun = False  # whether the file says which run follows

    def begin(self, run: str) -> None:
        """Has the next lines written after one that says which run follows."""
        self._run, self._has_begun = run, False

    def append(self, lines: Sequence[str]) -> None:
        """Appends lines, to another file where this one has become large."""
        process = jax.process_index()
        path = self._directory / FOLDER / f"p{process}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        has_begun, self._has_begun = self._has_begun, False  # part of a line may get written
        with path.open("a", encoding="utf-8") as file:
            if file.tell() > _MOST_BYTES:
                path.rename(path.with_name(f"p{process}.before.jsonl"))
                has_begun = False
        with path.open("a", encoding="utf-8") as file:
            if not has_begun:
                # After an empty line: a killed process may have left the last one torn.
                file.write("\n" * (file.tell() > 0) + _header(self._run))
            file.writelines(lines)
        self._has_begun = True


class ObjectLog:
    """Puts an object anew with each line that it gets, until it is large; see `Log`.

    An object store appends to nothing. What could not be put is put with what follows.
    """

    takes_often = False

    def __init__(self, directory: StorePath) -> None:
        self._directory = directory
        self._run = ""
        self._number = 0
        self._lines: list[str] = []

    def begin(self, run: str) -> None:
        """Begins the first object of a run."""
        self._run, self._number, self._lines = run, 0, []

    def append(self, lines: Sequence[str]) -> None:
        """Puts the object with these lines, too."""
        self._lines += lines
        data = "".join([_header(self._run), *self._lines]).encode()
        if len(data) > _MOST_BYTES:  # the store has failed for long
            self._lines = []
        self._directory.store.put(self._key(self._number), [data])
        if len(data) > _OBJECT_BYTES:
            self._number, self._lines = self._number + 1, []
            if self._number >= _MOST_OBJECTS:
                self._directory.store.delete([self._key(self._number - _MOST_OBJECTS)])

    def _key(self, number: int) -> str:
        return f"{FOLDER}/p{jax.process_index()}.{self._run}.{number:06d}.jsonl"


def _header(run: str) -> str:
    """The line that says which run, and which of its processes, the next ones are of."""
    return encode("run", run=run, process=jax.process_index(), processes=jax.process_count())
