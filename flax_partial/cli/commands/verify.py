"""`verify`: is every byte of a checkpoint still what was written."""

import argparse
import time
from typing import Any

from flax_partial.cli import places, text
from flax_partial.cli.command import add_command
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.tables import BAD, GOOD, Column, Row, Table
from flax_partial.loading import verify as loading

_COLUMNS = (Column("DAMAGED"), Column("WHAT IS WRONG"))


def add(commands: Any) -> None:
    """Declares the command."""
    add_command(
        commands,
        run,
        "verify",
        "PATH",
        summary="read all of a checkpoint, and check every digest",
        description="Read all of a checkpoint, check every digest, and name what is damaged. Of "
        "one that Orbax wrote, which has no digests, it says whether everything can be read.",
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Verifies a checkpoint; returns whether it is damaged."""
    where = places.resolve(options.path)
    if places.is_session_meant(options.path, where):
        raise WrongUseError(f"{where.session} is not finalized: finalize it first")
    began = time.perf_counter()
    with out.bar("Verifying") as progress:
        report = loading.verify_with(where.final, progress=progress)
    secs = time.perf_counter() - began
    out.json(
        {
            "path": str(report.path),
            "ok": report.ok,
            "leaves": report.leaves,
            "bytes": report.bytes,
            "secs": secs,
            "bad": dict(report.bad),
        }
    )
    rows = [Row((text.name(name), why), BAD) for name, why in report.bad.items()]
    out.table(Table(_COLUMNS, rows))
    amount = f"{text.leaves(report.leaves)}, {text.size(report.bytes)}, {secs:.1f} s"
    outcome = "fine" if report.ok else f"{text.counted(len(report.bad), 'problem')}"
    out.line(f"{outcome}: {amount}", GOOD if report.ok else BAD)
    return not report.ok
