"""`verify`: is every byte of a checkpoint still what was written."""

import argparse
import time
from typing import Any

from flax_partial.cli import listing, places, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.listing import Entry
from flax_partial.cli.output import BAD, GOOD, Column, Output, Row, picked
from flax_partial.errors import NoSessionError
from flax_partial.loading.verify import verify_with
from flax_partial.reports import VerifyReport
from flax_partial.storage.paths import SESSION_SUFFIX
from flax_partial.storage.store_path import AnyPath

_COLUMNS = (Column("DAMAGED"), Column("WHAT IS WRONG"))
_RUN_COLUMNS = (
    Column("CHECKPOINT"),
    Column("LEAVES", is_number=True, dispensable=2),
    Column("SIZE", is_number=True, dispensable=1),
    Column("OUTCOME"),
)

EXAMPLES = (
    "verify runs/lm/300",
    "verify runs/lm",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Read all of a checkpoint, check every digest, and name what is damaged. Of one that Orbax "
        "wrote, which has no digests, it says whether everything can be read. Of a run, all "
        "finalized checkpoints."
    )
    parser.add_argument("path", metavar="PATH", help="a finalized checkpoint, or a run")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Verifies a checkpoint; returns whether it is damaged."""
    if listing.is_run(options.path):
        return _verify_run(places.given(options.path), out)
    listing.require_something(options.path)
    began = time.perf_counter()
    with out.bar("Verifying") as progress:
        report = verify_with(places.finalized(options.path).final, progress=progress)
    secs = time.perf_counter() - began
    out.json(**_as_json(report), secs=secs)
    out.table(_COLUMNS, [Row((text.name(name), why), BAD) for name, why in report.bad.items()])
    amount = text.leaves(report.leaves, report.bytes)
    out.line(f"{_outcome(report)}: {amount}, {secs:.1f} s", GOOD if report.ok else BAD)
    return not report.ok


def _verify_run(directory: AnyPath, out: Output) -> bool:
    """Verifies each checkpoint of a run; one that is removed meanwhile is left out.

    Raises:
      WrongUseError: It has none.
    """
    began = time.perf_counter()
    looked = (_of_run(directory, entry, out) for entry in listing.entries(directory))
    reports = [report for report in looked if report is not None]
    if not reports:
        raise WrongUseError(f"{directory} has no finalized checkpoint")
    secs = time.perf_counter() - began
    damaged = [report for report in reports if not report.ok]
    checkpoints = [*map(_as_json, reports)]
    out.json(path=directory.absolute(), ok=not damaged, checkpoints=checkpoints, secs=secs)
    out.table(_RUN_COLUMNS, [*map(_row, reports)])
    problems = [
        Row((f"{report.path.name}: {text.name(name)}", why), BAD)
        for report in damaged
        for name, why in report.bad.items()
    ]
    out.table(_COLUMNS, problems)
    outcome = f"{len(damaged)} of {len(reports)} damaged" if damaged else "fine"
    amount = text.counted(len(reports), "checkpoint")
    size = text.size(sum(report.bytes for report in reports))
    out.line(f"{outcome}: {amount}, {size}, {secs:.1f} s", BAD if damaged else GOOD)
    return bool(damaged)


def _of_run(directory: AnyPath, entry: Entry, out: Output) -> VerifyReport | None:
    """Verifies a checkpoint of a run; None for a session, and where it is gone."""
    path = directory.absolute() / entry.name
    if entry.name.endswith(SESSION_SUFFIX):
        return None
    if entry.problem and entry.written_at is None:  # it cannot be opened
        return VerifyReport(path, 0, 0, {entry.name: entry.problem})
    try:
        with out.bar(f"Verifying {entry.name}") as progress:
            return verify_with(path, progress=progress)
    except NoSessionError:
        return None


def _row(report: VerifyReport) -> Row:
    cells = report.path.name, f"{report.leaves:,}", text.size(report.bytes), _outcome(report)
    return Row(cells, "" if report.ok else BAD)


def _outcome(report: VerifyReport) -> str:
    return "fine" if report.ok else text.counted(len(report.bad), "problem")


def _as_json(report: VerifyReport) -> dict[str, Any]:
    return picked(report, "path", "ok", "leaves", "bytes", "bad")
