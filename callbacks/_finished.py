"""The state after the last finished step, kept in case that the next one fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flax_partial.callbacks import _state

if TYPE_CHECKING:
    from flax_partial.callbacks._restored import Closing
    from flax_partial.callbacks._state import StateFn


@dataclass(frozen=True)
class Finished:
    """A finished step.

    JAX's arrays never change, so keeping references to them costs no copy. Once the next step has
    failed, those that were donated to it are gone.

    Attributes:
      step: The step.
      epoch: Its epoch, the first being 0.
      closing: What else is saved then.
      tree: The state right after it; NumPy's arrays, which may change, are copies.
    """

    step: int
    epoch: int
    closing: Closing
    tree: Any

    @classmethod
    def of(cls, trainer: Any, module: Any, state_fn: StateFn | None, closing: Closing) -> Finished:
        """Keeps a step that has just been finished."""
        tree = jax.tree.map(_copied, _state.take(trainer, module, state_fn))
        return cls(trainer.global_step, trainer.current_epoch, closing, tree)

    def check_is_there(self) -> None:
        """Checks that all arrays can still be read.

        Raises:
          ValueError: Some were donated.
        """
        leaves = jax.tree.leaves(self.tree)
        gone = sum(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)
        if gone:
            raise ValueError(
                f"{gone} of {len(leaves)} arrays of step {self.step} were donated to the step that "
                "failed. Without donation, or where it fails between two steps, it can be saved."
            )


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
