"""Steps that are due while the checkpoint before is still on its way: skipped, or waited for.

All callbacks of a run, in all processes, decide alike: the first to ask about a step decides for
those of its process, and where there are several processes, they agree.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import jax

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_MOST_DECIDED = 16
WHEN_BEHIND = ("wait", "skip")


class Behind:
    """Decides for each step that is due whether the run is so far behind that it is skipped."""

    def __init__(self, is_behind: Callable[[], bool], timeout_secs: float) -> None:
        """Prepares it.

        Args:
          is_behind: Whether a checkpoint of this process is not finalized yet.
          timeout_secs: For how many seconds to wait for other processes.
        """
        self._is_behind = is_behind
        self._timeout_secs = timeout_secs
        self._lock = threading.Lock()  # guards what follows; held while processes agree
        self._decided: dict[int, bool] = {}  # of the last steps: a trainer may stream ahead

    def skips(self, step: int, name: str) -> bool:
        """Whether to skip a step; the answer is the same each time.

        Args:
          step: The step.
          name: Of the run, the same in all processes.
        """
        with self._lock:
            if step not in self._decided:
                self._decided[step] = self._decide(f"behind {name} {step}")
                if len(self._decided) > _MOST_DECIDED:
                    del self._decided[min(self._decided)]
            return self._decided[step]

    def _decide(self, subject: str) -> bool:
        if jax.process_count() == 1:
            return self._is_behind()
        try:
            skips: bool = fp.agree(
                subject,
                ready=self._is_behind,
                act=lambda said: any(said.values()),
                timeout_secs=self._timeout_secs,
            )
        except Exception as error:  # noqa: BLE001 - of the service; the save, too, will report it
            logger.debug("The processes could not agree on whether to skip a step: %s", error)
            return False
        return skips
