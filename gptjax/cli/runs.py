"""`gptjax runs`."""

import json
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.table import Column, compact, on_terminal, one_line, print_rows
from gptjax.errors import note
from gptjax.runs import folders
from gptjax.tools.listing import SAMPLED, TRAINING, Listed, describe, find

Sort = Literal["age", "name", "loss", "step", "parameters", "size"]


COLUMNS = (
    Column("name", fold=16),
    Column("preset", 6, fold=8),
    Column("state", 4, fold=8),
    Column("step", 2),
    Column("parameters", 5, show=compact),
    Column("loss", 1),
    Column("age", 3),
    Column("size", 7),
)
FULL = tuple(Column(field.name) for field in fields(Listed))


@dataclass(frozen=True)
class RunsCommand:
    """List runs: how far each is, its size and its loss. In a pipe, values are separated by tabs
    and given in full."""

    folder: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Folders of runs, or folders that contain such; none: runs/."""
    sort: Sort = "age"
    """What the list is sorted by: age (the newest first), name, loss (the lowest first), step,
    parameters or size (the largest first)."""
    json: bool = False
    """Print a JSON array with everything that is known of each run."""


def age(seconds: float) -> str:
    """A time span in its largest unit: 40 s, 12 min, 5 h, 30 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def main(argv: list[str], prog: str) -> None:
    """Print the list."""
    command = parse(RunsCommand, RunsCommand(), argv, prog)
    places = [Path(name) for name in command.folder] or [folders.RUNS]
    found = find(places) if command.folder or folders.RUNS.is_dir() else []
    runs = sorted(map(describe, found), key=lambda run: run.name)
    key = {"age": "changed", "size": "bytes"}.get(command.sort, command.sort)
    if key != "name":
        sign = 1 if key == "loss" else -1
        number = lambda run: getattr(run, key)
        runs.sort(key=lambda run: (number(run) is None, sign * (number(run) or 0)))
    if command.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return
    if not runs:
        note(f"no runs in {', '.join(map(str, places))}; train one with gptjax train")
        return
    if not on_terminal():
        print_rows(FULL, [_values(run) for run in runs])
        return
    now = time.time()
    print_rows(COLUMNS, [_shown(run, now) for run in runs])
    if any(run.loss_kind == SAMPLED for run in runs):
        print("~ on sampled validation batches")
    for run in runs:
        if run.problem:
            print(f"{one_line(run.name)}: {one_line(run.problem)}")


def _values(run: Listed) -> list[Any]:
    changed = run.changed and datetime.fromtimestamp(run.changed, UTC).isoformat("T", "seconds")
    return [changed if column.title == "changed" else getattr(run, column.title) for column in FULL]


def _shown(run: Listed, now: float) -> list[Any]:
    mark = "~" if run.loss_kind == SAMPLED else ""
    loss = None if run.loss is None else f"{mark}{run.loss:.4f}"
    loss = f"{loss} train" if run.loss_kind == TRAINING else loss
    step = "-" if run.step is None else str(run.step)
    since = None if run.changed is None else age(now - run.changed)
    steps = f"{step}/{'-' if run.steps is None else run.steps}"
    numbers = [steps, run.parameters, loss, since, f"{compact(run.bytes)}B"]
    return [run.name, run.preset, run.state, *numbers]
