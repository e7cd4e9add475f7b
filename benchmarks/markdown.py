"""Prints saved results in Markdown: `python -m benchmarks.markdown RESULTS.json...`.

For documents, so that no figure is copied by hand. With `--plot` it also draws the scenarios of all
files, which may be of several runs, since every ratio is of one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import plots, report

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def main() -> None:
    """Prints the tables of all files, the targets first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.markdown", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw, too")
    arguments = parser.parse_args()
    results = [
        result for path in arguments.results for result in json.loads(path.read_text())["scenarios"]
    ]
    print("\n".join(_targets(results)))
    for result in results:
        print(f"\n### `{result['name']}`\n\n{result['work']}.\n")
        print("\n".join(_table(report.medians(result))))
    if arguments.plot:
        plots.draw(results, arguments.plot)


def _targets(results: Iterable[report.Result]) -> list[str]:
    rows = [
        [f"`{result['name']}`", *report.judged(target)]
        for result in results
        for target in result["targets"]
    ]
    return _table([["scenario", "ratio of medians", "measured", "target", ""], *rows])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [header, f"|{'---|' * len(rows[0])}", *body]


if __name__ == "__main__":
    main()
