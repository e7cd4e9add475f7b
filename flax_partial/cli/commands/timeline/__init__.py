"""`timeline`: what a run's checkpoints did when, as a table, a picture, and a trace."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax_partial as fp
from flax_partial.cli import listing, places, text
from flax_partial.cli.commands.timeline import chrome_trace, layout, picture
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import GOOD, Column, Output, Row, picked
from flax_partial.loading.catalog import is_finalized
from flax_partial.runs import timeline

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from flax_partial.cli.commands.timeline.layout import Chart
    from flax_partial.cli.places import Given
    from flax_partial.runs.timeline import ProcessTimeline, Run
    from flax_partial.storage.store_path import AnyPath

_PICTURES, _TRACE = (".png", ".svg"), ".json"
_DEFAULT_OUT = "timeline.png"
_COLUMNS = (
    Column("PROCESS", is_number=True),
    Column("GROUP"),
    Column("WHERE", dispensable=2),
    Column("SIZE", is_number=True, dispensable=1),
    Column("SAVED", is_number=True),
    Column("HELD", is_number=True),
    Column("READY", is_number=True),
    Column("COPIED", is_number=True, dispensable=4),
    Column("WRITTEN", is_number=True, dispensable=3),
    Column("COMMITTED", is_number=True),
)

EXAMPLES = (
    "timeline runs/lm",
    "timeline runs/lm/5 --out fifth.svg",
    "timeline runs/lm --out run.json",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Draw when each group of a checkpoint was ready, copied to the host, written and "
        "committed, and what held training. Of a run the newest checkpoint is "
        "drawn; another one may be gone by now, or unfinished."
    )
    parser.add_argument("path", metavar="PATH", help="a run, or one of its checkpoints")
    parser.add_argument(
        "--out",
        metavar="FILE",
        action="append",
        help="a picture (.png, .svg), or a trace for Perfetto and chrome://tracing (.json), of "
        "the whole run; can be repeated; is replaced where it is there; default: timeline.png, "
        "if matplotlib is installed",
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Draws a timeline."""
    targets = [_target(path) for path in options.out or []]
    if not (targets or out.is_json):
        targets = _default_targets(out)
    directory, asked = _directory(options.path)
    runs, step = _chosen(directory, asked)
    chart = layout.chart_of(runs[-1], step)
    title = _title(chart, directory)
    for target in targets:
        _write(target, runs, chart, title=title)
    out.json(
        path=options.path,
        step=step,
        out=[*map(Path.absolute, targets)],
        runs=[*map(_as_json, runs)],
    )
    out.table(_COLUMNS, [*_rows(chart)])
    out.line(title)
    for target in targets:
        out.line(f"wrote {target}", GOOD)
    return False


def _target(path: str) -> Path:
    """Checks a file's name before anything is read.

    Raises:
      WrongUseError: It has another ending, or its directory is not there, or matplotlib is missing.
    """
    target = places.local(path)
    if target.suffix not in (*_PICTURES, _TRACE):
        raise WrongUseError(f"{path}: its ending says what it is to be: .png, .svg or .json")
    if not target.parent.is_dir():
        raise WrongUseError(f"{target.parent} is not a directory")
    if target.suffix in _PICTURES:
        missing = picture.why_none()
        if missing:
            raise WrongUseError(f"no picture: {missing}")
    return target


def _default_targets(out: Output) -> list[Path]:
    """A picture without `--out`: where matplotlib is missing, a note and the table."""
    missing = picture.why_none()
    if missing:
        out.note(f"no picture: {missing}")
    return [] if missing else [_target(_DEFAULT_OUT)]


def _directory(path: Given) -> tuple[AnyPath, int | None]:
    """Returns a run's directory, and the step, if the path has one.

    Raises:
      WrongUseError: There is no timeline at `path`.
    """
    directory = places.given(path)
    if (directory / timeline.FOLDER).is_dir():
        return directory, None
    final = places.resolve(path).final
    is_step = final.name.isascii() and final.name.isdecimal()
    if not is_step or not (final.parent / timeline.FOLDER).is_dir():
        raise WrongUseError(_why_none(path))
    # As it was given: a title should be short.
    return places.given(path).parent, int(final.name)


