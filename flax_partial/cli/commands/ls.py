"""`ls`: the checkpoints and unfinished sessions in a run's directory."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax_partial as fp
from flax_partial.cli import places, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import BAD, GOOD, WAITING, Column, Output, Row
from flax_partial.loading.catalog import is_finalized
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
class _Entry:
    """One checkpoint or session in a directory, as far as it can be read; as `--json` has it.

    Attributes:
      name: Of its directory.
      state: `FINALIZED`, `UNFINISHED` or `DAMAGED`.
      format: `OURS` or `ORBAX`.
      step: The step that it is of; None where nothing tells.
      written_at: When it was finalized, or last saved to, in seconds since the epoch.
      bytes: Array data in it, in bytes.
      leaves: Number of leaves.
      metrics: Those that are stored with it.
      problem: What is wrong with it; None if nothing is.
    """

    name: str
    state: str
    format: str = places.OURS
    step: int | None = None
    written_at: float | None = None
    bytes: int = 0
    leaves: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "List the checkpoints and unfinished sessions in a directory."
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--monitor", metavar="METRIC", help="the metric that says which is best")
    parser.add_argument("--mode", choices=("min", "max"), default="min", help="default: min")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Lists a directory; returns whether any checkpoint in it is damaged."""
    directory = _directory(options.dir)
    entries = _entries(directory)
    latest, best = _latest(entries), _best(entries, options.monitor, options.mode)
    out.json(
        {
            "directory": str(directory.absolute()),
            "latest": latest,
            "best": best,
            "checkpoints": [dataclasses.asdict(entry) for entry in entries],
        }
    )
    if not entries:
        out.line(f"no checkpoints in {directory}")
    marked = {"latest": latest, "best": best}
    out.table(_COLUMNS, [_row(entry, time.time(), marked) for entry in entries])
    for entry in entries:
        if entry.problem:
            out.line(f"{entry.name}: {entry.problem}", BAD)
    return any(entry.state == places.DAMAGED for entry in entries)


def _directory(path: str) -> Path:
    """Takes the path of a run's directory.

    Raises:
      WrongUseError: There is none.
    """
    found = Path(path)
    if not found.is_dir():
        kind = "is not a directory" if found.exists() else "does not exist"
        raise WrongUseError(f"{path} {kind}")
    if found.resolve().name.endswith(storage.SESSION_SUFFIX) or is_finalized(found):
        raise WrongUseError(f"{path} is a checkpoint, not a directory of them: use show or status")
    return found


def _entries(directory: Path) -> list[_Entry]:
    """Reads what is in a directory: by step, then by name."""
    paths = (directory / name for name in storage.listed(directory))
    found = [entry for path in paths if path.is_dir() and (entry := _entry(path))]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def _latest(entries: Sequence[_Entry]) -> str | None:
    """Returns the finalized checkpoint of the last step; of two that which is called by it."""
    ranked = [
        (one.step, one.name == str(one.step), one.name)
        for one in entries
        if one.state == places.FINALIZED and one.step is not None
    ]
    return max(ranked)[-1] if ranked else None


def _best(entries: Sequence[_Entry], monitor: str | None, mode: str) -> str | None:
    """Returns the finalized checkpoint with the best score, the newer of equals.

    Raises:
      WrongUseError: None of them has this metric, though there are some.
    """
    finalized = [entry for entry in entries if entry.state == places.FINALIZED]
    if monitor is None or not finalized:
        return None
    sign = 1 if mode == "min" else -1
    scored = [one for one in finalized if monitor in one.metrics]
    if not scored:
        known = ", ".join(sorted({name for one in finalized for name in one.metrics}))
        raise WrongUseError(f"no checkpoint has a metric {monitor!r}; they have {known or 'none'}")
    return min(scored, key=lambda one: (sign * one.metrics[monitor], -(one.step or 0))).name


def _entry(path: Path) -> _Entry | None:
    """Returns None for what is neither a checkpoint nor a session."""
    state = path / storage.STATE
    try:
        if path.name.endswith(storage.SESSION_SUFFIX):
            return _unfinished(path)
        is_ours = (state / storage.CONTENTS).exists() or storage.part_names_in(state)
        if is_ours or is_finalized(path):
            return _finalized(path)
    except (fp.PartialCheckpointError, WrongUseError, OSError) as error:
        return _Entry(path.name, places.DAMAGED, step=_step(path, {}), problem=str(error))
    return None


def _finalized(path: Path) -> _Entry:
    described = fp.metadata(places.resolve(str(path)).final)
    metadata = described.custom_metadata
    is_whole = is_finalized(path)
    return _Entry(
        name=path.name,
        state=places.FINALIZED if is_whole else places.DAMAGED,
        format=places.written_by(described),
        step=_step(path, metadata),
        written_at=described.committed_at,
        bytes=described.bytes,
        leaves=len(described.leaves),
        metrics=_numbers(metadata.get("metrics") or _orbax_metrics(path)),
        problem=None if is_whole else "_CHECKPOINT_METADATA or state/_METADATA is missing",
    )


def _unfinished(path: Path) -> _Entry | None:
    where = places.resolve(str(path))
    if places.is_foreign(where):
        return _Entry(path.name, places.UNFINISHED, places.ORBAX, _step(where.final, {}))
    try:
        status = fp.status(where.final)
    except fp.NoSessionError:  # finalized or dropped meanwhile
        return None
    return _Entry(
        name=path.name,
        state=places.UNFINISHED,
        step=_step(where.final, status.custom_metadata),
        written_at=max((part.written_at for part in status.parts), default=None),
        bytes=status.bytes,
        leaves=len(status.leaves),
        metrics=_numbers(status.custom_metadata.get("metrics")),
    )


def _step(path: Path, metadata: dict[str, Any]) -> int | None:
    step = metadata.get("step")
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    digits = path.name.removesuffix(storage.SESSION_SUFFIX).rpartition("_")[2]  # prefix_0000012
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def _orbax_metrics(path: Path) -> object:
    try:
        return json.loads(storage.read(path / _ORBAX_METRICS) or b"{}")
    except ValueError:
        return {}


def _numbers(metrics: object) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    }


def _row(entry: _Entry, now: float, marked: dict[str, str | None]) -> Row:
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
