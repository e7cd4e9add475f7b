"""The trainer's metrics, stored with a checkpoint; and a checkpoint's cost, sent as metrics."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from flax_partial.callbacks._reports import CheckpointReport

    OnMetrics = Callable[[Mapping[str, float], int], object]

logger = logging.getLogger(__name__)


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are finite numbers; waits for those still being computed."""
    numbers = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except Exception as error:  # noqa: BLE001 - a metric may be anything, and need not be kept
            logger.debug("Metric %r is not stored: %s", name, error)
            continue
        if math.isfinite(number):
            numbers[str(name)] = number
    return numbers


def check_score(path: Path, numbers: Mapping[str, float], monitor: str | None) -> None:
    """Warns of a checkpoint that lacks the metric by which it should be ranked."""
    if monitor is not None and monitor not in numbers:
        logger.warning(
            "%s has no score: %r is not among the trainer's metrics (%s), or no finite number.",
            path,
            monitor,
            ", ".join(numbers),
        )


def send(report: CheckpointReport, trainer: Any, on_metrics: OnMetrics | None) -> None:
    """Sends what a checkpoint cost to a function, or else to the trainer's loggers.

    Raises:
      Exception: Whatever the function or the logger raised.
    """
    names = ("blocked_secs", "write_secs", "bytes", "finalize_secs")
    costs = {f"checkpoint/{name}": getattr(report, name) for name in names}
    if on_metrics is not None:
        on_metrics(costs, report.step)
        return
    for one in getattr(trainer, "loggers", None) or [getattr(trainer, "logger", None)]:
        if hasattr(one, "log_metrics"):
            one.log_metrics(costs, report.step)


def log(report: CheckpointReport) -> None:
    """Logs the one line of a checkpoint."""
    from rich.filesize import decimal

    logger.info(
        "Finalized %s: %s in %d groups; held training for %.3f s, written in %.3f s, finalized in "
        "%.3f s.",
        report.path,
        decimal(report.bytes),
        len(report.groups),
        report.blocked_secs,
        report.write_secs,
        report.finalize_secs,
    )
