"""A run's timeline -> a trace in Chrome's format, which Perfetto and chrome://tracing open. Pure.

The format is the "Trace Event Format" of the Catapult project: complete events (`"ph": "X"`), with
times in microseconds, and metadata events (`"ph": "M"`) that name processes and threads. The spans
of one thread have to lie within each other or apart: what overlaps gets threads of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flax_partial.cli.commands.timeline.layout import lanes_of, phases, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flax_partial.runs.timeline import ProcessTimeline, Run, Save

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Span:
    """A complete event, and others within it."""

    name: str
    began_at: float
    ended_at: float
    args: dict[str, Any] = field(default_factory=dict)
    within: tuple[_Span, ...] = ()


def trace_of(runs: Sequence[Run]) -> dict[str, Any]:
    """All that some runs recorded, in microseconds since the first of them began."""
    origin_at = min((run.began_at for run in runs), default=0.0)
    events: list[Event] = []
    pid = 0
    for number, run in enumerate(runs, start=1):
        prefix = f"run {number}, " if len(runs) > 1 else ""
        for index, process in sorted(run.processes.items()):
            events += _metadata("process", f"{prefix}process {index}", pid=pid, order=pid)
            events += _process_events(process, pid, origin_at)
            pid += 1
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _process_events(process: ProcessTimeline, pid: int, origin_at: float) -> list[Event]:
    tracks = [
        ("training steps", [_Span(f"step {s.number}", *_ends(s)) for s in process.steps]),
        (
            "training held",
            [_Span(f"held in {h.hook}", *_ends(h), {"checkpoint": h.step}) for h in process.holds],
        ),
        *((lane.title, list(map(_save, lane.saves))) for lane in lanes_of(process.saves, name="")),
        (
            "finalize",
            [_Span(f"{e.outcome} {e.step}", *_ends(e), {"step": e.step}) for e in process.ends],
        ),
    ]
    events: list[Event] = []
    tid = 0
    for title, spans in tracks:
        ordered = sorted(spans, key=lambda span: span.began_at)
        rows = rows_of([_ends(span) for span in ordered])
        for row in range(max(rows, default=-1) + 1):
            name = title if row == 0 else f"{title} ({row + 1})"
            events += _metadata("thread", name, pid=pid, tid=tid + row, order=tid + row)
        for span, row in zip(ordered, rows, strict=True):
            events += _complete(span, pid=pid, tid=tid + row, origin_at=origin_at)
        tid += max(rows, default=-1) + 1
    return events


def _save(save: Save) -> _Span:
    spans = tuple(_Span(one.name, one.began_at, one.ended_at) for one in phases(save.times))
    args = {"checkpoint": save.step, "bytes": save.bytes}
    return _Span(save.group, save.times.called_at, save.times.committed_at, args, spans)


def _ends(span: Any) -> tuple[float, float]:
    return span.began_at, span.ended_at


def _complete(span: _Span, *, pid: int, tid: int, origin_at: float) -> Iterable[Event]:
    # Rounded ends, not lengths: what lies within a span must not stick out of it.
    began, ended = (round((at - origin_at) * 1e6) for at in _ends(span))
    yield {
        "name": span.name,
        "cat": "flax_partial",
        "ph": "X",
        "ts": began,
        "dur": ended - began,
        "pid": pid,
        "tid": tid,
        "args": span.args,
    }
    for inner in span.within:
        yield from _complete(inner, pid=pid, tid=tid, origin_at=origin_at)


def _metadata(kind: str, name: str, *, pid: int, order: int, tid: int = 0) -> Iterable[Event]:
    at = {"ph": "M", "pid": pid, "tid": tid}
    yield {**at, "name": f"{kind}_name", "args": {"name": name}}
    yield {**at, "name": f"{kind}_sort_index", "args": {"sort_index": order}}
