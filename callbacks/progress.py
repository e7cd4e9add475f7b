"""A bar of bytes, once something takes a second; gone when it is done.

It is drawn by the thread that trains, in hooks and while training waits. Below a bar of tqdm's it
is one more of tqdm's, also while training goes on: those may come and go in any order. Rich's
displays must end in the order opposite to that in which they began, and other prints would break a
line of ours: so without tqdm there is a bar only while training waits, for then the terminal is
ours; inside of the display of rich that is there, if any.
"""

from __future__ import annotations

import sys
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

_PATIENCE_SECS = 1.0
_REFRESH_SECS = 0.1


class _Drawn(Protocol):
    """A bar on the screen."""

    def update(self, what: str, done: int, total: int) -> None:
        """Draws how many bytes of how many are done."""

    def close(self) -> None:
        """Takes it off the screen."""


class Bar:
    """A bar that is not there until it has something to say."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began: float | None = None
        self._drawn: _Drawn | None = None

    def update(self, done: int, total: int, *, while_waiting: bool = True) -> None:
        """Draws it if there has been something to be done for a second.

        Args:
          done: How many bytes are done.
          total: Of how many.
          while_waiting: Whether training waits, so that the terminal is ours.
        """
        now = time.monotonic()
        self._began = self._began or now
        if self._drawn is None and now - self._began >= _PATIENCE_SECS:
            self._drawn = _beside_tqdm() or (_in_rich() if while_waiting else None)
        if self._drawn is not None:
            self._drawn.update(self._what, done, total)

    def close(self) -> None:
        """Takes it away; `update` begins anew."""
        self._began = None
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            drawn.close()


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


class _Tqdm:
    """One more bar below those of tqdm."""

    def __init__(self, neighbour: Any) -> None:
        kind = type(neighbour)
        if not kind.__module__.startswith("tqdm."):  # a subclass, which may want other arguments
            kind = sys.modules["tqdm.std"].tqdm
        self._bar = kind(
            total=1, unit="B", unit_scale=True, leave=False, file=neighbour.fp, dynamic_ncols=True
        )

    def update(self, what: str, done: int, total: int) -> None:
        self._bar.desc, self._bar.n, self._bar.total = f"{what}: ", done, total
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _beside_tqdm() -> _Tqdm | None:
    std = sys.modules.get("tqdm.std")
    if std is None:
        return None
    shown = [bar for bar in tuple(getattr(std.tqdm, "_instances", ())) if not bar.disable]
    return _Tqdm(shown[0]) if shown and shown[0].fp.isatty() else None


class _Rich:
    """A display of rich's, inside of the one that is there, if any."""

    def __init__(self, console: Console) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
        )
        self._console = console
        self._progress = progress.Progress(*columns, console=console, transient=True)
        try:
            self._progress.start()
        except BaseException:
            console.show_cursor()  # which its start hides
            raise
        self._task = self._progress.add_task("", total=None)

    def update(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()


def _in_rich() -> _Rich | None:
    from rich.errors import LiveError

    console = _console()
    if not console.is_terminal:
        return None
    try:
        return _Rich(console)
    except LiveError:  # before 14.1, rich had no display inside of another
        return None


def _console() -> Console:
    """The console that has a display now; else the one that is a terminal."""
    import rich
    from rich.console import Console
    from rich.file_proxy import FileProxy

    if isinstance(sys.stdout, FileProxy):  # a display has taken the place of the standard output
        shown: Console | None = getattr(sys.stdout, "_FileProxy__console", None)
        if shown is not None:
            return shown
    console = rich.get_console()
    return console if console.is_terminal else Console(stderr=True)
