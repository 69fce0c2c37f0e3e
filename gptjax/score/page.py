"""A scored text as one HTML file: colours, and the numbers of each token on hover.

The file loads nothing, and its own policy forbids it to. Whatever a text, a run's name or a
vocabulary holds is escaped.
"""

import html
import json
import math
from collections.abc import Iterable
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

from gptjax.errors import visible
from gptjax.score.cells import Cell, Segment, Token, align, name
from gptjax.text.tokenizers import INCOMPLETE, Tokenizer

TOKENS = 20_000  # on a page; with many more a browser becomes slow
SHADES = 8  # of surprise, one for each bit
SIDES = 4  # shades of a difference to either side, one for each bit


class Side(NamedTuple):
    """A run on the page: its name, its tokenizer, and the cells of the text."""

    name: str
    tokenizer: Tokenizer
    cells: list[Cell]


class View(NamedTuple):
    """One way to look at the text.

    Attributes:
        name: of the choice.
        legend, text: HTML.
        data: what the script shows on hover: `items`, one for each part of the text, and, of a
            difference, the `names` of the runs.
    """

    name: str
    legend: str
    text: str
    data: dict[str, Any]


def page(title: str, summary: list[tuple[str, ...]], remark: str, sides: list[Side]) -> str:
    """The HTML of a scored text; of two runs their difference comes first.

    Args:
        title: what was scored.
        summary: rows of a table; the first one has the names of the columns.
        remark: a sentence below it.
        sides: one run, or two.
    """
    views = [_surprise(side) for side in sides]
    segments = align(sides[0].cells, sides[1].cells) if len(sides) == 2 else None
    if segments is not None:
        views.insert(0, _difference(segments, [side.name for side in sides]))
    elif len(sides) == 2:
        remark += " The tokenizers decode to different texts, so that only the sums are comparable."
    return Template(files("gptjax.score").joinpath("page.html").read_text("utf-8")).substitute(
        title=_safe(title),
        summary=_table(summary),
        remark=_safe(remark),
        shades=_shades(),
        views=_choice(views) if len(views) > 1 else "",
        texts="\n".join(
            f'<div data-of="{i}"{" hidden" if i else ""}><p class="legend">{view.legend}</p>\n'
            f'<div class="text" tabindex="0" data-view="{i}">{view.text}</div></div>'
            for i, view in enumerate(views)
        ),
        # "<" could end the script that holds the data; JSON may write it by its number.
        data=json.dumps([view.data for view in views], allow_nan=False).replace("<", r"\u003c"),
    )


def _surprise(side: Side) -> View:
    """A run's tokens, coloured by their bits."""
    shade = lambda bits: f"s{min(SHADES, math.floor(max(0.0, bits)))}"
    parts = [
        (cell.text, "x" if cell.special else _class(cell.bits, shade), cell.last)
        for cell in side.cells
    ]
    names: dict[int, str] = {}

    def named(id_: int) -> str:
        if id_ not in names:
            text = name(side.tokenizer, id_)
            names[id_] = f"id {id_}" if INCOMPLETE in text else visible(text)
        return names[id_]

    def item(cell: Cell, token: Token) -> list[Any]:
        text = visible(cell.text) if len(cell.tokens) == 1 else named(token.id)
        others = [[named(id_), _probability(logprob)] for id_, logprob in token.alternatives]
        return [text, _probability(token.logprob), token.rank, others if token.rank else []]

    items = [[item(cell, token) for token in cell.tokens] for cell in side.cells]
    scale = [(f"s{i}", f"{i}" + "+" * (i == SHADES)) for i in range(SHADES + 1)]
    legend = f"{_safe(side.name)}, surprise of each token in bits: {_scale(scale)}"
    return View(side.name, legend, _parts(parts), {"items": items})


def _difference(segments: list[Segment], names: list[str]) -> View:
    """Two runs' common parts of the text, coloured by which needs more bits."""

    def shade(d: float) -> str:
        size = min(SIDES, math.floor(abs(d)))
        return f"{'m' if d > 0 else 'f'}{size}" if size else "s0"

    parts = [(part.text, _class(part.difference, shade), part.last) for part in segments]
    items = [[round(x, 3) if math.isfinite(x) else None for x in part.bits] for part in segments]
    fewer = [(f"f{i}", f"&minus;{i}" + "+" * (i == SIDES)) for i in range(SIDES, 0, -1)]
    more = [(f"m{i}", f"+{i}" + "+" * (i == SIDES)) for i in range(1, SIDES + 1)]
    first, second = map(_safe, names)
    legend = (
        f"bits that {second} needs beyond those of {first}, for each part of the text that both "
        f"have whole tokens for: {_scale([*fewer, ('s0', '0'), *more])}"
    )
    return View("difference", legend, _parts(parts), {"items": items, "names": names})


def _parts(parts: Iterable[tuple[str, str, bool]]) -> str:
    """The text: an element with a number for each part, and a line between streams."""
    found, ended = [], False
    for i, (text, css, last) in enumerate(parts):
        # A line end alone has no area to show a colour, or to point at.
        shown = _safe(text).replace("\n", "<span class=soft>↵</span>\n")
        found.append("<hr>" * ended + f'<b class="{css}" data-i="{i}">{shown}</b>')
        ended = last
    return "".join(found)


def _class(value: float, shade: Any) -> str:
    return shade(value) if math.isfinite(value) else "x"


def _probability(logprob: float) -> float | None:
    """exp(logprob) to three digits; None: not a number."""
    return float(f"{math.exp(logprob):.3g}") if math.isfinite(logprob) else None


def _shades() -> str:
    """The classes of the colours. The strong ones are underlined as well, for readers and printers
    without colours."""
    rules = [
        f"b.{letter}{i}, i.{letter}{i} {{ background: rgb(var(--{colour}) / {i * 0.8 / most:.2f}); "
        f"{'text-decoration: underline;' if i > most / 2 else ''} }}"
        for letter, colour, most in (("s", "more", SHADES), ("m", "more", SIDES))
        for i in range(1, most + 1)
    ]
    rules += [
        f"b.f{i}, i.f{i} {{ background: rgb(var(--fewer) / {i * 0.8 / SIDES:.2f}); "
        f"{'text-decoration: underline dotted;' if i > SIDES / 2 else ''} }}"
        for i in range(1, SIDES + 1)
    ]
    return "\n".join(rules)


def _scale(steps: list[tuple[str, str]]) -> str:
    return "".join(f'<i class="{css}">{label}</i>' for css, label in steps)


def _choice(views: list[View]) -> str:
    inputs = "".join(
        f'<label><input type="radio" name="view" value="{i}"{" checked" if not i else ""}> '
        f"{_safe(view.name)}</label>"
        for i, view in enumerate(views)
    )
    return f'<p class="views">{inputs}</p>'


def _table(rows: list[tuple[str, ...]]) -> str:
    cells = lambda tag, texts: "".join(f"<{tag}>{_safe(text)}</{tag}>" for text in texts)
    lines = [f"<tr>{cells('th', row[:1])}{cells('td', row[1:])}</tr>" for row in rows[1:]]
    return f"<thead><tr>{cells('th', rows[0])}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _safe(text: str) -> str:
    """Text for HTML; control characters, some of which reorder a line, by their escapes."""
    return html.escape(visible(text))
