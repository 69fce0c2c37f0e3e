"""Pictures of a text's tokens: attention maps, losses, nearest embeddings."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from gptjax.errors import UserError, optional_import, visible
from gptjax.pictures import figures

FONT = "DejaVu Sans Mono"
CELL = 0.105  # inches of a token in an attention map, so that its label can be read
SMALLEST, WIDEST = 1.3, 30.0  # inches of a map, and of a figure
COLUMNS = 72  # characters in a line of the text
MOST = 3000  # tokens in the picture of a text
SIGNS = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"}
MASKED = "0.82"  # the grey of what a token cannot read


def label(token: str) -> str:
    """A token as the label of an axis or a cell: blanks and line ends are seen."""
    return "".join(SIGNS.get(c, c) for c in visible(token))


def attention_maps(
    tokens: Sequence[str],
    weights: np.ndarray,
    title: str,
    layers: Sequence[int],
    heads: Sequence[int],
) -> Any:
    """A figure with a map for each layer (a row of maps) and head (a column of them).

    Args:
        tokens: T of them.
        weights: (L, H, T, T), of these layers and heads.
        title: of the figure.
        layers, heads: their numbers, for the titles.

    Raises:
        UserError: more maps than a figure holds.
    """
    (L, H, T), colors = weights.shape[:3], optional_import("matplotlib.colors", "plot")
    side = max(SMALLEST, T * CELL)
    if H * side > WIDEST:
        side = max(SMALLEST, WIDEST / H)
    if max(H, L) * side > 2 * WIDEST:
        raise UserError(f"{L} layers of {H} heads are too many for a picture; give --layer, --head")
    every = int(np.ceil(CELL / (side / T)))  # of the labels, where there is no room for all
    figure = figures.new_figure(H * side + 2.2, L * (side + 0.25) + 1.7)
    grid = figure.subplots(L, H, sharex=True, sharey=True, squeeze=False)
    norm = colors.PowerNorm(0.5, 0, 1)  # weights spread over many tokens are seen, too
    future = np.triu(np.ones((T, T), bool), 1)
    for i, j in np.ndindex(L, H):
        axes = grid[i, j]
        axes.set_facecolor(MASKED)
        image = axes.imshow(
            np.ma.array(weights[i, j], mask=future), cmap="Purples", norm=norm, aspect="equal"
        )
        axes.set_title(f"layer {layers[i]}, head {heads[j]}", fontsize=figures.SMALL)
        names = [figures.drawable(label(token), FONT) for token in tokens[::every]]
        how = {"fontfamily": FONT, "fontsize": figures.SMALL - 1.5}
        axes.set_xticks(range(0, T, every), names, rotation=90, **how)
        axes.set_yticks(range(0, T, every), names, **how)
        axes.tick_params(length=1.5)
        if i == L - 1:
            axes.set_xlabel("token read from", fontsize=figures.SMALL)
        if j == 0:
            axes.set_ylabel("token that reads", fontsize=figures.SMALL)
    figure.suptitle(figures.drawable(title), fontsize="medium")
    bar = figure.colorbar(
        image, ax=grid, shrink=min(1.0, 3 / (L * side)), ticks=[0, 0.05, 0.2, 0.5, 1]
    )
    bar.set_label("attention weight (each row sums to 1)", fontsize=figures.SMALL)
    bar.ax.tick_params(labelsize=figures.SMALL)
    some = "" if every == 1 else f" Every {every}th token has a label."
    figures.note(figure, f"Grey: the future, which is masked.{some}")
    return figure


def loss_map(tokens: Sequence[str], losses: np.ndarray, title: str) -> Any:
    """A figure of the text, each token on a ground as dark as its loss is high.

    Args:
        tokens: N of them, about MOST at most.
        losses: (N,) nats; NaN where there is none.
        title: of the figure.
    """
    cells, rows = _lines([visible(token) for token in tokens])
    longest = max(COLUMNS // 2, *(column + len(text) for _, column, text in cells))
    figure = figures.new_figure(0.11 * longest + 0.2, 0.2 * rows + 1.2)
    axes = figure.subplots()
    patches = optional_import("matplotlib.patches", "plot")
    colors = optional_import("matplotlib.cm", "plot").ScalarMappable(cmap="YlOrRd")
    known = losses[np.isfinite(losses)]
    colors.set_clim(0, max(1.0, float(known.max())))
    for (row, column, text), loss in zip(cells, losses, strict=True):
        color = colors.to_rgba(loss) if np.isfinite(loss) else "white"
        hatch = {} if np.isfinite(loss) else {"hatch": "////", "edgecolor": "0.7"}
        box = (column + 0.04, row + 0.06), len(text) - 0.08, 0.88
        axes.add_patch(patches.Rectangle(*box, facecolor=color, linewidth=0, **hatch))
        light = np.isfinite(loss) and loss > 0.6 * colors.get_clim()[1]
        axes.text(
            column + len(text) / 2,
            row + 0.52,
            figures.drawable(text, FONT),
            color="white" if light else "black",
            ha="center",
            va="center",
            fontfamily=FONT,
            fontsize=figures.SMALL,
        )
    axes.set(xlim=(0, longest), ylim=(rows, 0))
    axes.axis("off")
    axes.set_title(figures.drawable(title), fontsize="medium")
    bar = figure.colorbar(colors, ax=axes, orientation="horizontal", shrink=0.5, aspect=40)
    bar.set_label("loss of the token (nats)", fontsize=figures.SMALL)
    bar.ax.tick_params(labelsize=figures.SMALL)
    figures.note(figure, "Hatched: the first token, which nothing predicts.")
    return figure


def _lines(tokens: Sequence[str]) -> tuple[list[tuple[int, int, str]], int]:
    """Row, column and shown text of each token, broken into lines of COLUMNS; and how many."""
    cells, row, column = [], 0, 0
    for token in tokens:
        shown = "".join(SIGNS["\n"] if c == "\n" else c for c in token)[:COLUMNS]
        if column + len(shown) > COLUMNS:
            row, column = row + 1, 0
        cells.append((row, column, shown))
        column += len(shown)
        if token.endswith("\n"):
            row, column = row + 1, 0
    return cells, row + (column > 0)


def neighbour_table(
    tokens: Sequence[str], near: Sequence[Sequence[str]], cosines: np.ndarray, title: str
) -> Any:
    """A figure with a row for each token: its neighbours, nearest first, on a ground as dark as
    they are near.

    Args:
        tokens: N of them.
        near: for each, its neighbours.
        cosines: (N, K) of these.
        title: of the figure.
    """
    N, K = cosines.shape
    longest = max(len(figures.drawable(label(t), FONT)) for row in near for t in row)
    wide = max(0.6, 0.08 * longest + 0.15)
    figure = figures.new_figure(wide * K + 2.2, 0.34 * N + 1.5)
    axes = figure.subplots()
    limit = max(0.1, float(np.abs(cosines).max()))
    image = axes.imshow(
        cosines, cmap="Greens", vmin=min(0.0, cosines.min()), vmax=limit, aspect="auto"
    )
    for i, j in product(range(N), range(K)):
        color = "white" if cosines[i, j] > 0.6 * limit else "black"
        how = {"ha": "center", "va": "center", "color": color}
        token = figures.drawable(label(near[i][j]), FONT)
        axes.text(j, i - 0.14, token, fontfamily=FONT, fontsize=figures.SMALL + 1, **how)
        axes.text(j, i + 0.26, f"{cosines[i, j]:.2f}", fontsize=figures.SMALL - 2, **how)
    names = [figures.drawable(label(token), FONT) for token in tokens]
    axes.set_yticks(range(N), names, fontfamily=FONT, fontsize=figures.SMALL + 1)
    axes.set_xticks(range(K), [str(k) for k in range(1, K + 1)], fontsize=figures.SMALL)
    axes.set_xlabel("rank of the neighbour", fontsize=figures.SMALL)
    axes.set_ylabel("token", fontsize=figures.SMALL)
    axes.set_title(figures.drawable(title), fontsize="medium")
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.5 / (0.34 * N)))
    bar.set_label("cosine of the embeddings", fontsize=figures.SMALL)
    bar.ax.tick_params(labelsize=figures.SMALL)
    return figure
