"""Handles to what workers do: futures that record whether their error was seen."""

import contextlib
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from flax_partial.reports import CheckpointMetadata, SaveReport

T = TypeVar("T")


class Handle(Future[T]):
    """A future that cannot be cancelled, and records whether its error was seen.

    Attributes:
      was_seen: Whether its outcome was read since it was there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.was_seen = False

    def result(self, timeout: float | None = None) -> T:
        """Waits at most `timeout` seconds for the outcome; returns it, or raises its error."""
        self.exception(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits at most `timeout` seconds for the outcome; returns its error, or None."""
        error = super().exception(timeout)
        self.was_seen = True
        return error

    def unseen_error(self) -> BaseException | None:
        """Returns the error of a finished handle that was not read, once."""
        if not self.done() or self.was_seen:
            return None
        return self.exception()

    def abandon(self, error: BaseException) -> None:
        """Ends a handle whose work was never begun; the caller of this raises something itself."""
        self.was_seen = True
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


class SaveHandle(Handle[SaveReport]):
    """A save in flight; has the interface of `concurrent.futures.Future`."""


class FinalizeHandle(Handle[CheckpointMetadata]):
    """A finalize in flight; has the interface of `concurrent.futures.Future`."""
