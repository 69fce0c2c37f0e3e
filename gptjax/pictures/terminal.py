"""The same pictures as text, for a terminal or a pipe: told apart by letters, not by colour."""

import shutil
import string
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from gptjax.console import print_table
from gptjax.errors import UserError, optional_import, visible
from gptjax.pictures.curves import Curve, X, axis, limits, shown
from gptjax.pictures.tokens import label

FRAME, PLAIN = "┌┐└┘─│", str.maketrans("┌┐└┘─│", "++++-|")
SHADES = " .:-=+*#%@"
LETTERS = string.ascii_letters + string.digits
MARGIN = 10  # columns that the numbers beside the axis may take


def size() -> tuple[int, int]:
    """Columns and lines of the terminal; of a pipe COLUMNS and LINES, or 80 and 24."""
    return shutil.get_terminal_size((80, 24))


def print_curves(
    curves: Sequence[Curve], x: X = "steps", *, log_x: bool = False, log_y: bool = False
) -> None:
    """Print the running means of training losses, of one run the validation losses too, and a table
    of the last losses.

    Raises:
        UserError: uniplot is not installed.
    """
    uniplot = optional_import("uniplot", "plot")
    columns, rows = size()
    unit, name = axis(curves, x)
    one = len(curves) == 1
    lines = [(curve.mean_x / unit, curve.mean) for curve in curves]
    letters = "." if one else (LETTERS * (1 + len(curves) // len(LETTERS)))[: len(curves)]
    if one and len(points := curves[0].evaluated):
        lines, letters = [*lines, (points[:, 0] / unit, points[:, 1])], ".V"
    finite = [np.isfinite(y) & np.isfinite(x) & ((x > 0) | (not log_x)) for x, y in lines]
    low, top, _ = limits(curves, train=True, val=one)
    text = uniplot.plot_to_string(
        xs=[x[kept] for (x, _), kept in zip(lines, finite, strict=True)],
        ys=[y[kept] for (_, y), kept in zip(lines, finite, strict=True)],
        lines=[True] * len(curves) + [False] * (len(lines) - len(curves)),
        width=max(10, columns - MARGIN),
        height=max(10, min(20, rows - 9)),
        x_as_log=log_x,
        y_as_log=log_y,
        **({} if log_y else {"y_min": low, "y_max": top}),
        x_gridlines=[],
        y_gridlines=[],
        color=False,
        character_set="ascii",
        force_ascii_characters=list(letters),
    )
    windows = sorted({curve.window for curve in curves})
    over = " to ".join(f"{w:,}" for w in dict.fromkeys((windows[0], windows[-1])))
    says = "loss in nats per token; " + (". training, V validation; " if one else "training, ")
    print(textwrap.fill(f"{says}mean of {over} steps", columns))
    print(f"{text if _has(FRAME) else text.translate(PLAIN)}\n{name}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("run", overflow="fold")
    for head in ("training", "validation"):
        table.add_column(head, justify="right", no_wrap=True)
    order = sorted(zip(curves, letters, strict=False), key=lambda pair: -_last(pair[0].mean))
    for curve, letter in order:
        val = shown(last[1], 4) if (last := curve.last_evaluated) else ""
        table.add_row(letter, Text(visible(curve.name)), shown(_last(curve.mean), 3), val)
    print_table(table)


def _has(characters: str) -> bool:
    """Whether the output's encoding has them."""
    try:
        characters.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else np.nan


def print_attention(
    tokens: Sequence[str], weights: np.ndarray, layers: Sequence[int], heads: Sequence[int]
) -> None:
    """Print a map of each head: a line for each token that reads, a column for each that it reads
    from, darker the more it does.

    Args:
        tokens: T of them.
        weights: (L, H, T, T).
        layers, heads: their numbers.

    Raises:
        UserError: more tokens than the terminal has columns for.
    """
    columns, T = size()[0], len(tokens)
    names = [label(token) for token in tokens]
    wide = min(max(map(len, names)), max(1, columns - T - 1))
    if wide + 1 + T > columns:
        raise UserError(
            f"the maps of {T} tokens need {T + 2} columns, and the terminal has {columns}; give a "
            f"shorter text, or leave --terminal out for a picture"
        )
    steps = " ".join(f"{SHADES[i]} {_shade_ends(i):.2f}" for i in range(1, len(SHADES)))
    print(f"weights from: {steps}")
    for i, j in np.ndindex(weights.shape[:2]):
        print(f"\nlayer {layers[i]}, head {heads[j]}")
        for row, name in enumerate(names):
            shades = "".join(SHADES[_shade(w)] for w in weights[i, j, row, : row + 1])
            print(f"{name[:wide]:>{wide}} {shades}")


def _shade(weight: float) -> int:
    """The shade of a weight, by its root, so that weights spread over many tokens are seen."""
    return min(len(SHADES) - 1, int(np.sqrt(max(0.0, weight)) * len(SHADES)))


def _shade_ends(shade: int) -> float:
    return (shade / len(SHADES)) ** 2


def print_neighbours(
    tokens: Sequence[str], near: Sequence[Sequence[str]], cosines: np.ndarray
) -> None:
    """Print each token with its neighbours and their cosines, nearest first.

    Args:
        tokens: N of them.
        near: for each, its neighbours.
        cosines: (N, K) of these.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("token", no_wrap=True)
    table.add_column("nearest, with the cosine")
    for token, names, row in zip(tokens, near, cosines, strict=True):
        pairs = (f"{label(n)}\N{NO-BREAK SPACE}{c:.2f}" for n, c in zip(names, row, strict=True))
        table.add_row(Text(label(token)), Text("  ".join(pairs)))
    print_table(table)
