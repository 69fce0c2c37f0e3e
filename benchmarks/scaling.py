"""Estimated scaling of GPTs over accelerators: `python -m benchmarks.scaling [--confirm]`.

Each point is the fastest step that fits in memory by the estimates of `gptjax.plan.estimate`, at
published peak rates; `--confirm` compiles a few of them ahead of time and prints both. Nothing is
run.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from benchmarks import measure
from gptjax import cli
from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError, one_line_errors
from gptjax.pictures import figures
from gptjax.plan.chips import CHIPS, GIB, Chip, read_target
from gptjax.presets import PRESETS

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = {"7b": 1024}  # sequences per update on any number of devices; 512 for the others
POINTS = (
    *("gpt2@v5p:2x2x2", "gpt2@v5p:2x4x4", "gpt2@v5p:4x4x4", "gpt2@v5p:4x8x8", "7b@v5p:4x4x4"),
    *("gpt2@h100:8", "gpt2@h100:64", "gpt2-xl@h100:8", "7b@h100:8", "7b@h100:64"),
)


@dataclass(frozen=True)
class ScalingCommand:
    """Estimate how GPTs of 124 M to 7 B parameters scale on 8 to 1024 accelerators."""

    chips: tuple[str, ...] = ("v5p", "h100")
    """Chips from `gptjax.plan.chips`."""
    models: tuple[str, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "7b")
    """Presets to scale."""
    confirm: bool = False
    """Compile `points` ahead of time (needs the extra plan; takes ten minutes)."""
    points: tuple[str, ...] = POINTS
    """Points to compile, as MODEL@CHIP:SHAPE."""
    out: Path | None = None
    """Results file (default: benchmarks/results/scaling.json); the plot is saved beside it as
    .png."""


# Of each column: the field of a point, its unit's factor, the title and the axis's label.
PANELS = (
    ("share", 100, "MFU without overlap: % of the peak rate"),
    ("memory", 1, "memory: GiB per device"),
    ("sent", 1, "network traffic: GB sent per device and step"),
)
CROSS = {"markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.6}


class Point(NamedTuple):
    """A step of a model on a number of chips."""

    model: str
    chip: str
    count: int
    axes: str  # used by the mesh
    mesh: str
    memory: float  # GiB per device
    sent: float  # GB per device
    share: float  # MFU without overlap
    bound: float  # MFU with perfect overlap
    limit: str


def config_of(model: str) -> Config:
    """The preset with a batch size that is a power of two, without accumulation."""
    config = PRESETS[model]
    optim = replace(config.optim, accumulate=1)
    return replace(config, batch_size=BATCH.get(model, 512), optim=optim)


def meshes(count: int, chip: Chip) -> dict[str, list[MeshConfig]]:
    """Meshes of this many devices, by the axes that they use; tensor stays within fast links."""
    ways = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    wide = [n for n in (2, 4, 8) if n <= min(count, chip.joined)]
    return {
        "data": [MeshConfig(count)],
        "fsdp": [MeshConfig(1, count)],
        "data, fsdp": [MeshConfig(count // n, n) for n in ways if 1 < n < count],
        "fsdp, tensor": [MeshConfig(1, count // n, n) for n in wide if n < count],
        "all": [
            MeshConfig(count // n // t, n, t) for t in wide for n in ways if 1 < n < count // t
        ],
    }


def point(model: str, name: str, count: int, axes: str, state: Any) -> Point | None:
    """The fastest of those meshes that fits; None: none does."""
    from gptjax.plan import estimate

    chip = CHIPS[name]
    found = estimate.proposals(config_of(model), state, chip, meshes(count, chip)[axes])
    return point_of(model, name, count, axes, *found[0]) if found else None


def point_of(model: str, name: str, count: int, axes: str, config: Config, cost: Any) -> Point:
    """The point of a config with this cost."""
    from gptjax.plan import estimate

    chip, m = CHIPS[name], config.mesh
    times = estimate.times(cost, chip)
    useful = cost.useful / chip.flops
    mesh = f"{m.data} x {m.fsdp} x {m.tensor}, G {config.optim.accumulate}"
    mesh += f", {config.model.remat_saves}" if config.model.remat else ", no remat"
    sent = sum(c.wire * c.times for c in cost.collectives) / 1e9
    limit = max(times._asdict(), key=lambda key: getattr(times, key))
    shares = useful / times.most, useful / times.least
    return Point(model, name, count, axes, mesh, cost.total / GIB, sent, *shares, limit)


def shapes(model: str) -> Any:
    """Shapes of the train state."""
    from gptjax.assembly import assemble

    config = replace(config_of(model), mesh=MeshConfig(1))
    return assemble(replace(config, model=replace(config.model, attention="plain")), 1).layout


def grow(command: ScalingCommand) -> list[Point]:
    """Estimate the best point of every kind of mesh."""
    found = []
    for model in command.models:
        state = shapes(model)
        for name in command.chips:
            for count in track(COUNTS, f"{model} on {name}", console=measure.console):
                for axes in meshes(count, CHIPS[name]):
                    if made := point(model, name, count, axes, state):
                        found.append(made)
    return found


def print_tables(command: ScalingCommand, points: list[Point]) -> None:
    """Print the best mesh of each size and where each kind of mesh stops scaling, by chip."""
    for name in command.chips:
        body = []
        for model in command.models:
            cells = []
            for count in COUNTS:
                here = [p for p in points if (p.model, p.chip, p.count) == (model, name, count)]
                p = max(here, key=lambda p: p.share) if here else None
                cells.append(f"{100 * p.share:.0f} to {p.bound:.0%}" if p else "")
            body.append([model, *cells])
        title = f"MFU on {CHIPS[name].title}, without overlap to perfect overlap"
        measure.show(title, ["chips", *map(str, COUNTS)], body)
        body = []
        for model in command.models:
            for count in COUNTS:
                here = [p for p in points if (p.model, p.chip, p.count) == (model, name, count)]
                if here:
                    p = max(here, key=lambda p: p.share)
                    shares = f"{p.share:.0%}", f"{p.bound:.0%}"
                    sizes = f"{p.memory:.1f}", f"{p.sent:.1f}"
                    body.append([model, str(count), p.mesh, *sizes, *shares, p.limit])
                else:
                    body.append([model, str(count), "none fits", *[""] * 5])
        head = ["model", "chips", "data x fsdp x tensor", "GiB", "GB sent"]
        head += ["MFU", "with overlap", "limit"]
        measure.show(f"the fastest mesh that fits, on {CHIPS[name].title}", head, body)
        body = [
            [model, axes, *ends(points, model, name, axes)]
            for model in command.models
            for axes in meshes(8, CHIPS[name])
        ]
        head = ["model", "axes", "fits", "best MFU", "below half of that at", "limit"]
        measure.show(f"where each kind of mesh stops scaling, on {CHIPS[name].title}", head, body)


def ends(points: list[Point], model: str, chip: str, axes: str) -> list[str]:
    """Where a kind of mesh fits, its best MFU, where less than half of that is left, and why."""
    own = [p for p in points if (p.model, p.chip, p.axes) == (model, chip, axes)]
    if not own:
        return ["nowhere", "", "", "memory or divisibility"]
    best = max(own, key=lambda p: p.share)
    fits = f"{own[0].count} to {own[-1].count}"
    for p in own[own.index(best) :]:
        if p.share < best.share / 2:
            return [fits, f"{best.share:.0%}", str(p.count), p.limit]
    more = own[-1].count < COUNTS[-1]
    return [fits, f"{best.share:.0%}", "", "divisibility" if more else "none up to 1024"]


def draw(command: ScalingCommand, points: list[Point], compiled: list[Point], out: Path) -> None:
    """Plot MFU, memory and bytes sent over the number of chips, for the best mesh of each model;
    compiled points are crosses.

    Raises:
        UserError: the plot cannot be written.
    """
    figure = figures.new_figure(13, 3.6 * len(command.chips) + 0.4)
    grid = figure.subplots(len(command.chips), 3, squeeze=False)
    ends: dict[tuple[int, int], list[figures.End]] = {}
    for (row, column), panel in np.ndenumerate(grid):
        name, (key, factor, title) = command.chips[row], PANELS[column]
        for i, model in enumerate(command.models):
            best: list[Point] = []
            for count in COUNTS:
                here = [p for p in points if (p.model, p.chip, p.count) == (model, name, count)]
                best += [max(here, key=lambda p: p.share)] if here else []
            if not best:
                continue
            value = lambda p, key=key, factor=factor: factor * getattr(p, key)
            look = figures.line(i) | figures.marks(i) | {"markersize": 4}
            panel.plot([p.count for p in best], list(map(value, best)), **look, linewidth=1.2)
            end = figures.End(best[-1].count, value(best[-1]), model, look)
            ends.setdefault((row, column), []).append(end)
            for p in compiled:
                if (p.model, p.chip) == (model, name):
                    estimate = [value(q) for q in best if q.count == p.count]
                    color = look["color"]
                    panel.plot([p.count] * 2, [*estimate, value(p)][-2:], ":", color=color)
                    panel.plot(p.count, value(p), "X", color=color, **CROSS)
        panel.set(xscale="log", xlabel="number of chips", ylabel=title.partition(":")[2].strip())
        panel.set_xticks(COUNTS, [str(n) for n in COUNTS], fontsize=figures.SMALL)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.set_title(f"{CHIPS[name].title}: {title.partition(':')[0]}", fontsize="medium")
        if key == "share":
            panel.set_ylim(0, 100)
        else:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
    crosses = (
        "Crosses: the same step as compiled ahead of time for these chips, joined to its estimate "
        "by a dotted line. "
    )
    figures.note(
        figure,
        f"Lines: estimates for the fastest mesh that fits. {crosses if compiled else ''}Nothing "
        f"was run on these chips.",
    )
    for place, labels in ends.items():
        figures.label_ends(grid[place], labels)
    figures.save(figure, out)


def confirm(texts: tuple[str, ...]) -> list[Point]:
    """Compile some points and print the compiler's figures beside the estimates.

    Raises:
        UserError: the compilers are missing, or no mesh fits.
    """
    from gptjax.plan import aot, estimate, plan

    found, body = [], []
    for text in texts:
        model, _, where = text.partition("@")
        target, config = read_target(where), config_of(model)
        devices = aot.topology(target)  # before JAX starts its devices, without which CUDA is lost
        state = shapes(model)
        if devices is None:
            raise UserError("--confirm needs compilers: pip install -e '.[plan]'")
        every = [mesh for group in meshes(target.count, target.chip).values() for mesh in group]
        proposals = estimate.proposals(config, state, target.chip, every)
        if not proposals:
            raise UserError(f"--points {text}: no mesh fits; give more chips")
        best, cost = proposals[0]
        made = plan.make_plan(best, 1, state, target.count, devices)
        assert made.compiled is not None
        costs = {"estimate": cost}
        name = "out of memory" if made.refused else "compiled"
        costs[f"{name} in {made.compiled.seconds:.0f} s"] = made.cost
        steps = [point_of(model, target.name, target.count, "", best, x) for x in costs.values()]
        body += [
            [
                *(text, by, p.mesh, f"{100 * p.share:.0f} to {p.bound:.0%}", f"{p.memory:.1f}"),
                *(f"{x.flops / 1e12:.0f}", f"{x.traffic / 1e12:.2f}", f"{p.sent:.1f}", p.limit),
            ]
            for (by, x), p in zip(costs.items(), steps, strict=True)
        ]
        measure.console.print(f"{text}: {body[-1][1]}")
        found += [] if made.refused else steps[-1:]
    head = ["point", "source", "mesh", "MFU, %", "GiB", "TFLOP", "TB moved", "GB sent", "limit"]
    measure.show("estimated and compiled", head, body)
    return found


def main(argv: list[str]) -> None:
    """Estimate all points, print the tables and plot them."""
    command = cli.parse(ScalingCommand, ScalingCommand(), argv, "benchmarks.scaling", "")
    for name, known in (("chips", CHIPS), ("models", PRESETS)):
        if unknown := [x for x in getattr(command, name) if x not in known]:
            raise UserError(f"--{name}: unknown {unknown[0]!r}; known: {', '.join(known)}")
    if unknown := [x for x in command.points if x.partition("@")[0] not in PRESETS]:
        raise UserError(f"--points {unknown[0]}: give MODEL@CHIP:SHAPE, such as {POINTS[0]}")
    here = measure.machine()
    points = grow(command)
    print_tables(command, points)
    compiled = confirm(command.points) if command.confirm else []
    rows = [p._asdict() for p in points]
    rows += [p._asdict() | {"compiled": True} for p in compiled]
    out = measure.save(command.out, "scaling", here, command, rows)
    draw(command, points, compiled, out.with_suffix(".png"))
    measure.console.print(f"{out.with_suffix('.png')}")


if __name__ == "__main__":
    with one_line_errors("benchmarks.scaling"):
        main(sys.argv[1:])
