"""Where commands write to: tables and lines to standard output, all else to standard error.

On a terminal rich draws tables, in colour and folded to its width, and bars. Anywhere else there is
neither: a table's lines are as long as they have to be, and nothing of rich is imported but the
width of characters. rich takes 0.35 ms for a row, so that long tables are plain on terminals too.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, RenderableType

_MOST_DRAWN_ROWS = 3000
_GAP = "  "
GOOD, BAD, WAITING, FAINT, STRONG = "green", "red", "yellow", "dim", "bold"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
      title: What stands above it.
      is_number: Whether it is aligned to the right, and never folded.
    """

    title: str
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells, and in which style they are drawn on a terminal."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under titles; columns in which nothing stands are left out."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    def without_empty_columns(self) -> Table:
        """The same without columns in which nothing stands."""
        kept = [i for i in range(len(self.columns)) if any(row.cells[i] for row in self.rows)]
        return Table(
            [self.columns[i] for i in kept],
            [Row([row.cells[i] for i in kept], row.style) for row in self.rows],
        )


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

    def json(self, value: dict[str, Any]) -> None:
        """Writes the result as one line of JSON, if it is to be that."""
        if self.is_json:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)  # noqa: T201

    def line(self, text: str, style: str = "") -> None:
        """Writes a line for people."""
        if self.is_json:
            return
        if self._console is None:
            print(text)  # noqa: T201
            return
        from rich.text import Text

        self._console.print(Text(text, style))

    def table(self, table: Table) -> None:
        """Writes a table for people."""
        if self.is_json or not table.rows:
            return
        shown = table.without_empty_columns()
        if self._console is None or len(table.rows) > _MOST_DRAWN_ROWS:
            print(*_plain_lines(shown), sep="\n")  # noqa: T201
            return
        self._console.print(drawn(shown))

    def note(self, text: str) -> None:
        """Writes a line to standard error."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    def ask(self, question: str) -> str:
        """Asks whoever sits at the terminal; an end of the input is no answer."""
        print(question, end="", file=sys.stderr, flush=True)  # noqa: T201
        return sys.stdin.readline().strip()

    @contextmanager
    def bar(
        self, what: str, total_bytes: int | None = None
    ) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar, gone at the end, if standard error is a terminal.

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
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(
            *columns, console=_new_console(is_stderr=True), transient=True
        ) as shown:
            task = shown.add_task(what, total=total_bytes)
            yield lambda done, total: shown.update(task, completed=done, total=total)

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
                most_rows = max(live.console.height - len(lines) - 2, 1)
                last = Table(table.columns, table.rows[-most_rows:]).without_empty_columns()
                live.update(Group(*(Text(*line) for line in lines), drawn(last)), refresh=True)

            yield draw

    def flush(self) -> None:
        """Has what was written so far leave this process."""
        sys.stdout.flush()


def _new_console(*, is_stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=is_stderr, highlight=False, markup=False, emoji=False)


def drawn(table: Table) -> RenderableType:
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


def _plain_lines(table: Table) -> Iterator[str]:
    from rich.cells import cell_len

    rows = [[column.title for column in table.columns], *(row.cells for row in table.rows)]
    widths = [max(map(cell_len, cells)) for cells in zip_longest(*rows, fillvalue="")]
    for cells in rows:
        padded = [
            " " * (width - cell_len(cell)) + cell
            if column.is_number
            else cell + " " * (width - cell_len(cell))
            for cell, width, column in zip(cells, widths, table.columns, strict=True)
        ]
        yield _GAP.join(padded).rstrip()
