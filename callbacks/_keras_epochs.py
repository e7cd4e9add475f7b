"""Which epochs of which `fit` a Keras model has been trained for: a script may call several.

Keras counts epochs from 0 in each `fit`, unless that is told an `initial_epoch`. Over all fits they
are counted on here, so that a script that is started again leaves out the fits that were over, and
the epochs that were done of the one that was not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import MutableMapping

logger = logging.getLogger(__name__)


@dataclass
class FitEpochs:
    """The epochs that one model was trained for, in this process and before.

    Attributes:
      done: Epochs done, over all fits.
      offset: Those that were done before the first epoch that this `fit` counts from.
      is_in_fit: Whether a `fit` has begun, and not ended: when the next one begins, it has failed.
    """

    done: int = 0
    offset: int = 0
    is_in_fit: bool = False
    _restored_at: int | None = None  # the step, until the fits of the run before are made up for
    _earlier: int = 0  # epochs of earlier fits, of which the script will call some again
    _of_fit: int = 0  # epochs of the fit that the checkpoint is of, as Keras counts them
    _is_fresh: bool = True  # whether this fit has begun no epoch yet

    def restore(self, step: int, *, done: int, of_fit: int) -> None:
        """Takes over what a checkpoint says: epochs done over all fits, and in the last of them."""
        self.done, self._restored_at = done, step
        self._earlier, self._of_fit = max(0, done - of_fit), of_fit

    def begin_fit(self, step: int, epochs: int) -> int | None:
        """Returns the epoch that a `fit` goes on with; None where nothing was done of it before.

        Args:
          step: That of the model.
          epochs: At which epoch it ends.
        """
        self._is_fresh = True
        if self._restored_at != step:  # the model was trained since
            self._restored_at = None
            return None
        if self._earlier and self._earlier >= epochs:
            self._earlier -= epochs
            logger.info("This fit was over before the checkpoint: nothing is left of it.")
            return epochs
        first, self._earlier = self._earlier + self._of_fit, 0
        if first <= epochs:
            self._restored_at = None
        return first

    def begin_epoch(self, epoch: int) -> int:
        """Returns which epoch it is, over all fits, given Keras's number."""
        if self._is_fresh:
            self.offset = max(0, self.done - epoch)
            self._is_fresh, self.is_in_fit = False, True
        return epoch + self.offset


_known: MutableMapping[Any, FitEpochs] = WeakKeyDictionary()


def epochs_of(model: Any) -> FitEpochs:
    """Returns what is known of a model's epochs, whatever callbacks trained it."""
    return _known.setdefault(model, FitEpochs())
