"""`verify`: is every byte of a checkpoint still what was written."""

import argparse
import time

from flax_partial.cli import listing, places, text
from flax_partial.cli.output import BAD, GOOD, Column, Output, Row, picked
from flax_partial.loading.verify import verify_with

_COLUMNS = (Column("DAMAGED"), Column("WHAT IS WRONG"))


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Read all of a checkpoint, check every digest, and name what is damaged. Of one that Orbax "
        "wrote, which has no digests, it says whether everything can be read."
    )
    parser.add_argument("path", metavar="PATH")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Verifies a checkpoint; returns whether it is damaged."""
    where = places.finalized(listing.one_checkpoint(options.path, out))
    began = time.perf_counter()
    with out.bar("Verifying") as progress:
        report = verify_with(where.final, progress=progress)
    secs = time.perf_counter() - began
    out.json(**picked(report, "path", "ok", "leaves", "bytes", "bad"), secs=secs)
    out.table(_COLUMNS, [Row((text.name(name), why), BAD) for name, why in report.bad.items()])
    outcome = "fine" if report.ok else text.counted(len(report.bad), "problem")
    amount = text.leaves(report.leaves, report.bytes)
    out.line(f"{outcome}: {amount}, {secs:.1f} s", GOOD if report.ok else BAD)
    return not report.ok
