"""Where commands write to: tables and lines to standard output, all else to standard error.

On a terminal rich draws tables, in colour and folded to its width, and bars. Anywhere else there is
neither: a table's lines are as long as they have to be, and nothing of rich is imported but the
width of characters. rich takes 0.35 ms for a row, so that long tables are plain on terminals too.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flax_partial.cli.tables import FAINT, STRONG, Table, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, RenderableType

_MOST_DRAWN_ROWS = 3000


class Output:
    """Standard output and error of a command.

    Attributes:
      is_json: Whether the result is to be JSON; then lines and tables are left out.
    """

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self._console: Console | None = None
        if sys.stdout.isatty():
            self._console = _new_console(is_stderr=False)

    @property
    def console(self) -> Console | None:
        """The terminal that standard output is; None where it is none."""
        return self._console

    def can_write(self, text: str) -> bool:
        """Whether standard output's encoding has these characters."""
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            return False
        return True

    def json(self, value: dict[str, Any]) -> None:
        """Writes the result as one line of JSON, if it is to be that."""
        if self.is_json:
            # ASCII: valid in every encoding, and file names may hold what none has.
            print(json.dumps(value, allow_nan=False), flush=True)  # noqa: T201

    def line(self, text: str, style: str = "") -> None:
        """Writes a line for people, or several."""
        if self.is_json:
            return
        shown = "\n".join(map(printable, text.split("\n")))
        if self._console is None:
            print(shown)  # noqa: T201
            return
        from rich.text import Text

        self._console.print(Text(shown, style))

    def table(self, table: Table) -> None:
        """Writes a table for people."""
        if self.is_json or not table.rows:
            return
        shown = table.printable().without_empty_columns()
        if self._console is None or len(table.rows) > _MOST_DRAWN_ROWS:
            print(*shown.lines(), sep="\n")  # noqa: T201
            return
        fitted, gone = shown.fitted(self._console.width)
        self._console.print(_drawn(fitted))
        if gone:
            self.line(f"no room for {', '.join(gone)}", FAINT)

    def note(self, text: str) -> None:
        """Writes a line to standard error."""
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201

    def ask(self, question: str) -> str:
        """Asks whoever sits at the terminal; an end of the input is no answer."""
        print(question, end="", file=sys.stderr, flush=True)  # noqa: T201
        return sys.stdin.readline().strip()

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar once something is done, gone at the end, if standard error is a terminal.

        Yields:
          What to call with how many bytes of how many are done.
        """
        if not sys.stderr.isatty():
            yield lambda _done, _total: None
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TimeRemainingColumn(),
        )
        console = _new_console(is_stderr=True)
        try:
            with progress.Progress(*columns, console=console, transient=True) as shown:
                task = shown.add_task(what, visible=False)
                yield lambda done, total: shown.update(
                    task, completed=done, total=total, visible=True
                )
        finally:
            console.show_cursor()  # whatever was interrupted: its start, too, which hides it

    @contextmanager
    def redrawn(self) -> Iterator[Callable[[Sequence[tuple[str, str]], Table], None]]:
        """Lets lines and a table be drawn again and again at one place of a terminal.

        What does not fit goes, of the table the first rows. The last of it stays.

        Yields:
          What draws them, each line with its style.
        """
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        with Live(console=self._console, auto_refresh=False) as live:

            def draw(lines: Sequence[tuple[str, str]], table: Table) -> None:
                above = Group(*(Text(printable(text), style) for text, style in lines))
                taken = len(live.console.render_lines(above)) + 1  # and the table's titles
                most_rows = max(live.console.height - taken - 1, 1)  # and the cursor
                last = Table(table.columns, table.rows[-most_rows:]).printable()
                fitted, _ = last.without_empty_columns().fitted(live.console.width)
                live.update(Group(above, _drawn(fitted)), refresh=True)

            yield draw

    def flush(self) -> None:
        """Has what was written so far leave this process."""
        sys.stdout.flush()


def _new_console(*, is_stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=is_stderr, highlight=False, markup=False, emoji=False)


def _drawn(table: Table) -> RenderableType:
    """Makes a table for a terminal."""
    from rich import table as rich_table
    from rich.text import Text

    made = rich_table.Table(box=None, pad_edge=False, header_style=STRONG)
    for column in table.columns:
        made.add_column(
            Text(column.title),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row in table.rows:
        made.add_row(*map(Text, row.cells), style=row.style)
    return made
