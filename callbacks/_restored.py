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


@dataclass(frozen=True)
class Closing:
    """What the last part that a callback saves in a step stores beside arrays.

    Attributes:
      training: What to resume from: the progress, and the states of extras.
      custom_metadata: The user's own.
    """

    training: Mapping[str, Any]
    custom_metadata: Mapping[str, Any]


def progress_of(recorded: Mapping[str, Any], step: int) -> Progress:
    """Returns how far training was at the checkpoint of a step, given what is recorded of training.

    What was written by others, or by earlier versions, has at most the epoch that was under way.
    """
    stored = recorded.get(_PROGRESS)
    known = stored if isinstance(stored, dict) else {"epochs_done": recorded.get("epoch")}
    done = (known.get(name) for name in ("epochs_done", "steps_of_epoch"))
    return Progress(step, *(one if isinstance(one, int) else 0 for one in done))
