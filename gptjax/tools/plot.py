"""The loss curves of runs: the library of `gptjax plot`."""

from pathlib import Path

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.runs.run import Run


def plot(directories: list[Path], out: Path) -> None:
    """Draw training loss (faint, and its running mean) and validation loss of each run.

    Raises:
        UserError: a run without metrics, a picture that cannot be written, or no matplotlib.
    """
    # Not pyplot, which would change the state of a notebook's own figures.
    figure = optional_import("matplotlib.figure", "plot").Figure(
        figsize=(7, 4), layout="constrained"
    )
    axes = figure.subplots()
    for i, directory in enumerate(directories):
        records = Run(directory).metrics()
        train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r])
        if not len(train):
            raise UserError(f"{directory} has no metrics yet; train it for some steps first")
        color = f"C{i}"
        axes.plot(*train.T, color=color, alpha=0.2, linewidth=0.7)
        width = max(1, len(train) // 50)
        mean = np.convolve(train[:, 1], np.ones(width) / width, "valid")
        axes.plot(train[width - 1 :, 0], mean, color=color, label=f"{directory.name}: training")
        for key, style in (("val_loss", "o--"), ("val_sampled_loss", "s:")):
            values = np.array([(r["step"], r[key]) for r in records if key in r])
            if len(values):
                whole = "whole validation split" if key == "val_loss" else "random windows"
                label = f"{directory.name}: {whole}, last {values[-1, 1]:.4f}"
                axes.plot(*values.T, style, color=color, markersize=4, alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
