"""Forked children: JAX, whose threads they lack, calls fork unsafe, and so do we.

A child of a process that had used JAX, or this package, may read. What writes raises one clear
error there, instead of waiting for threads that are not. A child that was forked before, as from a
server that has only imported modules, is like any other process.

It is imported with the package, to see every fork, and so imports nothing of JAX itself.
"""

import os
import sys

from flax_partial.errors import ForkedProcessError

_is_in_use = False
_is_child_of_user = False


def check_not_forked(call: str) -> None:
    """Notes that this process uses the package.

    Args:
      call: The public call that the error names.

    Raises:
      ForkedProcessError: This is a forked child of a process that had used it, or JAX.
    """
    global _is_in_use  # noqa: PLW0603 - once a process
    if _is_child_of_user:
        raise ForkedProcessError(
            f"{call} was called in a forked child of a process that had used JAX: its threads are "
            "not here, so that this could wait forever. Start the child with the 'spawn' or "
            "'forkserver' method of multiprocessing, or call this in the parent. Loading works."
        )
    _is_in_use = True


def _look_before() -> None:
    """Checks in the parent: in the child JAX's locks may be held by threads that are not there."""
    global _is_in_use  # noqa: PLW0603 - once a process
    if "jax" in sys.modules and not _is_in_use:
        from flax_partial.distributed import jax_service

        _is_in_use = jax_service.has_started_a_backend()


def _note_fork() -> None:
    global _is_child_of_user, _is_in_use
    _is_child_of_user, _is_in_use = _is_child_of_user or _is_in_use, False


os.register_at_fork(before=_look_before, after_in_child=_note_fork)
