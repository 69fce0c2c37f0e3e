"""A scored text in a terminal's colours, in its bold and underlined letters, or with numbers."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from rich.text import Text

from gptjax.errors import visible
from gptjax.score.cells import Cell, Segment

BETWEEN = "\n---\n"  # streams


class Level(NamedTuple):
    """A style for values from `least` on, and what the legend calls them."""

    least: float
    style: str
    label: str


# One scale of yellow to red; letters tell the upper levels where there is no colour.
SURPRISE = (
    Level(-math.inf, "", "under 1"),
    Level(1, "black on #fff3bf", "1 to 2"),
    Level(2, "black on #ffd43b", "2 to 4"),
    Level(4, "underline black on #ff922b", "4 to 8"),
    Level(8, "bold underline white on #c92a2a", "8 and more"),
)
DIFFERENCE = (
    Level(-math.inf, "bold underline white on #1864ab", "-4 and less"),
    Level(-4, "underline black on #74c0fc", "-1"),
    Level(-1, "", "0"),
    Level(1, "italic black on #ffd8a8", "+1"),
    Level(4, "bold italic white on #d9480f", "+4 and more"),
)
NUMBERED = 4  # bits from which plain text has the number


def surprise(cells: Iterable[Cell], colour: bool) -> Text:
    """The text, each token in the style of its bits; without colour, large ones as numbers."""
    text, ended = Text(), False
    for cell in cells:
        text.append(BETWEEN if ended else "", "dim")
        style = "dim" if cell.special else _style(SURPRISE, cell.bits)
        _add(text, cell.text, style, cell.bits, colour, f"{{{cell.bits:.1f}}}")
        ended = cell.last
    return text


def difference(segments: Iterable[Segment], colour: bool) -> Text:
    """The text, each part in the style of the bits that the second run needs beyond the first."""
    text, ended = Text(), False
    for part in segments:
        text.append(BETWEEN if ended else "", "dim")
        d = part.difference
        _add(text, part.text, _style(DIFFERENCE, d), abs(d), colour, f"{{{d:+.1f}}}")
        ended = part.last
    return text


def legend(what: str, levels: tuple[Level, ...], colour: bool) -> Text:
    """One line that shows the styles."""
    if not colour:
        return Text(f"{what}: in braces after each token from {NUMBERED} on")
    text = Text(f"{what}: ")
    for level in levels:
        text.append(f" {level.label} ", level.style).append(" ")
    return text


def _style(levels: tuple[Level, ...], value: float) -> str:
    found = [level.style for level in levels if value >= level.least]
    return found[-1] if found else "dim"  # nan: nothing predicts it


def _add(text: Text, words: str, style: str, size: float, colour: bool, number: str) -> None:
    """Append the next part. A line end shows no colour, so that a large one gets a sign."""
    large = size >= NUMBERED
    shown = visible(words)
    if colour:
        text.append(shown.replace("\n", "↵\n") if large else shown, style)
    else:
        text.append(shown + number if large else shown)
