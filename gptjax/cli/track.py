"""`gptjax track`."""

import os
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Literal

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.errors import note, visible
from gptjax.runs import folders


@dataclass(frozen=True)
class TrackCommand:
    """Write a run's metrics and samples into a tracker, as `train --track` does while it trains.
    What the tracker has of that run already is not written twice."""

    to: Literal["tensorboard", "wandb", "trackio", "mlflow"]
    """Tracker, whose package the extra of that name installs."""
    run: str | None = field(default=None, metadata=POSITIONAL)
    """Name in runs/, or path of a run's folder; None: the newest run."""


def main(argv: list[str], prog: str) -> None:
    """Replay a run into a tracker, and print how to look at it."""
    command = parse(TrackCommand, None, argv, prog)
    directory = folders.find(command.run)
    from gptjax.runs.records import read
    from gptjax.track.feed import feed
    from gptjax.track.trackers import check_installed, how_to_look

    check_installed([command.to])
    look = how_to_look(command.to, directory)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the libraries' greetings
        count = feed(directory, command.to, lambda: True)
    if damage := read(directory / "metrics.jsonl")[1]:
        note(visible(f"{damage}; what could be read was written"))
    print(visible(f"{count} records of {directory} are in {command.to}; to look: {look}"))
