"""Where training stands at a checkpoint: what is saved of that with it, and read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROGRESS = "progress"


@dataclass(frozen=True)
class Progress:
    """How far training is after a step.

    Attributes:
      step: Steps done.
      epochs_done: Epochs done.
      steps_of_epoch: Steps done in the epoch under way; 0 where the step ended its epoch.
    """

    step: int
    epochs_done: int
    steps_of_epoch: int

    @property
    def metadata(self) -> dict[str, Any]:
        """What is stored of it beside the step."""
        done = {"epochs_done": self.epochs_done, "steps_of_epoch": self.steps_of_epoch}
        return {_PROGRESS: done}


def progress_of(metadata: Mapping[str, Any], step: int) -> Progress:
    """Returns how far training was at the checkpoint of a step, given its custom metadata.

    What was written by others, or by earlier versions, has at most the epoch that was under way.
    """
    stored = metadata.get(_PROGRESS)
    known = stored if isinstance(stored, dict) else {"epochs_done": metadata.get("epoch")}
    done = (known.get(name) for name in ("epochs_done", "steps_of_epoch"))
    return Progress(step, *(one if isinstance(one, int) else 0 for one in done))
