"""The trainer's metrics, as they are stored with a checkpoint and score it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are finite numbers; waits for the ones still being computed."""
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
