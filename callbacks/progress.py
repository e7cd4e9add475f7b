"""A bar for who waits at the end of training, and wonders what for."""

from __future__ import annotations

from concurrent import futures
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

_REFRESH_SECS = 0.1


def wait(jobs: Sequence[futures.Future[None]], *, shown: bool) -> None:
    """Waits for all jobs; a bar, gone when they are done, counts them if `shown`."""
    bar = _bar() if shown else None
    if bar is None or not bar.console.is_terminal:
        futures.wait(jobs)
        return
    with bar:
        task = bar.add_task("Finishing checkpoints", total=len(jobs))
        while futures.wait(jobs, timeout=_REFRESH_SECS).not_done:
            bar.update(task, completed=sum(job.done() for job in jobs))


def _bar() -> Progress:
    from rich.progress import Progress

    return Progress(transient=True)
