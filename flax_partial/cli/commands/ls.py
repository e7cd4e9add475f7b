"""`ls`: the checkpoints and unfinished sessions in a run's directory."""

import argparse
import time

from flax_partial.cli import listing, places, text
from flax_partial.cli.listing import Entry
from flax_partial.cli.output import BAD, GOOD, WAITING, Column, Output, Row

_STYLES = {places.FINALIZED: "", places.UNFINISHED: WAITING, places.DAMAGED: BAD}
_COLUMNS = (
    Column("CHECKPOINT"),
    Column("STEP", is_number=True, dispensable=4),
    Column("STATE"),
    Column("WRITTEN", is_number=True, dispensable=1),
    Column("SIZE", is_number=True, dispensable=2),
    Column("LEAVES", is_number=True, dispensable=5),
    Column("METRICS", dispensable=3),
    Column(""),
)

EXAMPLES = (
    "ls runs/lm",
    "ls runs/lm --monitor loss",
    "ls runs/lm --monitor accuracy --mode max --json",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "List the checkpoints and unfinished sessions in a directory."
    parser.add_argument("dir", metavar="DIR", help="the directory of a run")
    parser.add_argument(
        "--monitor", metavar="METRIC", help="the metric by which one is marked as best"
    )
    parser.add_argument(
        "--mode",
        choices=("min", "max"),
        default="min",
        help="whether the smallest or the largest value is best; default: min",
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Lists a directory; returns whether any checkpoint in it is damaged."""
    directory = listing.directory(options.dir)
    entries = listing.entries(directory)
    latest, best = listing.latest(entries), listing.best(entries, options.monitor, options.mode)
    out.json(directory=directory.absolute(), latest=latest, best=best, checkpoints=entries)
    if not entries:
        out.line(f"no checkpoints in {directory}{listing.runs_in(directory)}")
    marked = {"latest": latest, "best": best}
    out.table(_COLUMNS, [_row(entry, time.time(), marked) for entry in entries])
    for entry in entries:
        if entry.problem:
            out.line(f"{entry.name}: {entry.problem}", BAD)
    return any(entry.state == places.DAMAGED for entry in entries)


def _row(entry: Entry, now: float, marked: dict[str, str | None]) -> Row:
    is_readable = entry.written_at is not None
    marks = [mark for mark, name in marked.items() if name == entry.name]
    cells = (
        entry.name,
        "" if entry.step is None else str(entry.step),
        entry.state + (" (orbax)" if entry.format == places.ORBAX else ""),
        "" if entry.written_at is None else text.age(now - entry.written_at),
        text.size(entry.bytes) if is_readable else "",
        f"{entry.leaves:,}" if is_readable else "",
        " ".join(f"{key}={text.number(value)}" for key, value in entry.metrics.items()),
        ", ".join(marks),
    )
    return Row(cells, _STYLES[entry.state] or (GOOD if marks else ""))
