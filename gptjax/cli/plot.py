"""`gptjax plot`."""

from dataclasses import dataclass, field
from pathlib import Path

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.errors import visible
from gptjax.runs import folders


@dataclass(frozen=True)
class PlotCommand:
    """Draw the losses of runs over their steps."""

    run: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Names in runs/, or paths of runs' folders; none: the newest run."""
    out: Path | None = None
    """Picture to write, ending in .png, .svg or .pdf; None: loss.png in the first run's folder."""


def main(argv: list[str], prog: str) -> None:
    """Draw the curves and print the picture's path."""
    command = parse(PlotCommand, PlotCommand(), argv, prog)
    directories = [folders.find(name) for name in command.run] or [folders.find(None)]
    from gptjax.tools.plot import plot

    out = command.out or directories[0] / "loss.png"
    plot(directories, out)
    print(visible(str(out)))
