"""Growth of a step's time and memory: `python -m benchmarks.growth [--axes batch context ...]`.

One axis of a base model varies at a time; all points of an axis take turns. Slopes are of log(time)
or log(bytes) over log(axis): 1 is linear, 2 is quadratic.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import measure
from gptjax import cli
from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.errors import one_line_errors
from gptjax.pictures import figures

Axis = Literal["batch", "context", "width", "layers", "corpus"]
BASE = Config(batch_size=16, model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64))
CORPUS = 1_000_000  # characters, on all axes except corpus
POINTS: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32, 64, 128),
    "context": (32, 64, 128, 256, 512),
    "width": (64, 128, 256, 512),  # heads of 32
    "layers": (1, 2, 4, 8, 12, 24),
    "corpus": (100_000, 1_000_000, 10_000_000, 100_000_000),
}
ALPHABET = np.frombuffer(b"\n !$&',-.3:;?" + bytes(range(65, 91)) + bytes(range(97, 123)), np.uint8)


@dataclass(frozen=True)
class GrowthCommand:
    """Measure time and memory of a train step as one size grows."""

    axes: tuple[Axis, ...] = ("batch", "context", "width", "layers", "corpus")
    """Axes to vary, one after the other."""
    points: int | None = None
    """Number of points per axis, from the smallest (default: all)."""
    rounds: int = 5
    """Number of turns per point."""
    seconds: float = 1.0
    """Duration of one turn in seconds, rounded up to whole steps."""
    out: Path | None = None
    """Results file (default: benchmarks/results/growth.json); the plot is saved beside it as
    .png."""


def config_of(axis: str, value: int) -> Config:
    """The base config with one size changed."""
    m = BASE.model
    if axis == "batch":
        return replace(BASE, batch_size=value)
    changed = {
        "context": {"block_size": value},
        "width": {"n_embd": value, "n_head": value // 32},
        "layers": {"n_layer": value},
        "corpus": {},
    }[axis]
    return replace(BASE, model=replace(m, **changed))


def point(config: Config, characters: int) -> Callable[..., Any]:
    """A side that trains on a random text of this many characters."""
    from benchmarks import jax_gpt
    from gptjax.text.dataset import open_dataset

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "random.txt"
        with text.open("wb") as file:
            for start in range(0, characters, CORPUS):
                n = min(CORPUS, characters - start)
                drawn = np.random.default_rng(start).integers(len(ALPHABET), size=n)
                file.write(ALPHABET[drawn].tobytes())
        config = replace(config, data=DataConfig(text=str(text)))
        before = time.perf_counter()
        dataset = open_dataset(config.data, config.model.block_size)
        seconds = time.perf_counter() - before
    ask = jax_gpt.training(config, dataset.tokenizer.vocab_size, dataset.train)
    return lambda what, *args: seconds if what == "reading" else ask(what, *args)


def grow(command: GrowthCommand, axis: str) -> list[dict[str, Any]]:
    """Measure all points of an axis."""
    values = POINTS[axis][: command.points]
    made = {
        str(value): (point, config_of(axis, value), value if axis == "corpus" else CORPUS)
        for value in values
    }
    with measure.sides(made) as sides:
        visits = measure.take_turns(sides, command.rounds, "work", command.seconds)
        facts = {name: side("facts") for name, side in sides.items()}
        reading = {name: side("reading") for name, side in sides.items()}
    return [
        {
            "axis": axis,
            "value": value,
            "params": facts[name]["params"],
            "flops_per_step": facts[name]["flops"],
            "seconds_per_step": [v.seconds / v.count for v in visits[name]],
            "peak_memory": facts[name]["peak_memory"],
            "compile_seconds": facts[name]["compile_seconds"],
            "reading_seconds": reading[name],
        }
        for value, name in zip(values, made, strict=True)
    ]


def slopes(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slopes of log y over log x: between the last two points, and of a line through all."""
    x, y = np.log(xs), np.log(ys)
    if len(x) < 2:
        return float("nan"), float("nan")
    return float((y[-1] - y[-2]) / (x[-1] - x[-2])), float(np.polyfit(x, y, 1)[0])


def _median(row: dict[str, Any]) -> float:
    return measure.spread(row["seconds_per_step"]).median


def print_tables(axis: str, rows: list[dict[str, Any]]) -> None:
    """Print an axis's table; slopes are relative to the previous row."""
    body = []
    for i, row in enumerate(rows):
        since = ["", ""]
        if i:
            xs = [r["value"] for r in rows[i - 1 : i + 1]]
            since = [
                f"{slopes(xs, [of(r) for r in rows[i - 1 : i + 1]])[0]:.2f}"
                for of in (_median, lambda r: r["peak_memory"])
            ]
        body.append(
            [
                f"{row['value']:,}",
                str(measure.spread([1e3 * s for s in row["seconds_per_step"]])),
                since[0],
                f"{row['flops_per_step'] / _median(row) / 1e9:.0f}",
                measure.megabytes(row["peak_memory"]),
                since[1],
                f"{row['compile_seconds']:.1f}",
                f"{row['reading_seconds']:.2f}",
            ]
        )
    head = [axis, "ms per step", "slope", "GFLOP/s", "MB", "slope", "first call s", "read text s"]
    measure.show(f"growth with {axis}", head, body)


def draw(axes: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Plot time and memory of every axis on logarithmic scales.

    Raises:
        UserError: the plot cannot be written.
    """
    figure = figures.new_figure(2.6 * len(axes) + 1, 5)
    grid = figure.subplots(2, len(axes), squeeze=False, sharey="row")
    for column, (axis, rows) in enumerate(axes.items()):
        xs = [row["value"] for row in rows]
        times = [measure.spread([1e3 * s for s in row["seconds_per_step"]]) for row in rows]
        memory = [row["peak_memory"] / 1e6 for row in rows]
        grid[0, column].fill_between(xs, [t.min for t in times], [t.max for t in times], alpha=0.3)
        for panel, ys in zip(grid[:, column], ([t.median for t in times], memory), strict=True):
            panel.plot(xs, ys, "o-", markersize=4)
            panel.set(xscale="log", yscale="log", xlabel=axis)
            panel.set_title(f"slope {slopes(xs, ys)[1]:.2f}", fontsize="small")
            panel.grid(alpha=0.3)
    grid[0, 0].set_ylabel("ms per step")
    grid[1, 0].set_ylabel("peak MB")
    figures.save(figure, out)


def main(argv: list[str]) -> None:
    """Measure every axis, print the tables and plot them."""
    command = cli.parse(GrowthCommand, GrowthCommand(), argv, "benchmarks.growth", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds, points=command.points)
    here = measure.begin("growth of a train step")
    axes = {}
    for axis in command.axes:
        axes[axis] = grow(command, axis)
        print_tables(axis, axes[axis])
    measure.console.print(measure.LEGEND)
    out = measure.save(command.out, "growth", here, command, [r for a in axes.values() for r in a])
    draw(axes, out.with_suffix(".png"))
    measure.console.print(f"{out.with_suffix('.png')}")


if __name__ == "__main__":
    with one_line_errors("benchmarks.growth"):
        main(sys.argv[1:])
