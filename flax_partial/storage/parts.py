"""The parts of a session, or of a finalized checkpoint, as they are on disk."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.model import Part
from flax_partial.format.tables import decode_part
from flax_partial.storage import files
from flax_partial.storage.paths import PART_FOLDER, PART_PREFIX, PART_TABLE


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What the part directories of a session hold.

    Attributes:
      committed: Name of each committed part -> its table of contents, oldest first.
      torn: Names of the directories that were never committed.
      damaged: Names of the parts that were committed and whose table is damaged -> why.
      decided_ns: When it was decided that the checkpoint is made of these parts, in nanoseconds
        since the epoch; None where saves can still be added.
    """

    committed: dict[str, Part] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    decided_ns: int | None = None


def read_parts(
    state: Path,
    *,
    process: int | None = None,
    known: Mapping[str, Part] | None = None,
    failed: Collection[str] = (),
) -> SessionParts:
    """Reads the tables of all parts.

    Args:
      state: The directory of the parts, of a session or a checkpoint.
      process: Only the parts of this process.
      known: Parts read before, by name: a committed part never changes.
      failed: Names of parts whose save failed in this process: they count as torn.

    Raises:
      OSError: The system refused to read one.
    """
    found = SessionParts()
    for name in part_names(state):
        if process is not None and not is_of(process, name):
            continue
        try:
            part = None if name in failed else (known or {}).get(name) or _read_part(state, name)
        except CorruptCheckpointError as error:
            found.damaged[name] = str(error)
            continue
        if part is None:
            found.torn.append(name)
        else:
            found.committed[name] = part
    return found


def part_names(state: Path) -> list[str]:
    """Names of the part directories in `state`, torn ones included, oldest first.

    Those in a directory `p<number>` of several processes' parts are called with it.
    """
    names = files.listed(state)
    for folder in filter(PART_FOLDER.fullmatch, names[:]):
        names += [f"{folder}/{name}" for name in files.listed(state / folder)]
    return oldest_first(name for name in names if own_name(name).startswith(PART_PREFIX))


def oldest_first(names: Iterable[str]) -> list[str]:
    """Sorts names of parts by when their saves began."""
    return sorted(names, key=lambda name: (own_name(name), name))


def own_name(name: str) -> str:
    """What the directory of a part is called, without the folder that it may lie in."""
    return name.rpartition("/")[2]


def is_of(process: int, name: str) -> bool:
    """Whether a part was written by a process, by its name."""
    return f".p{process}." in name


def prefix_of_name(part: Part) -> str:
    """What the name of a part's directory begins with: when it was saved, and by which process."""
    return f"{PART_PREFIX}{part.time_ns:019d}.p{part.process}."


def _read_part(state: Path, name: str) -> Part | None:
    """Returns None where there is no table: it appears whole, or not at all."""
    path = state / name / PART_TABLE
    data = files.read(path)
    if data is None:
        return None
    return decoded(data, name, where=str(path))


def decoded(data: bytes, name: str, *, where: str) -> Part:
    """Returns the part of that name, given its table.

    Raises:
      CorruptCheckpointError: The table is damaged, or is that of another part.
    """
    part = decode_part(data, where=where)
    if not own_name(name).startswith(prefix_of_name(part)):
        raise CorruptCheckpointError(f"{where}: it is the table of another part")
    return part
