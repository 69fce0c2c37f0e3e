"""`gptjax plot`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import UserError, note, visible
from gptjax.runs import folders
from gptjax.runs.files import read_file

PICTURES = "attention", "losses", "neighbours"  # of a model; each flag takes a text
OF_CURVES = "x", "smooth", "log_x", "log_y"
OF_A_MODEL = "checkpoint", "config"


@dataclass(frozen=True)
class PlotCommand:
    """Draw the losses of runs over their steps; or, of one run's model, where its heads look in a
    text, the loss of each token of a text, or which embeddings are near. A TEXT is the text itself,
    or file:PATH."""

    run: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Names in runs/, or paths of runs' folders; none: the newest run."""
    attention: str | None = None
    """Text: draw the attention weights of each layer and head."""
    losses: str | None = None
    """Text: draw it with the loss of each token."""
    neighbours: str | None = None
    """Text: draw the tokens whose embeddings are nearest to those of its tokens, by cosine."""
    layer: int | None = None
    """Only this layer's attention, counted from 0; None: all."""
    head: int | None = None
    """Only this head's attention, counted from 0; None: all."""
    checkpoint: str = "best"
    """Of the model: best (by validation loss), last, or a step."""
    config: str | None = None
    """Python file that the run's own model comes from; None: the model of its config."""
    x: Literal["steps", "tokens", "seconds"] = "steps"
    """What to draw losses over; seconds are those spent training."""
    smooth: int | None = None
    """Steps that a mean of training losses is taken over; 1: no mean; None: a fiftieth of the
    run."""
    log_x: bool = False
    """Draw losses over a logarithmic axis."""
    log_y: bool = False
    """Draw losses on a logarithmic axis."""
    out: Path | None = None
    """Picture to write, ending in .png, .svg or .pdf; None: loss.png, attention.png, losses.png or
    neighbours.png in the first run's folder."""
    terminal: bool = False
    """Print the picture as text, and write none."""


def main(argv: list[str], prog: str) -> None:
    """Draw, and print the picture's path; jax is imported only to run a model."""
    command = parse(PlotCommand, PlotCommand(), argv, prog)
    wanted = [name for name in PICTURES if getattr(command, name) is not None]
    _check(command, wanted)
    directories = [folders.find(name) for name in command.run] or [folders.find(None)]
    out = command.out or directories[0] / f"{wanted[0] if wanted else 'loss'}.png"
    from gptjax.pictures import figures

    if not command.terminal:
        figures.check_ending(out)
        figures.optional_import("matplotlib.figure", "plot")  # before a model is compiled
    figure = _model(command, wanted[0], directories[0]) if wanted else _curves(command, directories)
    if figure is not None:
        figures.save(figure, out)
        print(visible(str(out)))


def _check(command: PlotCommand, wanted: Sequence[str]) -> None:
    """Refuse flags that do not go together, none of which may be ignored.

    Raises:
        UserError: two pictures, or a flag of another one.
    """
    if len(wanted) > 1:
        raise UserError(f"--{wanted[0]} and --{wanted[1]} are two pictures; give one of them")
    if wanted and len(command.run) > 1:
        raise UserError(f"--{wanted[0]} looks into one run, and {len(command.run)} were given")
    given = lambda names: [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(command, name) != getattr(PlotCommand, name)
    ]
    if wanted and (flags := given(OF_CURVES)):
        raise UserError(f"{flags[0]} is for loss curves; leave it or --{wanted[0]} out")
    if not wanted and (flags := given(OF_A_MODEL)):
        raise UserError(f"{flags[0]} needs --attention, --losses or --neighbours")
    if wanted != ["attention"] and (flags := given(("layer", "head"))):
        raise UserError(f"{flags[0]} needs --attention TEXT")
    if command.terminal and command.losses is not None:
        raise UserError("--losses has no --terminal; gptjax score --text TEXT prints them")
    if command.terminal and command.out is not None:
        raise UserError("--terminal writes no picture; leave it or --out out")


def _curves(command: PlotCommand, directories: list[Path]) -> Any:
    """The figure of the runs' losses; None: it was printed."""
    from gptjax.pictures import curves

    found, problems = curves.read_curves(directories, command.x, command.smooth)
    for problem in problems:
        note(visible(problem))
    logs = {"log_x": command.log_x, "log_y": command.log_y}
    if command.terminal:
        from gptjax.pictures.terminal import print_curves

        return print_curves(found, command.x, **logs)
    return curves.draw(found, command.x, **logs)


def _model(command: PlotCommand, wanted: str, directory: Path) -> Any:
    """The figure of one run's model; None: it was printed."""
    text, recipe = _text(wanted, getattr(command, wanted)), recipe_of_run(command.config)
    own = parts_for_run(recipe, directory, "model")
    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.pictures import inside, terminal, tokens
    from gptjax.runs.loaded import load

    use_compilation_cache()
    run = load(directory, command.checkpoint, **own)
    of_run = f"run {directory.name}, step {run.step}"
    if wanted == "attention":
        names, weights = inside.attention_weights(run, text)
        layers = _chosen("layer", command.layer, weights.shape[0])
        heads = _chosen("head", command.head, weights.shape[1])
        weights = weights[np.ix_(layers, heads)]
        if command.terminal:
            return terminal.print_attention(names, weights, layers, heads)
        return tokens.attention_maps(names, weights, f"Attention weights: {of_run}", layers, heads)
    if wanted == "losses":
        names, losses = inside.losses_of_tokens(run, text, tokens.MOST)
        title = f"Loss of each token: {of_run}; mean {np.nanmean(losses):.3f} nats"
        return tokens.loss_map(names, losses, title)
    found = inside.neighbours(run, text)
    if command.terminal:
        return terminal.print_neighbours(*found)
    return tokens.neighbour_table(*found, f"Nearest token embeddings: {of_run}")


def _text(wanted: str, given: str) -> str:
    """The text itself, or that of `file:PATH` without its byte order mark.

    Raises:
        UserError: an unreadable file, or no characters.
    """
    text = given
    if given.startswith("file:"):
        text = read_file(Path(given.removeprefix("file:")), str).removeprefix("\ufeff")
    if not text:
        raise UserError(f"the text of --{wanted} has no characters; give one or more")
    return text


def _chosen(name: str, number: int | None, count: int) -> list[int]:
    """The layers or heads to draw.

    Raises:
        UserError: there is none of that number.
    """
    if number is not None and not 0 <= number < count:
        raise UserError(f"--{name} {number} is out of range; the model has 0 to {count - 1}")
    return list(range(count)) if number is None else [number]
