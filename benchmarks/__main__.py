"""The command line: `python -m benchmarks [scenario ...]`."""

from __future__ import annotations

import argparse
import importlib
import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import pages, plots, report
from benchmarks.harness import run_scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from benchmarks.harness import Scenario

# Each is a module here. A new scenario is a new name and a new module.
SCENARIOS = (
    "stream",
    "many_small",
    "many_leaves",
    "call",
    "long_session",
    "finalize",
    "train_loop",
    "every_step",
    "memory",
    "load",
    "reuse",
    "compression",
    "object_store",
    "distributed",
    "import_time",
)


def main() -> None:
    """Runs the scenarios asked for; prints, writes JSON and draws what they measured."""
    arguments = _parse()
    console = report.make_console()
    machine = report.describe_machine(arguments.directory)
    console.print(machine)
    if machine["file_system"] == "tmpfs":
        console.print("[yellow]The directory is in memory: its figures are no disk's.[/yellow]")
    if arguments.small:
        console.print("[yellow]Small work, to see that all runs; no target stands for it.[/yellow]")
    names = arguments.scenarios or SCENARIOS
    builds = [importlib.import_module(f"benchmarks.{name}").build for name in names]
    results = run_all(builds, arguments, console, machine)
    report.print_summary(results, console)
    if arguments.write_pages:
        written = pages.write([{"machine": machine, "scenarios": results}])
        console.print(f"Written: {', '.join(map(str, written))}")


def run_all(
    builds: Sequence[Callable[..., Scenario]],
    arguments: argparse.Namespace,
    console: Console,
    machine: dict[str, Any],
    *,
    shares: Sequence[int] = (),
    ends_at: float = math.inf,
) -> list[report.Result]:
    """Runs scenarios as the options of `make_parser` say; returns what they measured.

    Prints each result, and writes JSON after each, so that an interrupted run keeps what it
    measured; draws all of them at the end.

    Args:
      builds: Each builds a scenario.
      arguments: The options.
      console: Where to print.
      machine: What the figures depend on.
      shares: Of each scenario, its share of the time that is left; by default all the same.
      ends_at: When to end, on the monotonic clock; what there is no time for is left out.
    """
    results = []
    shares = shares or [1] * len(builds)
    with console.status("") as status:
        for number, build in enumerate(builds):
            begun = time.monotonic()
            if begun > ends_at:
                names = ", ".join(build(small=True).name for build in builds[number:])
                console.print(f"[yellow]Left out, for there was no time: {names}.[/yellow]")
                break
            outcome = run_scenario(
                build,
                small=arguments.small,
                rounds=arguments.rounds,
                directory=arguments.directory,
                say=status.update,
                ends_at=begun + (ends_at - begun) * shares[number] / sum(shares[number:]),
            )
            results.append(report.as_result(outcome))
            report.print_result(results[-1], console)
            console.print(f"{outcome.scenario.name} took {time.monotonic() - begun:,.0f} s.")
            if outcome.left_out:
                turns = ", ".join(f"{name}: {n}" for name, n in Counter(outcome.left_out).items())
                console.print(f"[yellow]Turns for which there was no time: {turns}.[/yellow]")
            report.write_json(results, arguments.json, machine=machine)
    written = [arguments.json, *plots.draw(results, arguments.json.with_suffix(".png"))]
    console.print(f"Written: {', '.join(map(str, written))}")
    return results


def make_parser(name: str, description: str | None, json: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every run of scenarios has."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds; default 5")
    place = "where checkpoints are written and removed again; default %(default)s"
    add("--directory", type=_absolute, default=Path(tempfile.gettempdir()), help=place)
    figures = "the figures, and beside it the plot; default %(default)s"
    add("--json", type=Path, metavar="FILE", default=Path(json), help=figures)
    add("--small", action="store_true", help="a fraction of the work, as a trial")
    return parser


def _absolute(path: str) -> Path:
    return Path(path).resolve()  # Orbax takes no other


def _parse() -> argparse.Namespace:
    parser = make_parser("benchmarks", main.__doc__, "benchmarks/results/latest.json")
    known = f"any of {', '.join(SCENARIOS)}; default all"
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=known)
    there = "put the figures into README and docs, too; see `python -m benchmarks.pages --help`"
    parser.add_argument("--write-pages", action="store_true", help=there)
    arguments = parser.parse_args()
    if arguments.write_pages and arguments.small:
        parser.error("--write-pages: small work shows that all runs; its figures belong on no page")
    if unknown := sorted(set(arguments.scenarios) - set(SCENARIOS)):
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


if __name__ == "__main__":
    main()
