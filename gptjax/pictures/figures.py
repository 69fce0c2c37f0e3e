"""What all figures share: paper, labels at the ends of lines, and the file they are saved to.

Matplotlib is used without pyplot, which would change the state of a notebook's own figures. Lines
differ by dashes and markers, not only by colour.
"""

import io
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError, optional_import, visible
from gptjax.runs import files

ENDINGS = ".png", ".svg", ".pdf"
DPI = 130
SMALL = 8  # points
LINE = 1.45 * SMALL / 72  # inches that a line of small text takes
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vP*"
MANY = 10  # lines


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of these inches, whose parts are laid out without overlaps.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = optional_import("matplotlib.figure", "plot").Figure((width, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    return figure


def line(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line, keywords of `Axes.plot`."""
    return {"color": f"C{i % 10}", "linestyle": DASHES[(i + i // 20) % len(DASHES)]}


def marks(i: int, hollow: bool = False) -> dict[str, Any]:
    """Markers of the i-th line, keywords of `Axes.plot`."""
    color = f"C{i % 10}"
    return {
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6,
        "markerfacecolor": "white" if hollow else color,
        "markeredgecolor": color if hollow else "black",
    }


def check_ending(out: Path) -> None:
    """See that a picture can be of this name, before work is put into it.

    Raises:
        UserError: another ending, or a folder that is not there.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"cannot write {out}: give --out a name that ends in {', '.join(ENDINGS)}")
    if not out.parent.is_dir():
        raise UserError(
            f"cannot write {out}: there is no folder {out.parent}; make it, or give another --out"
        )


def save(figure: Any, out: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the name's ending; the text of an SVG stays text.

    Raises:
        UserError: another ending, or a file that cannot be written; an old one is unchanged.
    """
    check_ending(out)
    matplotlib = optional_import("matplotlib", "plot")
    content, ending = io.BytesIO(), out.suffix.lower()[1:]
    options = (
        {}
        if ending == "png"
        else {"metadata": {"Date" if ending == "svg" else "CreationDate": None}}
    )
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptjax"}):
        figure.savefig(content, format=ending, dpi=DPI, **options)
    content.seek(0)
    files.write_atomically(out, content)


@cache
def _glyphs(font: str) -> frozenset[int]:
    """Code points that a font, which matplotlib brings with it, can draw."""
    fonts = optional_import("matplotlib.font_manager", "plot")
    return frozenset(fonts.get_font(fonts.findfont(font)).get_charmap())


def drawable(text: str, font: str = "DejaVu Sans") -> str:
    """A stranger's text as it can be drawn: no mathematics between dollars, and characters that the
    font lacks as their escapes."""
    known = _glyphs(font)
    shown = "".join(c if ord(c) in known or c == "\n" else ascii(c)[1:-1] for c in visible(text))
    return shown.replace("$", r"\$")


def note(figure: Any, text: str) -> None:
    """Small print below the axes, wrapped to the figure's width."""
    width = int(figure.get_figwidth() * 72 / (0.54 * SMALL))
    lines = "\n".join(textwrap.wrap(text, width, break_long_words=False))
    figure.supxlabel(lines, fontsize=SMALL, color="0.25", x=0.01, ha="left")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the same order that are `gap` or more apart, moved as little as possible.

    Args:
        positions: where labels would like to be.
        gap: between neighbours; less, if they do not fit otherwise.
        low, high: bounds.
    """
    order = np.argsort(positions, kind="stable")
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    # Neighbours that are too near form a group, which takes the mean of what its members want.
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([positions[i] - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    wanted = [float(np.mean(group)) for group in groups for _ in group]
    ceiling = high - gap * (len(order) - 1)
    found = [0.0] * len(order)
    for rank, i in enumerate(order):
        found[i] = min(max(wanted[rank], low), ceiling) + rank * gap
    return found


class End(NamedTuple):
    """Where a line ends, and what is written there."""

    x: float
    y: float
    text: str
    look: dict[str, Any]
    """Keywords of `Axes.plot`, for the sample of the line before the text."""


def label_ends(axes: Any, ends: Sequence[End]) -> None:
    """Write the label of each line to the right of the axes, after a sample of the line.

    A thin line joins it to the line's end; where there are many, only if that is near.

    Args:
        axes: drawn and with their final limits; the figure's layout makes room.
        ends: of the lines.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # now the height is known
    box = axes.get_window_extent()
    height, sample = box.height / figure.dpi, 0.3 * figure.dpi / box.width
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [np.clip(to_axes.transform((end.x, end.y)), 0, 1) for end in ends]
    heights = spread([y for _, y in places], LINE / height, 0, 1)
    for (x, y), at, end in zip(places, heights, ends, strict=True):
        left = 1 + 0.8 * sample
        if len(ends) <= MANY or x > 0.9:
            axes.annotate(
                "",
                xy=(x, y),
                xytext=(left, at),
                xycoords="axes fraction",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": "0.5",
                    "linewidth": 0.5,
                    "linestyle": ":",
                    "shrinkA": 3,
                    "shrinkB": 3,
                },
            )
        axes.plot(
            [left, left + sample / 2, left + sample],
            [at, at, at],
            **end.look,
            linewidth=1.4,
            markevery=[1],
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(
            left + 1.3 * sample,
            at,
            drawable(end.text),
            transform=axes.transAxes,
            va="center_baseline",
            fontsize=SMALL,
        )
