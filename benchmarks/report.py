"""Reports outcomes: tables for people, JSON for programs."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Figure
from flax_partial import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.harness import Outcome

_PACKAGES = ("jax", "tensorstore", "orbax-checkpoint", "safetensors", "numpy")
Result = dict[str, Any]

_MIB = 1 << 20
_LOG_WIDTH = 120

UNITS = {
    **dict.fromkeys(("memory", "growth", "beside the state", "written"), "MiB"),
    **dict.fromkeys(("steps/s", "GB/s", "load GB/s", "saved", "left"), ""),
}
"""The unit in which a metric is reported, else seconds; MiB are measured in bytes."""


def make_console() -> Console:
    """Returns where to print; as wide as its tables need where it is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def describe_machine(directory: Path) -> dict[str, Any]:
    """Returns what figures depend on: cores, memory, file system, versions, commit; and the day."""
    return {
        "day": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": _file_system(directory),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {
            **{name: _version(name) for name in _PACKAGES},
            "flax-partial": __version__,  # of an editable install the metadata may be older
        },
    }


def _commit() -> str:
    """Returns the commit of this checkout, with "-dirty" where files differ from it."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=8"]
    here = Path(__file__).parent
    done = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`, whose mount point is the longest."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    path = directory.resolve()
    holding = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(holding)[1]


def as_result(outcome: Outcome) -> Result:
    """Returns an outcome as JSON has it: every round, the medians, the targets with their ratios.

    Every table and plot is made from this, so that it can be made again from a file.
    """
    scenario = outcome.scenario
    metrics = _metrics(outcome)
    return {
        "name": scenario.name,
        "work": scenario.work,
        "shown": scenario.shown,
        "is_small": outcome.is_small,
        "contenders": {
            name: {
                "rounds": rounds,
                "median": {metric: outcome.median(Figure(name, metric)) for metric in metrics},
            }
            for name, rounds in outcome.rounds.items()
        },
        "targets": [
            {
                "text": target.text,
                "ratio": outcome.ratio(target),
                "at_least": target.at_least,
                "at_most": target.at_most,
                "is_met": outcome.is_met(target),
            }
            for target in scenario.targets
        ],
    }


def print_result(result: Result, console: Console) -> None:
    """Prints the medians of every contender, then every target beside its ratio."""
    console.print(f"\n[bold]{result['name']}[/bold]: {result['work']}")
    header, *rows = medians(result)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    table = Table("ratio of medians", "measured", "target", "")
    for target in result["targets"]:
        color = {True: "green", False: "red"}.get(target["is_met"], "default")
        *cells, verdict = judged(target)
        table.add_row(*cells, f"[{color}]{verdict}[/{color}]")
    console.print(table)


def print_summary(results: Iterable[Result], console: Console) -> None:
    """Prints how many targets are met, and which are not."""
    targets = [(result["name"], target) for result in results for target in result["targets"]]
    verdicts = [target["is_met"] for _, target in targets if target["is_met"] is not None]
    if verdicts:
        console.print(f"\n{verdicts.count(True)} of {len(verdicts)} targets met.")
    for name, target in targets:
        if target["is_met"] is False:
            console.print(f"  not met: {name}: {target['text']}")


def write_json(results: Sequence[Result], path: Path, *, machine: dict[str, Any]) -> None:
    """Writes the results of a run, and what it ran on."""
    document = {"machine": machine, "scenarios": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def medians(result: Result) -> list[list[str]]:
    """Returns a table's header and rows: a row for each contender, a column for each metric."""
    contenders = result["contenders"]
    metrics = next(iter(contenders.values()))["median"] if contenders else {}
    rows = [
        [
            name,
            str(len(contender["rounds"])),
            *(cell(metric, contender["median"][metric]) for metric in metrics),
        ]
        for name, contender in contenders.items()
    ]
    return [["contender", "rounds", *metrics], *rows]


def judged(target: Result) -> list[str]:
    """Returns a target's row: its text, what was measured, its bound, the verdict."""
    ratio = target["ratio"]
    measured = "not measured" if ratio is None else f"{ratio:,.3g}"
    verdict = {True: "met", False: "not met"}.get(target["is_met"], "")
    bounds = [
        f"{name.replace('_', ' ')} {target[name]:g}"
        for name in ("at_least", "at_most")
        if target[name] is not None
    ]
    return [target["text"], measured, ", ".join(bounds), verdict]


def _metrics(outcome: Outcome) -> list[str]:
    rounds = [metrics for of_one in outcome.rounds.values() for metrics in of_one]
    return list(dict.fromkeys(name for metrics in rounds for name in metrics))


def cell(metric: str, value: float | None) -> str:
    """Returns a median as text, with its unit."""
    if value is None:
        return ""
    if UNITS.get(metric) == "MiB":
        return f"{value / _MIB:,.3g} MiB" if value < 100 * _MIB else f"{value / _MIB:,.0f} MiB"
    if metric in UNITS:
        return f"{value:.3g}"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
