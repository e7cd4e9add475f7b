"""Where commands write to: tables and lines to standard output, all else to standard error.

On a terminal rich draws tables, in colour and folded to its width, and bars. Anywhere else there is
neither: a table's lines are as long as they have to be.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len

from flax_partial.cli.errors import WrongUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console
    from rich.table import Table as RichTable

GOOD, BAD, WAITING, FAINT, STRONG = "green", "red", "yellow", "dim", "bold"
_MOST_DRAWN_ROWS = 3000  # rich takes 0.35 ms for each: longer tables are plain on terminals too
_GAP = "  "


def picked(value: object, *names: str) -> dict[str, Any]:
    """Returns some attributes by name."""
    return {name: getattr(value, name) for name in names}


def printable(text: str) -> str:
    """Text in which nothing can move a terminal's cursor, or begin another line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      title: What stands above it.
      is_number: Whether it is aligned to the right, and never folded.
      dispensable: Where the terminal is too narrow, columns are left out: first those that say the
        same in each row, or what the first column says, then those with the largest number; others
        with 0 never.
    """

    title: str
    is_number: bool = False
    dispensable: int = 0


class Row(NamedTuple):
    """A row of a table: its cells, and the style in which a terminal shows them."""

    cells: Sequence[str]
    style: str = ""


class Table:
    """Rows under titles, without the columns in which every cell is empty.

    Attributes:
      rows: Their cells can do no more to a terminal than stand in it.
    """

    def __init__(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        used = [i for i in range(len(columns)) if any(row.cells[i] for row in rows)]
        self._columns = [columns[i] for i in used]
        self.rows = [Row([printable(row.cells[i]) for i in used], row.style) for row in rows]

    def lines(self) -> Iterator[str]:
        """Yields its lines, however wide, without styles."""
        widths = self._widths()
        for cells in self._cells():
            padded = []
            for cell, width, column in zip(cells, widths, self._columns, strict=True):
                blank = " " * (width - cell_len(cell))
                padded.append(blank + cell if column.is_number else cell + blank)
            yield _GAP.join(padded).rstrip()

    def drawn(self, width: int) -> tuple[RichTable, list[str]]:
        """Makes it for a terminal.

        Returns:
          The table, and the titles of the columns that a terminal of this width has no room for,
          with the value of those that are the same in each row.
        """
        from rich.table import Table as RichTable
        from rich.text import Text

        kept = self._fitting(width)
        left_out = [self._as_left_out(i) for i in range(len(self._columns)) if i not in kept]
        made = RichTable(box=None, pad_edge=False, header_style=STRONG)
        for title, is_number, _ in (self._columns[i] for i in kept):
            made.add_column(
                Text(title),
                justify="right" if is_number else "left",
                no_wrap=is_number,
                overflow="fold",
            )
        for row in self.rows:
            made.add_row(*(Text(row.cells[i]) for i in kept), style=row.style)
        return made, left_out

    def _fitting(self, width: int) -> list[int]:
        """Returns the columns that fit into a width, and those that are never left out."""
        widths = [each + len(_GAP) for each in self._widths()]
        kept = list(range(len(widths)))
        while sum(widths[i] for i in kept) - len(_GAP) > width:
            worst = max(kept, key=self._rank)
            if self._rank(worst) == (False, 0):
                break
            kept.remove(worst)
        return kept

    def _rank(self, column: int) -> tuple[bool, int]:
        """The larger, the sooner it is left out: what repeats, then what is less needed."""
        first = [row.cells[0] for row in self.rows]
        cells = zip(first, (row.cells[column] for row in self.rows), strict=True)
        is_said_before = column > 0 and all(name.startswith(cell) for name, cell in cells)
        return is_said_before or bool(self._repeated(column)), self._columns[column].dispensable

    def _repeated(self, column: int) -> str:
        """The one value of a column in which some rows hold one; empty if there are several."""
        cells = [row.cells[column] for row in self.rows if row.cells[column]]
        return cells[0] if column and len(cells) > 1 and len({*cells}) == 1 else ""

    def _as_left_out(self, column: int) -> str:
        value = self._repeated(column)
        return self._columns[column].title + (f" ({value} in each row)" if value else "")

    def _widths(self) -> list[int]:
        """Width of each column, in cells of a terminal."""
        return [max(map(cell_len, cells)) for cells in zip(*self._cells(), strict=True)]

    def _cells(self) -> Iterator[Sequence[str]]:
        yield [column.title for column in self._columns]
        yield from (row.cells for row in self.rows)


class Output:
    """Standard output and error of a command.

    Attributes:
      is_json: Whether the result is JSON; then lines and tables are left out.
      console: The terminal that standard output is; None where it is none.
    """

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self.console = _console(is_stderr=False) if sys.stdout.isatty() else None

    def json(self, **fields: Any) -> None:
        """Writes the result as one line of JSON, with `--json`: dataclasses as objects."""
        if self.is_json:
            # ASCII: valid in every encoding, and file names may hold what none has.
            text = json.dumps(fields, allow_nan=False, default=_as_json)
            print(text, flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        """Writes a line beside the result, to standard error."""
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201

    def is_agreed(self, about: str, do: str) -> bool:
        """Asks at the terminal whether to do something; the end of the input is a no.

        Args:
          about: What it is about.
          do: What is to be done, such as `drop it`.

        Raises:
          WrongUseError: Standard input is no terminal.
        """
        if not sys.stdin.isatty():
            raise WrongUseError(f"there is no terminal to ask on: pass --yes to {do}")
        self.note(about)
        print(f"{do.capitalize()}? [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def line(self, text: str, style: str = "") -> None:
        """Writes a line, or several."""
        if self.is_json:
            return
        shown = "\n".join(map(printable, text.split("\n")))
        if self.console is None:
            print(shown, flush=True)  # noqa: T201 - `status --watch` may write into a pipe
            return
        from rich.text import Text

        self.console.print(Text(shown, style))

    def raw(self, text: str) -> None:
        """Writes a text for other programs as it is."""
        if not self.is_json:
            print(text, flush=True)  # noqa: T201

    def table(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        """Writes a table, unless it has no rows."""
        if self.is_json or not rows:
            return
        table = Table(columns, rows)
        if self.console is None or len(rows) > _MOST_DRAWN_ROWS:
            print(*table.lines(), sep="\n")  # noqa: T201
            return
        drawn, left_out = table.drawn(self.console.width)
        self.console.print(drawn)
        if left_out:
            self.line(f"no room for {', '.join(left_out)}", FAINT)

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar once something is done, gone at the end, if standard error is a terminal.

        Yields:
          A function to call with how many bytes of how many are done.
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
        console = _console(is_stderr=True)
        try:
            with progress.Progress(*columns, console=console, transient=True) as shown:
                task = shown.add_task(what, visible=False)
                yield lambda done, total: shown.update(
                    task, completed=done, total=total, visible=True
                )
        finally:
            # Also where an interrupt came into the start, which hides it: another console, since
            # that one may still hold back what it has to write.
            _console(is_stderr=True).show_cursor()

    @contextmanager
    def redrawn(
        self, columns: Sequence[Column]
    ) -> Iterator[Callable[[Sequence[tuple[str, str]], Sequence[Row]], None]]:
        """Draws lines and a table again and again at one place of a terminal.

        Where there is no room for all rows the first are left out. What was drawn last stays.

        Args:
          columns: Of the table.

        Yields:
          A function that draws lines, each with its style, and rows.
        """
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        with Live(console=self.console, auto_refresh=False) as live:

            def draw(lines: Sequence[tuple[str, str]], rows: Sequence[Row]) -> None:
                above = Group(*(Text(printable(line), style) for line, style in lines))
                taken = len(live.console.render_lines(above)) + 2  # with titles and cursor
                last = rows[-max(live.console.height - taken, 1) :]
                table, _ = Table(columns, last).drawn(live.console.width)
                live.update(Group(above, table), refresh=True)

            yield draw


def _as_json(value: Any) -> object:
    """Converts what JSON has no type for."""
    if dataclasses.is_dataclass(value):
        return picked(value, *(field.name for field in dataclasses.fields(value)))
    return dict(value) if isinstance(value, Mapping) else str(value)


def _console(*, is_stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=is_stderr, highlight=False, markup=False, emoji=False)
