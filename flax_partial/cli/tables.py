"""Tables of text: which columns of one there is room for, and its lines. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

_GAP = "  "
GOOD, BAD, WAITING, FAINT, STRONG = "green", "red", "yellow", "dim", "bold"


def printable(text: str) -> str:
    """Text in which nothing can move a terminal's cursor, or begin another line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
      title: What stands above it.
      is_number: Whether it is aligned to the right, and never folded.
      dispensable: Where there is no room for all columns, those with the largest number go first;
        0 never goes.
    """

    title: str
    is_number: bool = False
    dispensable: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells, and in which style they are drawn on a terminal."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under titles."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    def printable(self) -> "Table":
        """The same with cells that cannot do more to a terminal than stand in it."""
        return Table(
            self.columns, [Row([*map(printable, row.cells)], row.style) for row in self.rows]
        )

    def without_empty_columns(self) -> "Table":
        """The same without columns in which nothing stands."""
        columns = range(len(self.columns))
        return self._with_columns([i for i in columns if any(row.cells[i] for row in self.rows)])

    def _with_columns(self, kept: Sequence[int]) -> "Table":
        return Table(
            [self.columns[i] for i in kept],
            [Row([row.cells[i] for i in kept], row.style) for row in self.rows],
        )

    def fitted(self, width: int) -> tuple["Table", list[str]]:
        """Leaves out columns until it is at most `width` wide, or none is dispensable any more.

        Returns:
          The table, and the titles of what was left out.
        """
        widths = self.widths()
        kept = list(range(len(self.columns)))
        while sum(widths[i] + len(_GAP) for i in kept) - len(_GAP) > width:
            worst = max(kept, key=lambda i: self.columns[i].dispensable)
            if not self.columns[worst].dispensable:
                break
            kept.remove(worst)
        gone = [self.columns[i].title for i in range(len(self.columns)) if i not in kept]
        return self._with_columns(kept), gone

    def widths(self) -> list[int]:
        """Width of each column, in cells of a terminal."""
        titles = [column.title for column in self.columns]
        return [max(map(cell_len, cells)) for cells in zip(titles, *self._cells(), strict=True)]

    def _cells(self) -> Iterator[Sequence[str]]:
        return (row.cells for row in self.rows)

    def lines(self) -> Iterator[str]:
        """Yields its lines, however wide, without styles."""
        widths = self.widths()
        for cells in ([column.title for column in self.columns], *self._cells()):
            padded = [
                _padded(cell, width, is_number=column.is_number)
                for cell, width, column in zip(cells, widths, self.columns, strict=True)
            ]
            yield _GAP.join(padded).rstrip()


def _padded(cell: str, width: int, *, is_number: bool) -> str:
    blank = " " * (width - cell_len(cell))
    return blank + cell if is_number else cell + blank
