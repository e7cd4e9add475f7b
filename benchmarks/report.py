"""Tells outcomes: tables for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Outcome, Target

_PACKAGES = ("jax", "tensorstore", "orbax-checkpoint", "safetensors", "numpy", "flax-partial")
_MIB = 1 << 20
_LOG_WIDTH = 120

UNITS = {"memory": "MiB", "growth": "MiB", "beside the state": "MiB", "steps/s": "", "GB/s": ""}
"""The unit in which a metric is told, else seconds; what is told in MiB is measured in bytes."""


def make_console() -> Console:
    """Returns where to print; as wide as its tables need where nobody watches."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def describe_machine(directory: Path) -> dict[str, Any]:
    """Returns what figures depend on: cores, memory, the directory's file system, versions."""
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": _file_system(directory),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`, whose mount point is the longest."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    path = directory.resolve()
    holding = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(holding)[1]


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Prints the medians of every contender, then every target beside its ratio."""
    scenario = outcome.scenario
    console.print(f"\n[bold]{scenario.name}[/bold]: {scenario.work}")
    metrics = _metrics(outcome)
    medians = Table("contender", "rounds", *metrics)
    for name, rounds in outcome.rounds.items():
        cells = [cell(metric, outcome.median(Figure(name, metric))) for metric in metrics]
        medians.add_row(name, str(len(rounds)), *cells)
    console.print(medians)
    targets = Table("ratio of medians", "measured", "target", "")
    for target in scenario.targets:
        ratio = outcome.ratio(target)
        measured = "not measured" if ratio is None else f"{ratio:,.3g}"
        targets.add_row(target.text, measured, _bound(target), _verdict(outcome, target))
    console.print(targets)


def print_summary(outcomes: Iterable[Outcome], console: Console) -> None:
    """Prints how many targets are met, and which are not."""
    verdicts = [
        (outcome.scenario.name, target.text, outcome.is_met(target))
        for outcome in outcomes
        for target in outcome.scenario.targets
    ]
    judged = [met for _, _, met in verdicts if met is not None]
    if judged:
        console.print(f"\n{judged.count(True)} of {len(judged)} targets met.")
    for name, text, met in verdicts:
        if met is False:
            console.print(f"  not met: {name}: {text}")


def write_json(outcomes: Iterable[Outcome], path: Path, *, machine: dict[str, Any]) -> None:
    """Writes every round of every contender, the medians and the targets."""
    document = {
        "machine": machine,
        "scenarios": [_as_json(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


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


def _bound(target: Target) -> str:
    words = []
    if target.at_least is not None:
        words.append(f"at least {target.at_least:g}")
    if target.at_most is not None:
        words.append(f"at most {target.at_most:g}")
    return ", ".join(words)


def _verdict(outcome: Outcome, target: Target) -> str:
    met = outcome.is_met(target)
    if met is None:
        return ""
    return "[green]met[/green]" if met else "[red]not met[/red]"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    metrics = _metrics(outcome)
    return {
        "name": outcome.scenario.name,
        "work": outcome.scenario.work,
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
            for target in outcome.scenario.targets
        ],
    }
