"""The loss curves of runs: the library of `gptjax plot`."""

from pathlib import Path

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.runs.records import Record
from gptjax.runs.run import Run

MARKERS = "osD^vP"  # so that runs can be told apart without colour


def plot(directories: list[Path], out: Path) -> None:
    """Plot training loss (every step, and its running mean) and validation loss of each run.

    Validation losses are points without a line between them: nothing was measured there. Losses
    that were not finite are left out.

    Raises:
        UserError: a run without a finite loss, a plot that cannot be written, or no matplotlib.
    """
    # Not pyplot, which would change the state of a notebook's own figures.
    matplotlib = optional_import("matplotlib.figure", "plot")
    figure = matplotlib.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, directory in enumerate(directories):
        records = Run(directory).metrics()
        train = _finite(records, "loss")
        if not len(train):
            raise UserError(
                f"{directory} has no step with a finite loss yet; train it for some steps first"
            )
        # Matplotlib leaves labels with a leading _ out, and reads mathematics between dollars.
        color, name = f"C{i}", f"run {directory.name}".replace("$", r"\$")
        axes.plot(*train.T, color=color, alpha=0.25, linewidth=0.7)
        width = max(1, len(train) // 50)
        mean = np.convolve(train[:, 1], np.ones(width) / width, "valid")
        label = f"{name}: training loss of a batch, mean of {width} steps"
        axes.plot(train[width - 1 :, 0] - width // 2, mean, color=color, label=label)
        for key, split in (("val_loss", "whole validation split"), ("val_sampled_loss", "sampled")):
            values = _finite(records, key)
            if len(values):
                label = f"{name}: validation loss, {split}; last {values[-1, 1]:.4f}"
                axes.scatter(
                    *values.T,
                    marker=MARKERS[i % len(MARKERS)],
                    s=36,
                    edgecolors="black",
                    facecolors="none" if key == "val_sampled_loss" else color,
                    zorder=3,
                    label=label,
                )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss over training steps")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None


def _finite(records: list[Record], key: str) -> np.ndarray:
    """(n, 2) steps and values of the records that have a number there: a loss that was not finite
    is null in metrics.jsonl."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return np.array(found, float).reshape(-1, 2)
