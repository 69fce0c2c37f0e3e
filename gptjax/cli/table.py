"""Tables: for a terminal of any width, and for other programs."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptjax.errors import visible

GAP = 2  # columns of a terminal between those of a table


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: its first line.
        rank: in a terminal too narrow for all, the column of the highest rank is left out first.
        fold: characters that words can be folded to; None: numbers, which are put to the right.
        show: how a terminal shows a value; other programs get it in full.
    """

    title: str
    rank: int = 0
    fold: int | None = None
    show: Callable[[Any], str] = str


def on_terminal() -> bool:
    """Whether a person reads the output, and not another program."""
    return sys.stdout.isatty()


def print_rows(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on a terminal; elsewhere lines of values between tabs, after one of titles.

    Args:
        columns: of the table.
        rows: a value for each column; None: there is none.
    """
    if not on_terminal():
        for row in [[column.title for column in columns], *rows]:
            print("\t".join("" if value is None else one_line(str(value)) for value in row))
        return
    console = Console(highlight=False)
    shown = [
        [
            "-" if value is None else one_line(c.show(value))
            for c, value in zip(columns, row, strict=True)
        ]
        for row in rows
    ]
    needs = [
        max(cell_len(text) for text in texts)
        for texts in zip(*[[column.title for column in columns], *shown], strict=True)
    ]
    widths = [min(need, c.fold or need) for c, need in zip(columns, needs, strict=True)]
    kept = list(range(len(columns)))
    while (left := console.width - sum(widths[i] + GAP for i in kept) + GAP) < 0 and len(kept) > 1:
        kept.remove(max(kept, key=lambda i: columns[i].rank))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for i in kept:
        more = min(left, needs[i] - widths[i])
        left -= more
        justify = "right" if columns[i].fold is None else "left"
        table.add_column(
            Text(columns[i].title), justify=justify, overflow="fold", width=widths[i] + more
        )
    for row in shown:
        table.add_row(*(Text(row[i]) for i in kept))
    console.print(table)
    if len(kept) < len(columns):
        hidden = ", ".join(column.title for i, column in enumerate(columns) if i not in kept)
        console.print(Text(f"not shown here: {hidden}"))


def one_line(text: str) -> str:
    """A text without line ends and tabs, even a stranger's name."""
    return " ".join(visible(text).split())


def compact(n: float) -> str:
    """A count in three digits and a unit: 65, 28.1 K, 810 K, 1.56 B."""
    for unit in ("", " K", " M"):
        if abs(n) < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.3g} B" if n < 999.5 else f"{n:,.0f} B"
