"""A run's timeline -> what a picture of one checkpoint shows, and where. Pure.

From top to bottom: of each process its training steps, with what held them, then a lane for each
place that its arrays were at (a pipeline stage has its own devices), in it a row for each group in
the order in which they were saved, and at last finalize.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flax_partial.reports import SaveTimes
from flax_partial.runs.timeline import End, Hold, ProcessTimeline, Run, Save, Step

ENTERS, BUDGET, SNAPSHOT = "enters the session", "waits for memory", "is copied, or copying issued"
COMPUTES, QUEUES = "is still computed", "waits for a writer"
COPIES, WRITES, COMMITS = "is brought to the host", "is written", "is committed"
PHASES = (ENTERS, BUDGET, SNAPSHOT, COMPUTES, QUEUES, COPIES, WRITES, COMMITS)

_HOST = "host"


@dataclass(frozen=True, slots=True)
class Phase:
    """What a save did, or waited for, from one instant to another, in seconds since the epoch."""

    name: str
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Lane:
    """What was saved from one place.

    Attributes:
      title: Its name.
      saves: Groups, in the order in which they were handed over.
    """

    title: str
    saves: tuple[Save, ...]


@dataclass(frozen=True, slots=True)
class Track:
    """One process.

    Attributes:
      process: Its index.
      steps: Training steps that overlap the chart.
      holds: What held training for the checkpoint.
      lanes: At least one.
      end: How the checkpoint ended; None if it did not, or in this process nobody knew.
    """

    process: int
    steps: tuple[Step, ...]
    holds: tuple[Hold, ...]
    lanes: tuple[Lane, ...]
    end: End | None


@dataclass(frozen=True, slots=True)
class Chart:
    """One checkpoint of one run.

    Attributes:
      step: Its step.
      began_at: Where the axis begins: with the step that was saved.
      ended_at: Where the last thing ends.
      blocked_secs: For how long it held training, in the process that it held longest.
      tracks: By process.
    """

    step: int
    began_at: float
    ended_at: float
    blocked_secs: float
    tracks: tuple[Track, ...]


def phases(times: SaveTimes) -> list[Phase]:
    """What a save did, one after the other, without gaps; phases that took no time are left out.

    That it waits for a thread to write it counts from when it is computed.
    """
    ends = (
        (ENTERS, times.entered_at),
        (BUDGET, times.admitted_at),
        (SNAPSHOT, times.taken_at),
        (COMPUTES, times.ready_at),
        (QUEUES, times.begun_at),
        (COPIES, times.copied_at),
        (WRITES, times.written_at),
        (COMMITS, times.committed_at),
    )
    found, began_at = [], times.called_at
    for name, ended_at in ends:
        if ended_at > began_at:
            found.append(Phase(name, began_at, ended_at))
            began_at = ended_at
    return found


def chart_of(run: Run, step: int) -> Chart:
    """Lays out one checkpoint, of which some process saved something."""
    processes = [run.processes[index] for index in sorted(run.processes)]
    saves = [save for one in processes for save in one.saves if save.step == step]
    ends = [end for one in processes for end in one.ends if end.step == step]
    first_at = min(save.times.called_at for save in saves)
    last_at = max([*(s.times.committed_at for s in saves), *(end.ended_at for end in ends)])
    own_steps = [s.began_at for one in processes for s in one.steps if s.number == step]
    began_at = min([*own_steps, first_at])
    tracks = tuple(
        _track(one, step, began_at=began_at, ended_at=last_at, is_alone=len(processes) == 1)
        for one in processes
    )
    blocked_secs = max(one.blocked_secs(step) for one in processes)
    return Chart(step, began_at, last_at, blocked_secs, tracks)


def _track(
    process: ProcessTimeline, step: int, *, began_at: float, ended_at: float, is_alone: bool
) -> Track:
    def overlaps(span: Step | Hold) -> bool:
        return span.began_at < ended_at and span.ended_at > began_at

    saves = [save for save in process.saves if save.step == step]
    lanes = lanes_of(saves, name="" if is_alone else f"process {process.process}")
    return Track(
        process.process,
        tuple(filter(overlaps, process.steps)),
        tuple(hold for hold in process.holds if hold.step == step and overlaps(hold)),
        lanes,
        next((end for end in reversed(process.ends) if end.step == step), None),
    )


def lanes_of(saves: Iterable[Save], *, name: str) -> tuple[Lane, ...]:
    """A lane for each place; what is in the host's memory goes to the only other one."""
    by_place: dict[str, list[Save]] = {}
    for save in sorted(saves, key=lambda save: save.times.called_at):
        by_place.setdefault(save.where or _HOST, []).append(save)
    if name and len(by_place.keys() - {_HOST}) <= 1:
        every = sorted(
            (save for some in by_place.values() for save in some),
            key=lambda save: save.times.called_at,
        )
        return (Lane(name, tuple(every)),)
    return tuple(
        Lane(f"{name} {place}".strip(), tuple(by_place[place]))
        for place in sorted(by_place, key=_natural)
    )


def _natural(text: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sorts cpu:10 behind cpu:9, and the host last."""
    pieces = re.findall(r"\d+|\D+", text)
    return text == _HOST, [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]


def rows_of(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Gives each span the first row in which none that began before it is still going on.

    Args:
      spans: When each begins and ends, ordered by when they begin.
    """
    free_at: list[float] = []
    rows = []
    for began_at, ended_at in spans:
        row = next((row for row, at in enumerate(free_at) if at <= began_at), len(free_at))
        free_at[row : row + 1] = [ended_at]
        rows.append(row)
    return rows
