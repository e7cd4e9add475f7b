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
      saves: Groups, in the order in which they were handed over.
      lanes: The same by place; at least one.
      end: How the checkpoint ended; None if it did not, or this process did not record it.
    """

    process: int
    steps: tuple[Step, ...]
    holds: tuple[Hold, ...]
    saves: tuple[Save, ...]
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

    Waiting for a writer counts from the moment when the group is computed.
    """
    ends = (
        times.entered_at,
        times.admitted_at,
        times.taken_at,
        times.ready_at,
        times.begun_at,
        times.copied_at,
        times.written_at,
        times.committed_at,
    )
    found, began_at = [], times.called_at
    for name, ended_at in zip(PHASES, ends, strict=True):
        if ended_at > began_at:
            found.append(Phase(name, began_at, ended_at))
            began_at = ended_at
    return found


def chart_of(run: Run, step: int) -> Chart:
    """Lays out one checkpoint, of which some process saved something."""
    processes = [run.processes[index] for index in sorted(run.processes)]
    saves = [save for one in processes for save in one.saves if save.step == step]
    ends = [end for one in processes for end in one.ends if end.step == step]
    own_steps = [own.began_at for one in processes for own in one.steps if own.number == step]
    began_at = min([*own_steps, *(save.times.called_at for save in saves)])
    ended_at = max([*(save.times.committed_at for save in saves), *(end.ended_at for end in ends)])

    def overlaps(span: Step | Hold) -> bool:
        return span.began_at < ended_at and span.ended_at > began_at

    def track_of(process: ProcessTimeline) -> Track:
        saves = _ordered(save for save in process.saves if save.step == step)
        name = f"process {process.process}" if len(processes) > 1 else ""
        return Track(
            process.process,
            steps=tuple(filter(overlaps, process.steps)),
            holds=tuple(hold for hold in process.holds if hold.step == step and overlaps(hold)),
            saves=saves,
            lanes=lanes_of(saves, name=name),
            end=next((end for end in reversed(process.ends) if end.step == step), None),
        )

    blocked_secs = max(one.blocked_secs(step) for one in processes)
    return Chart(step, began_at, ended_at, blocked_secs, tuple(map(track_of, processes)))


def lanes_of(saves: Iterable[Save], *, name: str) -> tuple[Lane, ...]:
    """Returns a lane for each place; saves from the host's memory go to the only other one.

    Args:
      saves: Those of one process.
      name: Of the process; empty where there is only one.
    """
    by_place: dict[str, list[Save]] = {}
    ordered = _ordered(saves)
    for save in ordered:
        by_place.setdefault(save.where or _HOST, []).append(save)
    if name and len(by_place.keys() - {_HOST}) <= 1:
        return (Lane(name, ordered),)
    places = sorted(by_place, key=_natural)
    return tuple(Lane(f"{name} {place}".strip(), tuple(by_place[place])) for place in places)


def _ordered(saves: Iterable[Save]) -> tuple[Save, ...]:
    return tuple(sorted(saves, key=lambda save: save.times.called_at))


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
