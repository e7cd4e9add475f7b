"""The metrics of a step, stored with its checkpoint; and a checkpoint's cost, sent as metrics.

A trainer's `callback_metrics` holds the newest value of each metric, and so, most of the time, a
validation loss of an earlier step. Only what was set since a step ended, or during it, is of that
step; what the mapping held before is of another one, and scores no later checkpoint.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from flax_partial.callbacks._reports import CheckpointReport

    OnMetrics = Callable[[Mapping[str, float], int], object]

logger = logging.getLogger(__name__)

_CLOSE = 0.75  # of the letters of a misspelt word; "step" and "epoch" have less in common
_SHORTEST = 3  # letters of a word that is short for another


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


class StepMetrics:
    """The metrics of the newest step, without those of earlier ones.

    A value is of an earlier step if it is the object that was there before. Python's numbers and
    texts may be one object by chance (all zeros are): in a mapping that is new they are new.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._own: dict[str, Any] = {}
        self._seen: Mapping[str, Any] = {}  # a copy, as it was when last looked at
        self._mapping: Mapping[str, Any] | None = None

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at what a trainer has, whose newest finished step is `step`."""
        if step != self._step:
            self._step, self._own = step, {}
        is_new = metrics is not self._mapping
        for name, value in metrics.items():
            is_known = name in self._seen and _is_same(value, self._seen[name])
            if not is_known or (is_new and isinstance(value, int | float | str)):
                self._own[name] = value
        self._seen, self._mapping = dict(metrics), metrics

    def of(self, step: int) -> Mapping[str, Any]:
        """Returns the metrics of a step; none unless it is the newest."""
        return dict(self._own) if step == self._step else {}

    @property
    def names(self) -> AbstractSet[str]:
        """Names of all metrics that the trainer has, whatever step they are of."""
        return self._seen.keys()


def _is_same(value: Any, other: Any) -> bool:
    """Whether nothing was set meanwhile: PyTorch's tensors may be another view of the same data."""
    if value is other:
        return True
    data = getattr(value, "data_ptr", None)
    return data is not None and type(other) is type(value) and data() == other.data_ptr()


def is_misspelt(monitor: str, names: Iterable[str], expected: Iterable[str]) -> bool:
    """Whether a monitor that is no metric so far is probably meant to be one of them.

    Of two metrics of one model mostly a whole word differs: "loss" and "val_loss", "loss_step" and
    "loss_epoch". Such a one may come yet, unless all are known that begin with its first word.

    Args:
      monitor: The metric that should score a checkpoint.
      names: Those that the trainer has.
      expected: Those that it will have once it has validated: "val_loss", "val_accuracy".
    """
    first, *more = _words(monitor)
    kinds = {words[0] for words in map(_words, expected) if len(words) > 1}
    return bool(more and first in kinds) or any(
        _is_almost([first, *more], _words(name)) for name in {*names, *expected}
    )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _is_almost(words: list[str], others: list[str]) -> bool:
    differ = [pair for pair in zip(words, others, strict=False) if pair[0] != pair[1]]
    return "".join(words) == "".join(others) or (
        len(words) == len(others) and len(differ) == 1 and _is_close(*differ[0])
    )


def _is_close(word: str, other: str) -> bool:
    """Whether two words differ by a few letters, or one is short for the other: "acc"."""
    short, long = sorted((word, other), key=len)
    is_short_for = len(short) >= _SHORTEST and long.startswith(short)
    return is_short_for or difflib.SequenceMatcher(None, word, other).ratio() >= _CLOSE


def lacking(monitor: str, metrics: Mapping[str, Any], known: Iterable[str]) -> str:
    """Returns why a step has no score, as a sentence after a colon, and which metrics there are.

    Args:
      monitor: The metric that should score it.
      metrics: The metrics of the step.
      known: Names of all metrics that the trainer has.
    """
    names = sorted({*metrics, *known})
    if monitor in metrics:
        why = f"is {metrics[monitor]}"
    elif monitor in names:
        why = "was not set in this step: its value is of an earlier one"
    else:
        close = difflib.get_close_matches(monitor, names, n=1)
        why = "is not among the trainer's metrics so far" + (
            f" (did you mean {close[0]!r}?)" if close else ""
        )
    return f"{monitor!r} {why}. Metrics there are: {', '.join(names) or 'none'}."


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
