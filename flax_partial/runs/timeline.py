"""What the timeline of a run holds, and how it lies on disk.

Each process appends to a file of its own, `<directory>/timeline/p<process>.jsonl`, one record a
line; `timeline_logs` writes them. An object store appends to nothing: there they are in several
objects, `<directory>/timeline/p<process>.<run>.<number>.jsonl`, each with a run's line first. A
line that is not one, such as the last of a killed process, is left out; so is a record that some
later version adds. All instants are in seconds since the epoch, by the clock of the machine that
the process ran on.

    {"is": "run", "run": "6f0c...", "process": 0, "processes": 4}        what follows is its
    {"is": "steps", "steps": [[47, BEGAN, ENDED], ...]}
    {"is": "held", "step": 48, "spans": [["stream", BEGAN, ENDED], ...], "brief_secs": 0.0001}
    {"is": "save", "step": 48, "group": "params.head", "where": "cpu:3", "bytes": 8, "times": [...]}
    {"is": "end", "step": 48, "outcome": "finalized", "began_at": BEGAN, "ended_at": ENDED}
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_partial.reports import SaveTimes
from flax_partial.storage import directories
from flax_partial.storage.store import MOST_REQUESTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flax_partial.storage.store_path import AnyPath

FOLDER = "timeline"
FINALIZED, GIVEN_UP = "finalized", "given up"

INSTANTS = tuple(one.name for one in dataclasses.fields(SaveTimes))
"""Names of what `times` of a save lists, in its order."""


@dataclass(frozen=True, slots=True)
class Step:
    """A training step, as the host saw it: devices may still compute when it ends."""

    number: int
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Hold:
    """A time for which checkpointing blocked training.

    Attributes:
      step: Of the checkpoint that it counts for; None before the first.
      hook: Which hook it was, or "stream".
      began_at: When it began.
      ended_at: When it ended.
    """

    step: int | None
    hook: str
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Save:
    """A group that was saved.

    Attributes:
      step: Of its checkpoint.
      group: Its name.
      where: On which devices its arrays were, such as "cpu:3"; empty if in the host's memory.
      bytes: Array data in it.
      times: When the save did what.
    """

    step: int
    group: str
    where: str
    bytes: int
    times: SaveTimes


@dataclass(frozen=True, slots=True)
class End:
    """How a checkpoint ended.

    Attributes:
      step: Its step.
      outcome: `FINALIZED` or `GIVEN_UP`.
      began_at: When all saves of this process were done: from then on it was finalized, which waits
        for the other processes.
      ended_at: When that was done.
    """

    step: int
    outcome: str
    began_at: float
    ended_at: float


@dataclass
class ProcessTimeline:
    """What one process of a run did.

    Attributes:
      process: Its index.
      steps: Training steps, in order; of a long time without a checkpoint the last thousand.
      holds: What blocked training, in order.
      brief_secs: Step of a checkpoint, or None, to the seconds of those that are too short to list.
      saves: Groups, in the order in which they were committed.
      ends: Checkpoints that were ended.
    """

    process: int
    steps: list[Step] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    brief_secs: dict[int | None, float] = field(default_factory=dict)
    saves: list[Save] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    def blocked_secs(self, step: int | None) -> float:
        """Returns for how many seconds a checkpoint blocked training in this process."""
        listed = (hold.ended_at - hold.began_at for hold in self.holds if hold.step == step)
        return sum(listed, start=self.brief_secs.get(step, 0.0))


@dataclass
class Run:
    """What the processes of one run did.

    Attributes:
      name: Its name, the same in all processes.
      processes: By their index, ascending; only those that recorded something.
    """

    name: str
    processes: dict[int, ProcessTimeline] = field(default_factory=dict)

    @property
    def saved_steps(self) -> list[int]:
        """Steps of all its checkpoints of which anything was saved, ascending."""
        return sorted({save.step for one in self.processes.values() for save in one.saves})

    @property
    def began_at(self) -> float:
        """When the first of what is recorded began."""
        return min(
            (
                began_at
                for one in self.processes.values()
                for began_at in (
                    *(step.began_at for step in one.steps),
                    *(hold.began_at for hold in one.holds),
                    *(save.times.called_at for save in one.saves),
                )
            ),
            default=0.0,
        )


def encode(kind: str, **fields: Any) -> str:
    """A record as its line."""
    return json.dumps({"is": kind, **fields}, separators=(",", ":")) + "\n"


def encode_save(save: Save) -> str:
    """A save as its line."""
    return encode(
        "save",
        step=save.step,
        group=save.group,
        where=save.where,
        bytes=save.bytes,
        times=[round(getattr(save.times, name), 6) for name in INSTANTS],
    )


def read(directory: AnyPath) -> list[Run]:
    """Reads the timelines of a run's directory, oldest first: a run that goes on is a new one.

    Args:
      directory: The run's directory.

    Raises:
      OSError: A file cannot be read.
    """
    runs: dict[str, Run] = {}
    for lines in _files(directory / FOLDER):
        _decode(lines, runs)
    return sorted((run for run in runs.values() if run.began_at), key=lambda run: run.began_at)


def _files(folder: AnyPath) -> Iterator[Iterable[str]]:
    """Yields the lines of each file, in the order of their names."""
    found = [one for one in directories.names(folder) if re.fullmatch(r"p.*\.jsonl", one)]
    if isinstance(folder, Path):
        for name in sorted(found):
            with (folder / name).open(encoding="utf-8", errors="replace") as lines:
                yield lines
        return
    names = sorted(found)
    for at in range(0, len(names), MOST_REQUESTS):
        for data in directories.for_each(folder, folder.store.get, names[at : at + MOST_REQUESTS]):
            yield (data or b"").decode("utf-8", errors="replace").splitlines()


def _decode(lines: Iterable[str], runs: dict[str, Run]) -> None:
    """Adds what a file holds."""
    process = ProcessTimeline(0)
    for line in lines:
        try:
            record = json.loads(line)
            if record["is"] == "run":
                run = runs.setdefault(str(record["run"]), Run(str(record["run"])))
                index = int(record["process"])
                process = run.processes.setdefault(index, ProcessTimeline(index))
            else:
                _add(process, record)
        except (KeyError, TypeError, ValueError):  # no record, or torn
            continue


def _add(process: ProcessTimeline, record: dict[str, Any]) -> None:
    """Adds a record, whole or not at all.

    Raises:
      KeyError, TypeError, ValueError: It lacks something, or has what it cannot have.
    """
    kind = record["is"]
    if kind == "steps":
        process.steps += [Step(int(n), *_instants(b, e)) for n, b, e in record["steps"]]
    elif kind == "held":
        step, brief_secs = record["step"], float(record["brief_secs"])
        holds = [Hold(step, str(hook), *_instants(b, e)) for hook, b, e in record["spans"]]
        process.holds += holds
        process.brief_secs[step] = process.brief_secs.get(step, 0.0) + brief_secs
    elif kind == "save":
        times = SaveTimes(*_instants(*record["times"]))
        process.saves.append(
            Save(int(record["step"]), record["group"], record["where"], record["bytes"], times)
        )
    elif kind == "end":
        span = _instants(record["began_at"], record["ended_at"])
        process.ends.append(End(int(record["step"]), str(record["outcome"]), *span))


def _instants(*given: Any) -> Iterator[float]:
    for value in given:
        at = float(value)
        if not math.isfinite(at):
            raise ValueError(f"{value} is no instant")
        yield at
