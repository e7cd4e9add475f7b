"""A bar of bytes while training waits for longer than a second; gone when it is done.

It is drawn by the thread that waits, and never while training goes on: what else is written then
would break its line. Where tqdm is imported the bar is tqdm's, which puts it below those that are
there; else it is rich's. While another display of rich is running there is none: two displays on
one terminal draw over each other.
"""

from __future__ import annotations

import sys
import time
from concurrent import futures
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Draw = Callable[[int, int], None]

_PATIENCE_SECS = 1.0
_REFRESH_SECS = 0.1


class Bar:
    """A bar that appears at the first update after a second; used by one thread at a time."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began: float | None = None
        self._draw: Draw | None = None
        self._shown = ExitStack()

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are done."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        if self._draw is None and now - self._began >= _PATIENCE_SECS:
            self._draw = self._shown.enter_context(_bar(self._what, done, total))
        if self._draw is not None:
            self._draw(done, total)

    def close(self) -> None:
        """Removes it from the screen; a later `update` begins anew."""
        self._began = self._draw = None
        self._shown.close()


def wait(
    jobs: Sequence[futures.Future[None]], bar: Bar | None, amounts: Callable[[], tuple[int, int]]
) -> None:
    """Waits for all jobs, and draws meanwhile how many bytes of how many are written."""
    if bar is None:
        futures.wait(jobs)
        return
    try:
        while futures.wait(jobs, timeout=_REFRESH_SECS).not_done:
            bar.update(*amounts())
    finally:
        bar.close()


@contextmanager
def _bar(what: str, done: int, total: int) -> Iterator[Draw]:
    """Shows a bar on standard error; yields a function that draws it anew."""
    from rich.file_proxy import FileProxy  # what a running display of rich replaces streams by

    is_rich_running = any(isinstance(stream, FileProxy) for stream in (sys.stdout, sys.stderr))
    if is_rich_running or not sys.stderr.isatty():
        yield lambda _done, _total: None
    elif "tqdm" in sys.modules:
        with _tqdm_bar(what, done, total) as draw:
            yield draw
    else:
        with _rich_bar(what, total) as draw:
            yield draw


@contextmanager
def _tqdm_bar(what: str, done: int, total: int) -> Iterator[Draw]:
    from tqdm import tqdm

    with tqdm(
        desc=what,
        initial=done,
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def draw(done: int, total: int) -> None:
            bar.n, bar.total = done, total
            bar.refresh()

        yield draw


@contextmanager
def _rich_bar(what: str, total: int) -> Iterator[Draw]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(what, total=total)
            yield lambda done, total: shown.update(task, completed=done, total=total)
    finally:
        # Also where an interrupt came into the start, which hides it: another console, since
        # that one may still hold back what it has to write.
        Console(stderr=True).show_cursor()