def _chosen(directory: AnyPath, asked: int | None) -> tuple[list[Run], int]:
    """Returns the runs that are recorded, up to the one to draw, and the step to draw.

    Raises:
      WrongUseError: Nothing is recorded of it.
    """
    runs = timeline.read(directory)
    steps = [set(one.saved_steps) for one in runs]
    for number in reversed(range(len(runs))):
        if asked in steps[number] or (asked is None and steps[number]):
            return runs[: number + 1], asked if asked is not None else max(steps[number])
    recorded = ", ".join(map(str, sorted(set().union(*steps)))) or "none"
    what = "any checkpoint" if asked is None else f"step {asked}"
    raise WrongUseError(f"{directory} has no timeline of {what}; it has: {recorded}")


def _why_none(path: Given) -> str:
    found = places.given(path)
    if not (os.path.lexists(found) if isinstance(found, Path) else found.is_dir()):
        return listing.absent(found)
    if _is_orbax(found):
        return f"{path} has no timeline: Orbax wrote it, and records none"
    return f"{path} has no timeline: only runs of PartialCheckpointCallback record one"


def _is_orbax(path: AnyPath) -> bool:
    newest = path if is_finalized(path) else fp.latest(path)
    try:
        return newest is not None and places.written_by(fp.metadata(newest)) == places.ORBAX
    except fp.PartialCheckpointError:
        return False


def _write(target: Path, runs: Sequence[Run], chart: Chart, *, title: str) -> None:
    """Writes a file: beside it first, so that a half one is never there."""
    beside = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        if target.suffix == _TRACE:
            beside.write_text(json.dumps(chrome_trace.trace_of(runs)), encoding="utf-8")
        else:
            picture.draw(chart, beside, title=title)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _title(chart: Chart, directory: AnyPath) -> str:
    saves = [save for track in chart.tracks for save in track.saves]
    amount = f"{text.counted(len(saves), 'group')}, {text.size(sum(s.bytes for s in saves))}"
    where = f" of {len(chart.tracks)} processes" if len(chart.tracks) > 1 else ""
    return (
        f"checkpoint {chart.step} of {directory}: {amount}{where}, training held for "
        f"{_ms(chart.blocked_secs)} ms, {_outcome(chart)}"
    )


def _outcome(chart: Chart) -> str:
    ends = [track.end for track in chart.tracks if track.end is not None]
    if not ends:
        return "not finished"
    last = max(ends, key=lambda end: end.ended_at)
    if last.outcome != timeline.FINALIZED:
        return last.outcome
    return f"complete {_ms(last.ended_at - chart.began_at)} ms after its step began"


def _rows(chart: Chart) -> Iterator[Row]:
    for track in chart.tracks:
        process = str(track.process) if len(chart.tracks) > 1 else ""
        for save in track.saves:
            times = save.times
            instants = (times.ready_at, times.copied_at, times.written_at, times.committed_at)
            secs = (times.taken_at - times.called_at, *(at - chart.began_at for at in instants))
            called = _ms(times.called_at - chart.began_at)
            size = text.size(save.bytes)
            yield Row((process, save.group, save.where, size, called, *map(_ms, secs)))


def _ms(secs: float) -> str:
    return f"{secs * 1e3:,.1f}"


def _as_json(run: Run) -> dict[str, Any]:
    processes = [_process_as_json(process) for _, process in sorted(run.processes.items())]
    return {"name": run.name, "processes": processes}


def _process_as_json(process: ProcessTimeline) -> dict[str, Any]:
    held = {step: process.blocked_secs(step) for step in {save.step for save in process.saves}}
    return picked(process, "process", "steps", "holds", "saves", "ends") | {"blocked_secs": held}
