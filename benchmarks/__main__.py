"""The command line: `python -m benchmarks [scenario ...]`."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import plots, report
from benchmarks.harness import run_scenario

if TYPE_CHECKING:
    from rich.status import Status

# Each is a module here. A new scenario is a new name and a new module.
SCENARIOS = (
    "stream",
    "many_small",
    "many_leaves",
    "call",
    "long_session",
    "finalize",
    "train_loop",
    "memory",
    "load",
    "reuse",
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
    results = []
    for name in arguments.scenarios or SCENARIOS:
        with console.status(name) as status:

            def say(text: str, name: str = name, status: Status = status) -> None:
                status.update(f"{name}: {text}")

            outcome = run_scenario(
                importlib.import_module(f"benchmarks.{name}").build,
                small=arguments.small,
                rounds=arguments.rounds,
                directory=arguments.directory,
                say=say,
            )
        results.append(report.as_result(outcome))
        report.print_result(results[-1], console)
        # After each, so that an interrupted run keeps what it measured.
        report.write_json(results, arguments.json, machine=machine)
    report.print_summary(results, console)
    written = [arguments.json, *plots.draw(results, arguments.json.with_suffix(".png"))]
    console.print(f"Written: {', '.join(map(str, written))}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="scenario",
        help=f"any of {', '.join(SCENARIOS)}; default all",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; default 5")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where checkpoints are written and removed again; default %(default)s",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("benchmarks/results/latest.json"),
        help="the figures, and beside it the plot; default %(default)s",
    )
    parser.add_argument("--small", action="store_true", help="a fraction of the work, as a trial")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.scenarios) - set(SCENARIOS)):
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


if __name__ == "__main__":
    main()
