"""CLU: a periodic action that checkpoints, for loops that call `action(step)` after each step.

CLU's module of them imports TensorFlow, which CLU does not declare: the extra `clu` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, cast

from flax_partial.callbacks import _extras
from flax_partial.callbacks._options import UnscheduledOptions, explicit
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.loop import Loop, LoopCheckpoint
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

_extras.need("clu.periodic_actions", extra="clu")

from clu.periodic_actions import PeriodicAction

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from flax_partial.callbacks._options import LoopOptions


class CluCheckpoint(LoopCheckpoint, PeriodicAction):
    """Checkpoints a loop at the steps and times that a periodic action triggers at.

        with CluCheckpoint("runs/lm", every_steps=100) as checkpoints:
            state, first = checkpoints.restore(state)
            for step in range(first, 1001):
                state = train(state)
                checkpoints(step, state=state)

    Steps count from 1, as CLU's do: the number is that of the steps done. The block ends as that of
    `checkpointing` does, but saves nothing itself: name the last step in `on_steps`.
    """

    @explicit(UnscheduledOptions, PartialCheckpointCallback.__init__)
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] | None = None,
        take_state: Callable[[], Any] | None = None,
        **options: Unpack[UnscheduledOptions],
    ) -> None:
        """Prepares an action; nothing is written before the first step.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          every_steps: As of every periodic action: save at each n-th step.
          every_secs: As of every periodic action: save where none was for so many seconds.
          on_steps: As of every periodic action: save at these steps.
          take_state: Returns the state to save, for loops that call all their actions alike and
            hand no state to this one.
          options: What else `PartialCheckpointCallback` takes, but for what to save, and when.

        Raises:
          TypeError: There is no such option.
          ValueError: An option has a value that makes no sense, or nothing would ever be saved.
        """
        super().__init__(every_steps=every_steps, every_secs=every_secs, on_steps=on_steps)
        if every_steps is None and every_secs is None and not self._on_steps:
            raise ValueError(
                "every_steps, every_secs and on_steps are all left out: nothing would be saved. "
                "Give one of them."
            )
        schedule = {"every_n_epochs": None, "every_n_train_steps": 1}  # of those it is called for
        scheduled = cast("LoopOptions", {**options, **schedule})
        self._loop = Loop(directory, take_state or (lambda: self._state), scheduled)
        self._state: Any = None
        self._metrics: Mapping[str, Any] | None = None

    @explicit(RestoreOptions, PartialCheckpointCallback.restore)
    def restore(self, state: Any, **options: Unpack[RestoreOptions]) -> tuple[Any, int]:
        """The newest checkpoint's state, or `state` where there is none, and the step to do next.

        Args:
          state: What to load, in shape. NNX objects in it are updated in place.
          options: What `PartialCheckpointCallback.restore` takes beside the target.

        Raises:
          TargetMismatchError: The checkpoint does not fit; nothing was updated.
          CheckpointExistsError: It is older than the newest, and `discard_later` is False.
        """
        self._state = state  # what is saved at step 0, if that is
        restored = self._loop.restore(state, **options)
        self._previous_step = self._last_step = None  # CLU demands that each step follows the last
        return (state if restored is None else restored), self._loop.trainer.global_step + 1

    def __call__(
        self,
        step: int,
        t: float | None = None,
        *,
        state: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Saves if it triggers; returns once the state may be donated, and whether it saved.

        Args:
          step: Steps done.
          t: The time, in seconds; by default, now.
          state: What to save, unless `take_state` returns it.
          metrics: What `monitor` may rank by; the numbers of it are stored with the checkpoint.
        """
        self._state, self._metrics = state, metrics
        before = self._previous_step, self._last_step
        try:
            return bool(super().__call__(step, t))
        except Exception:
            self._previous_step, self._last_step = before  # so that the call may be repeated
            raise
        finally:
            self._state = self._metrics = None

    def _apply(self, step: int, t: float) -> None:
        self._loop.step(step, self._metrics)
