"""What trackers must know of a run besides its records: `track/state.json`."""

import json
import math
import uuid
from pathlib import Path
from typing import NamedTuple

from gptjax.errors import UserError
from gptjax.runs import files

FOLDER = "track"


class State(NamedTuple):
    """Attributes:
    id: names the run to trackers; drawn once.
    peaks: tokens per second at an MFU of 1, by the step from which they hold.
    """

    id: str
    peaks: dict[int, float]


def read(directory: Path) -> State:
    """A run's state; a new one is kept if there is none, or none that can be read.

    Raises:
        UserError: the run's folder cannot be written.
    """
    try:
        return files.read_file(directory / FOLDER / "state.json", _parse)
    except UserError:
        return _keep(directory, State(uuid.uuid4().hex[:8], {}))


def begin(directory: Path, step: int, peak: float | None) -> None:
    """Note a session.

    Args:
        directory: of the run.
        step: that it starts from.
        peak: tokens per second at an MFU of 1 on its devices, if known.

    Raises:
        UserError: the run's folder cannot be written.
    """
    before = read(directory)
    peaks = {first: x for first, x in before.peaks.items() if first < step}
    _keep(directory, before._replace(peaks=peaks | ({step: peak} if peak else {})))


def _keep(directory: Path, state: State) -> State:
    folder = directory / FOLDER
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
    files.write_atomically(folder / "state.json", json.dumps(state._asdict()) + "\n")
    return state


def _parse(text: str) -> State:
    values = files.unique_json(text)
    try:
        peaks = {int(step): float(x) for step, x in values["peaks"].items()}
        known = str(values["id"])
    except (TypeError, KeyError, AttributeError):
        raise ValueError("not the state of a tracked run") from None
    if not known.isalnum() or not all(0 < x < math.inf for x in peaks.values()):
        raise ValueError("not the state of a tracked run")
    return State(known, peaks)
