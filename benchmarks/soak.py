"""Soak test of a long run: `python -m benchmarks.soak [--seconds 3600]`.

The `tiny` preset saves and evaluates every hundred steps and is stopped and resumed several times,
while its memory, open files and threads are read from /proc. These and the step time must not grow;
slopes are fitted over each session after its first fifth.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from gptjax import cli
from gptjax.errors import UserError, one_line_errors
from gptjax.pictures import figures
from gptjax.runs import records

SAMPLE = {"markersize": 2.5, "alpha": 0.5, "markeredgewidth": 0, "color": "C0"}
ROOT = Path(__file__).resolve().parents[1]
EVERY = 5.0  # seconds between samples
WARM = 0.2  # fraction of a session in which memory may still grow
OPTIONS = "--config tiny --steps 100000000 --save-every 100 --eval-every 100 --run soak".split()


@dataclass(frozen=True)
class SoakCommand:
    """Train for a long time and check that memory, files and threads do not grow."""

    seconds: float = 3600.0
    """Total duration of training in seconds."""
    lives: int = 4
    """Number of sessions: the run is started once, then resumed."""
    text: str = "tiny_shakespeare"
    """Text to train on."""
    out: Path | None = None
    """Results file (default: benchmarks/results/soak.json); the plot is saved beside it as .png."""


def look(process: int, run: Path) -> dict[str, float]:
    """Current memory, threads and open files of a process, and the step of its run."""
    proc = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "step": last_step(run),
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "files": len(list((proc / "fd").iterdir())),
    }


def last_step(run: Path) -> int:
    """Step of the newest checkpoint; 0 before the first."""
    names = [p.name for p in (run / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(map(int, names), default=0)


def live(command: list[str], folder: Path, seconds: float) -> list[dict[str, float]]:
    """One session: start or resume the run, sample its resources, stop it."""
    began, seen = time.monotonic(), []
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    while process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(min(EVERY, seconds / 20))
        try:
            seen.append(
                {"seconds": time.monotonic() - began, **look(process.pid, folder / "runs/soak")}
            )
        except OSError:
            break  # it has exited; its exit code is checked below
    process.send_signal(signal.SIGTERM)
    if code := process.wait():
        raise UserError(
            f"the run ended with exit code {code}: {(folder / 'log').read_text()[-500:]}"
        )
    return seen


def slope(xs: list[float], ys: list[float]) -> float:
    """Slope of a straight line fitted to the points."""
    return float(np.polyfit(xs, ys, 1)[0]) if len(set(xs)) > 1 else 0.0


def step_times(run: Path, bins: int = 100) -> tuple[list[float], list[float]]:
    """Steps, and milliseconds per step around them."""
    found = [r for r in records.read(run / "metrics.jsonl")[0] if "loss" in r]
    cuts = np.linspace(0, len(found) - 1, min(bins, len(found)) + 1, dtype=int)
    pairs = [(found[a], found[b]) for a, b in pairwise(cuts) if a < b]
    times = [1e3 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs]
    return [b["step"] for _, b in pairs], times


def summary(life: list[dict[str, float]]) -> dict[str, Any]:
    """Slopes and ranges of a session after its warm-up."""
    warm = life[int(WARM * len(life)) :]
    steps = [x["step"] / 1000 for x in warm]
    return {
        "steps": life[-1]["step"] - life[0]["step"],
        "mb": warm[-1]["rss"] / 1e6,
        "mb_per_1000_steps": slope(steps, [x["rss"] / 1e6 for x in warm]),
        "files": [min(x["files"] for x in warm), max(x["files"] for x in warm)],
        "threads": [min(x["threads"] for x in warm), max(x["threads"] for x in warm)],
    }


def draw(
    lives: list[list[dict[str, float]]], times: tuple[list[float], list[float]], out: Path
) -> None:
    """Plot memory, open files, threads and step time over the steps.

    Raises:
        UserError: the plot cannot be written.
    """
    figure = figures.new_figure(8, 8)
    panels = figure.subplots(4, 1, sharex=True)
    names = (
        ("rss", 1e6, "resident memory (MB)"),
        ("files", 1, "open files"),
        ("threads", 1, "threads"),
    )
    for panel, (name, unit, title) in zip(panels, names, strict=False):
        for life in lives:
            # Single points: a line between samples would cross the whole panel at each save.
            panel.plot([x["step"] for x in life], [x[name] / unit for x in life], "o", **SAMPLE)
        panel.set_ylabel(title)
    panels[3].plot(*times, linewidth=1, color="C0")
    panels[3].set(ylabel="ms per step", xlabel="training step")
    for panel in panels:
        panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
        panel.grid(alpha=0.25)
        for number, life in enumerate(lives, 1):
            panel.axvline(life[0]["step"], color="0.4", linewidth=0.8, linestyle="--")
            at = life[0]["step"], 0.97
            where = {"transform": panel.get_xaxis_transform(), "va": "top"}
            if panel is panels[0]:
                panel.text(*at, f" session {number}", **where, fontsize=figures.SMALL)
    panels[3].xaxis.set_major_formatter("{x:,.0f}")
    sampled = sum(life[-1]["seconds"] for life in lives) / 60
    figure.suptitle(
        f"The preset tiny for {sampled:.0f} minutes, saving every 100 steps", fontsize="medium"
    )
    figures.note(
        figure,
        "Points: samples every few seconds. A save opens files and starts threads, and closes and "
        "ends them again; so what must not rise is the lower edge. Dashed: the run starts or "
        "resumes, in a new process. Step time: mean of a hundredth of the run, without saves and "
        "evaluations; its peaks are compilation.",
    )
    figures.save(figure, out)


def main(argv: list[str]) -> None:
    """Train, stop and resume; print and plot what grew."""
    command = cli.parse(SoakCommand, SoakCommand(), argv, "benchmarks.soak", "")
    measure.at_least(lives=command.lives, seconds=command.seconds)
    here = measure.begin("soak test")
    text = os.path.abspath(command.text) if os.path.exists(command.text) else command.text
    with tempfile.TemporaryDirectory() as name:
        folder, lives = Path(name), []
        train = [sys.executable, str(ROOT / "train.py")]
        for number in range(command.lives):
            options = ["--run", "soak", "--resume"] if number else [*OPTIONS, "--data.text", text]
            lives.append(live([*train, *options], folder, command.seconds / command.lives))
        times = step_times(folder / "runs/soak")
    rows = [{**summary(life), "samples": life} for life in lives]
    table = [
        [
            f"{row['steps']:,.0f}",
            f"{row['mb']:,.0f}",
            f"{row['mb_per_1000_steps']:+.3f}",
            "{} to {}".format(*row["files"]),
            "{} to {}".format(*row["threads"]),
        ]
        for row in rows
    ]
    head = ["steps", "final MB", "MB / 1,000 steps", "open files", "threads"]
    measure.show("each session after warm-up", head, table)
    per_step = slope([x / 1000 for x in times[0]], times[1])
    middle = float(np.median(times[1]))
    print(f"{middle:.3g} ms per step (median); {per_step:+.2g} ms / 1,000 steps")
    out = measure.save(command.out, "soak", here, command, [*rows, {"step_times": times}])
    draw(lives, times, out.with_suffix(".png"))
    measure.console.print(f"{out.with_suffix('.png')}")


if __name__ == "__main__":
    with one_line_errors("benchmarks.soak"):
        main(sys.argv[1:])
