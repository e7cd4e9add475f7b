"""`ls`: the checkpoints and unfinished sessions in a run's directory."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax_partial.cli import places, text
from flax_partial.cli.command import add_command
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.tables import BAD, GOOD, WAITING, Column, Row, Table
from flax_partial.errors import NoSessionError, PartialCheckpointError
from flax_partial.loading import catalog
from flax_partial.loading import checkpoint as loading
from flax_partial.storage import local as storage

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
# What `CheckpointManager` of Orbax keeps beside a checkpoint's tree.
_ORBAX_METRICS = Path("metrics", "metrics")


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint or session in a directory, as far as it can be read.

    Attributes:
      name: Of its directory.
      state: `FINALIZED`, `UNFINISHED` or `DAMAGED`.
      format: `OURS` or `ORBAX`.
      step: The step that it is of; None where nothing tells.
      written_at: When it was finalized, or last saved to, in seconds since the epoch.
      bytes: Array data in it, in bytes.
      leaves: Number of leaves.
      metrics: Those that are stored with it.
      problem: What is wrong with it; empty if nothing is.
    """

    name: str
    state: str
    format: str = places.OURS
    step: int | None = None
    written_at: float | None = None
    bytes: int = 0
    leaves: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        run,
        "ls",
        "DIR",
        summary="list a run's checkpoints and unfinished sessions",
        description="List the checkpoints and unfinished sessions in a directory.",
    )
    parser.add_argument("--monitor", metavar="METRIC", help="the metric that says which is best")
    parser.add_argument("--mode", choices=("min", "max"), default="min", help="default: min")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Lists a directory; returns whether any checkpoint in it is damaged."""
    directory = places.directory(options.dir)
    _refuse_checkpoint(directory)
    entries = find(directory)
    latest = choose_latest(entries)
    best = choose_best(entries, options.monitor, options.mode)
    out.json(
        {
            "directory": str(directory.absolute()),
            "latest": latest,
            "best": best,
            "checkpoints": [_as_json(entry) for entry in entries],
        }
    )
    if not entries:
        out.line(f"no checkpoints in {directory}")
    now = time.time()
    rows = [_row(entry, now, latest=latest, best=best) for entry in entries]
    out.table(Table(_COLUMNS, rows))
    for entry in entries:
        if entry.problem:
            out.line(f"{entry.name}: {entry.problem}", BAD)
    return any(entry.state == places.DAMAGED for entry in entries)


def find(directory: Path) -> list[Entry]:
    """Reads what is in a directory: by step, then by name."""
    found = [
        entry
        for name in storage.listed(directory)
        if (directory / name).is_dir() and (entry := _entry(directory / name))
    ]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def choose_latest(entries: Sequence[Entry]) -> str | None:
    """Returns the finalized checkpoint of the last step; of two that which is called by it."""
    finalized = [entry for entry in entries if entry.state == places.FINALIZED]
    ranked = [
        (one.step, one.name == str(one.step), one.name) for one in finalized if one.step is not None
    ]
    return max(ranked)[-1] if ranked else None


def choose_best(entries: Sequence[Entry], monitor: str | None, mode: str) -> str | None:
    """Returns the finalized checkpoint with the best score, the newer of equals.

    Raises:
      WrongUseError: None of them has this metric, though there are some.
    """
    if monitor is None:
        return None
    finalized = [entry for entry in entries if entry.state == places.FINALIZED]
    scored = [entry for entry in finalized if monitor in entry.metrics]
    if finalized and not scored:
        known = sorted({name for entry in finalized for name in entry.metrics})
        raise WrongUseError(
            f"no checkpoint has a metric {monitor!r}; they have {', '.join(known) or 'none'}"
        )
    sign = 1 if mode == "min" else -1
    ranked = sorted(scored, key=lambda one: (sign * one.metrics[monitor], -(one.step or 0)))
    return ranked[0].name if ranked else None


def _entry(path: Path) -> Entry | None:
    """Returns None for what is neither a checkpoint nor a session."""
    try:
        if path.name.endswith(storage.SESSION_SUFFIX):
            return _unfinished(path)
        is_ours = (path / storage.STATE / storage.CONTENTS).exists()
        if is_ours or storage.part_names_in(path / storage.STATE) or catalog.is_finalized(path):
            return _finalized(path)
    except (PartialCheckpointError, WrongUseError, OSError) as error:
        return Entry(path.name, places.DAMAGED, step=_step(path, {}), problem=str(error))
    return None


def _finalized(path: Path) -> Entry:
    contents = loading.open_checkpoint(places.resolve(str(path))).contents
    metrics = contents.custom_metadata.get("metrics") or _orbax_metrics(path)
    is_whole = catalog.is_finalized(path)
    return Entry(
        name=path.name,
        state=places.FINALIZED if is_whole else places.DAMAGED,
        format=places.written_by(contents),
        step=_step(path, contents.custom_metadata),
        written_at=contents.committed_ns / 1e9,
        bytes=sum(leaf.bytes for leaf in contents.leaves),
        leaves=len(contents.leaves),
        metrics=_numbers(metrics),
        problem="" if is_whole else "_CHECKPOINT_METADATA or state/_METADATA is missing",
    )


def _unfinished(path: Path) -> Entry | None:
    where = places.resolve(str(path))
    if places.is_foreign(where):
        return Entry(path.name, places.UNFINISHED, places.ORBAX, _step(where.final, {}))
    try:
        session = places.read_session(where)
    except NoSessionError:  # finalized or dropped meanwhile
        return None
    metadata = session.plan.custom_metadata
    return Entry(
        name=path.name,
        state=places.UNFINISHED,
        step=_step(session.where.final, metadata),
        written_at=session.written_ns / 1e9 if session.parts else None,
        bytes=session.status.bytes,
        leaves=len(session.plan.leaves),
        metrics=_numbers(metadata.get("metrics")),
    )


def _step(path: Path, metadata: dict[str, Any]) -> int | None:
    step = metadata.get("step")
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    digits = path.name.removesuffix(storage.SESSION_SUFFIX).rpartition("_")[2]  # prefix_0000012
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def _orbax_metrics(path: Path) -> object:
    data = storage.read(path / _ORBAX_METRICS)
    try:
        return json.loads(data or b"{}")
    except ValueError:
        return {}


def _numbers(metrics: object) -> dict[str, float]:
    if not isinstance(metrics, dict):
        return {}
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    }


def _row(entry: Entry, now: float, *, latest: str | None, best: str | None) -> Row:
    is_readable = entry.written_at is not None
    metrics = " ".join(f"{key}={text.number(value)}" for key, value in entry.metrics.items())
    marks = [mark for mark, name in (("latest", latest), ("best", best)) if name == entry.name]
    return Row(
        (
            entry.name,
            "" if entry.step is None else str(entry.step),
            entry.state + (" (orbax)" if entry.format == places.ORBAX else ""),
            "" if entry.written_at is None else text.age(now - entry.written_at),
            text.size(entry.bytes) if is_readable else "",
            f"{entry.leaves:,}" if is_readable else "",
            metrics,
            ", ".join(marks),
        ),
        style=_STYLES[entry.state] or (GOOD if marks else ""),
    )


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "state": entry.state,
        "format": entry.format,
        "step": entry.step,
        "written_at": entry.written_at,
        "bytes": entry.bytes,
        "leaves": entry.leaves,
        "metrics": entry.metrics,
        "problem": entry.problem or None,
    }


def _refuse_checkpoint(directory: Path) -> None:
    is_session = directory.resolve().name.endswith(storage.SESSION_SUFFIX)
    if is_session or catalog.is_finalized(directory):
        raise WrongUseError(
            f"{directory} is a checkpoint, not a directory of them: use show or status"
        )
