"""The losses of runs over their steps, tokens or seconds: what `gptjax plot` draws by itself.

What is drawn was measured: the loss of each batch, validation losses at the steps that were
evaluated, and a running mean only where its whole window lies in the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gptjax.errors import UserError
from gptjax.pictures import figures
from gptjax.runs import records
from gptjax.runs.records import Record
from gptjax.runs.run import read_config

X = Literal["steps", "tokens", "seconds"]
BINS = 800  # across the axes; of more batches the lowest and the highest of each bin are drawn
MARKS = 25  # of a line of evaluations with more, some have no marker
SETTLED = 0.05  # part of a run in which the loss falls from that of a uniform guess
VALIDATION = {"color": "C1", "linestyle": "none"}  # beside the training loss of the same run
TITLES = "Training loss", "Validation loss"  # of several runs
DIVERGED = 1.5  # times the first loss; the axis ends there


@dataclass(frozen=True)
class Curve:
    """The losses of a run, in nats per token."""

    name: str
    x: np.ndarray
    """(N,) of every step that was made: its number, tokens or seconds, see `X`."""
    loss: np.ndarray
    """(N,) of the batch; NaN where it was not finite."""
    window: int
    """Steps that a mean is taken over."""
    mean_x: np.ndarray
    """(M,) in the middle of each window, see `running_mean`."""
    mean: np.ndarray
    """(M,) of the finite losses in it; NaN where less than half of them are."""
    val: np.ndarray
    """(n, 2) x and loss over the whole validation split."""
    sampled: np.ndarray
    """(n, 2) x and loss over a sample of it."""

    @property
    def evaluated(self) -> np.ndarray:
        """(n, 2) `val`, or `sampled` if that has more points."""
        return self.val if len(self.val) >= len(self.sampled) else self.sampled

    @property
    def last_evaluated(self) -> tuple[float, float, bool] | None:
        """x and loss of the last evaluation, and whether it was over the whole split, as is
        preferred; None: there was none."""
        if not len(self.evaluated):
            return None
        whole = len(self.val) > 0 and self.val[-1, 0] == self.evaluated[-1, 0]
        x, loss = (self.val if whole else self.evaluated)[-1].tolist()
        return x, loss, whole


def read_curves(
    directories: Sequence[Path], x: X = "steps", window: int | None = None
) -> tuple[list[Curve], list[str]]:
    """The curves of runs, and a line for each that is left out, or damaged.

    Args:
        directories: runs' folders; of each only metrics.jsonl is read, and for tokens the config.
        x: what the losses are drawn over.
        window: steps that means are taken over; None: a fiftieth of the run.

    Raises:
        UserError: no run has a finite loss.
    """
    if x not in get_args(X):
        raise UserError(f"x={x!r} is not one of {', '.join(get_args(X))}")
    if window is not None and window < 1:
        raise UserError(f"--smooth {window} is too small; give 1 or more")
    curves, problems = [], []
    directories = list(dict.fromkeys(directories))
    names = [directory.name for directory in directories]
    for directory, name in zip(directories, names, strict=True):
        try:
            found, damage = records.read(directory / "metrics.jsonl")
            name = name if names.count(name) == 1 else str(directory)
            curves.append(_curve(name, directory, found, x, window))
            if damage:
                problems.append(f"{damage}; the rest is drawn")
        except UserError as error:
            problems.append(f"left out: {error}")
    if not curves:
        raise UserError(problems[-1].removeprefix("left out: "))
    return curves, problems


def _curve(name: str, directory: Path, found: list[Record], x: X, window: int | None) -> Curve:
    """The curve of these records.

    Raises:
        UserError: no finite loss, or nothing to draw it over.
    """
    numbers = lambda key: [_number(record, key) for record in found]
    at = np.array(numbers("step"))
    if x == "tokens":
        at = _tokens(directory, found)
    elif x == "seconds":
        at = np.array(numbers("seconds"))
    loss = np.array(numbers("loss"))
    trained = np.array([not _evaluation_only(record) for record in found], bool)
    if not np.isfinite(loss).any():
        raise UserError(
            f"{directory} has no step with a finite loss yet; train it for some steps first"
        )
    if not np.isfinite(at[trained]).any():
        raise UserError(f"{directory} has no {x} in its metrics.jsonl; give --x steps")

    def evaluations(key: str) -> np.ndarray:
        points = np.stack([at, np.array(numbers(key))], axis=1)
        return points[np.isfinite(points).all(axis=1)]

    evaluated = [evaluations(key) for key in ("val_loss", "val_sampled_loss")]
    at, loss = at[trained], loss[trained]
    window = min(window or max(1, len(loss) // 50), len(loss))
    return Curve(name, at, loss, window, *running_mean(at, loss, window), *evaluated)


def _evaluation_only(record: Record) -> bool:
    """Whether no step was made, as at step 0."""
    return "loss" not in record and "skipped" not in record


def _number(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else np.nan


def _tokens(directory: Path, found: list[Record]) -> np.ndarray:
    """(N,) training tokens up to each record: as logged, or by the config's batch."""
    if any("tokens" in record for record in found):
        return np.array([_number(record, "tokens") for record in found])
    config = read_config(directory)
    return np.array([r["step"] * config.batch_size * config.model.block_size for r in found], float)


def running_mean(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of every `window` values in a row, at the middle of their window; none are made up for
    the ends.

    Args:
        x, y: (N,); a y that is not finite does not count.
        window: at most N.

    Returns:
        x and y, each (M,): of all N - window + 1 windows, or if these are many of evenly spaced
        ones; y is NaN where less than half of the window is finite.
    """
    last = len(y) - window
    starts = np.unique(np.append(np.arange(0, last + 1, 1 + last // (4 * BINS)), last))
    ends = np.stack([starts, starts + window], axis=1).ravel()
    # Not a difference of cumulated sums, in which one huge loss would drown all after it.
    sums = lambda values: np.add.reduceat(np.append(values, 0.0), ends)[::2]
    count, total = sums(np.isfinite(y)), sums(np.where(np.isfinite(y), y, 0))
    mean = np.where(count * 2 >= window, total / np.maximum(count, 1), np.nan)
    return (x[starts + (window - 1) // 2] + x[starts + window // 2]) / 2, mean


# ---------------------------------------------------------------------------------------------
# Drawing


def draw(
    curves: Sequence[Curve], x: X = "steps", *, log_x: bool = False, log_y: bool = False
) -> Any:
    """A figure of the curves: one run's losses in one panel; of several runs, training losses above
    validation losses.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    one = len(curves) == 1
    panels = 2 if not one and any(len(curve.evaluated) for curve in curves) else 1
    height = max(3.4 if one else 2.6, figures.LINE * (len(curves) + 4))
    figure = figures.new_figure(8, height * panels + 0.5)
    grid = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    below = grid[-1] if one or panels == 2 else None
    unit, label = axis(curves, x)
    for axes in grid:
        axes.grid(alpha=0.25)
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        axes.set_ylabel("loss (nats per token)")
    for i, curve in enumerate(curves):
        _training(grid[0], curve, unit, i, faint=len(curves) > 4, one=one)
        if below is not None:
            _evaluations(below, curve, unit, 1 if one else i, joined=not one)
    parts = [(axes, axes is grid[0], axes is below) for axes in grid]
    cut = [] if log_y else [text for part in parts for text in _limit(curves, *part)]
    grid[-1].set_xlabel(label)
    titles = [f"Loss of the run {figures.drawable(curves[0].name)}"] if one else TITLES
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize="medium")
    figures.note(figure, " ".join(_explain(curves, cut, log_x, joined=panels == 2)))
    for axes, train, val in parts:
        figures.label_ends(axes, list(_ends(curves, unit, train, val)))
    return figure


def axis(curves: Sequence[Curve], x: X) -> tuple[float, str]:
    """What to divide x by, and the axis's label."""
    longest = max(np.nanmax(curve.x) for curve in curves)
    if x == "seconds":
        for unit, name, above in ((3600.0, "hours", 3 * 3600), (60.0, "minutes", 300)):
            if longest > above:
                return unit, f"time spent training ({name})"
        return 1.0, "time spent training (seconds)"
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if longest >= (1e5 if x == "steps" else 1e3) and longest >= 2 * unit:
            return unit, f"training {x} ({name})"
    return 1.0, "training step" if x == "steps" else "training tokens"


def _training(axes: Any, curve: Curve, unit: float, i: int, faint: bool, one: bool) -> None:
    """The loss of every batch, and their running mean; ticks at the top where it was not finite."""
    look = figures.line(i)
    x, loss, color = curve.x / unit, curve.loss, look["color"]
    if len(loss) > 2 * BINS:
        cuts = np.linspace(0, len(loss), BINS + 1, dtype=int)[:-1]
        low, high = np.fmin.reduceat(loss, cuts), np.fmax.reduceat(loss, cuts)
        axes.fill_between(
            x[cuts], low, high, color=color, alpha=0.12 if faint else 0.25, linewidth=0
        )
    elif curve.window > 1:
        axes.plot(x, loss, color=color, alpha=0.2 if faint else 0.4, linewidth=0.6)
    axes.plot(curve.mean_x / unit, curve.mean, linewidth=1.6, **look)
    if not one:
        axes.plot(*_last_mean(curve, unit), **figures.marks(i), color=color)
    bad = x[~np.isfinite(loss)]
    at_top = axes.get_xaxis_transform()
    axes.plot(bad, np.full(len(bad), 0.98), "x", color=color, markersize=4, transform=at_top)


def _last_mean(curve: Curve, unit: float) -> tuple[float, float]:
    """The last point of the mean, or of the losses where there is none."""
    x, y = (curve.mean_x, curve.mean) if np.isfinite(curve.mean).any() else (curve.x, curve.loss)
    last = np.flatnonzero(np.isfinite(y))[-1]
    return float(x[last] / unit), float(y[last])


def _evaluations(axes: Any, curve: Curve, unit: float, i: int, joined: bool) -> None:
    """Validation losses: filled markers for the whole split, hollow ones for a sample."""
    look = figures.line(i) if joined else VALIDATION
    for points, hollow in ((curve.sampled, True), (curve.val, False)):
        every = max(1, len(points) // MARKS)
        axes.plot(
            *(points / (unit, 1)).T,
            **look,
            **figures.marks(i, hollow),
            linewidth=0.8,
            markevery=every,
            zorder=3,
        )


def limits(curves: Sequence[Curve], train: bool, val: bool) -> tuple[float, float, float]:
    """Where to end an axis of losses, and the highest loss.

    Of several runs the first, steep part is cut off, and of a run that diverged what is far above
    the others.

    Args:
        curves: on the axis.
        train, val: which of their losses are.

    Returns:
        Lower and upper end, highest finite loss.
    """
    every, late, first = [], [], 0.0
    for curve in curves:
        lines = [(curve.x, curve.loss)] if train else []
        lines += [curve.val.T, curve.sampled.T] if val else []
        x = curve.x[np.isfinite(curve.x)]
        start = x.min() + SETTLED * np.ptp(x) if len(curves) > 1 else -np.inf
        lines = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in lines]
        every += [y for _, y in lines if len(y)]
        late += [y[x >= start] if (x >= start).any() else y for x, y in lines if len(y)]
        first = max([first, *(y[0] for _, y in lines if len(y))])
    low, high = min(y.min() for y in every), max(y.max() for y in every)
    bound = DIVERGED * first
    top = max((y.max() for y in late if y.max() <= bound), default=bound)
    margin = 0.05 * (top - low) or 0.05 * abs(top) or 0.05
    return low - margin, top + margin, high


def _limit(curves: Sequence[Curve], axes: Any, train: bool, val: bool) -> list[str]:
    """Set the limits of an axis; what they cut off."""
    low, top, high = limits(curves, train, val)
    axes.set_ylim(low, top)
    if high <= top:
        return []
    which = "" if train and val else "training " if train else "validation "
    return [f"The {which}axis ends at {shown(top)}; losses reach {shown(high)}."]


def shown(loss: float, digits: int = 2) -> str:
    """A loss with these decimals; with none from 100 on."""
    return f"{loss:.{digits}f}" if abs(loss) < 100 else f"{loss:,.0f}"


def _explain(curves: Sequence[Curve], cut: list[str], log_x: bool, joined: bool) -> Iterator[str]:
    """What the marks mean."""
    windows = sorted({curve.window for curve in curves})
    many, marks = ("s", "markers") if len(curves) > 1 else ("", "squares")
    if windows != [1]:
        steps = f"{windows[0]:,}" if len(windows) == 1 else f"{windows[0]:,} to {windows[-1]:,}"
        yield f"Thick line{many}: mean of {steps} steps in a row, drawn at their middle."
    if any(len(curve.loss) > 2 * BINS for curve in curves):
        yield "Shaded: lowest to highest loss of a batch."
    elif windows != [1]:
        yield f"Thin line{many}: each batch."
    if any(len(curve.sampled) for curve in curves):
        yield f"Hollow {marks}: a sample of the validation split."
    if any(len(curve.val) for curve in curves):
        yield f"Filled {marks}: the whole validation split."
    if joined:
        yield "Nothing was measured between markers."
    if any(not np.isfinite(curve.loss).all() for curve in curves):
        yield "Crosses at the top: steps whose loss was not finite."
    yield from cut
    if log_x:
        yield "A logarithmic axis has no place for step 0."


def _ends(curves: Sequence[Curve], unit: float, train: bool, val: bool) -> Iterator[figures.End]:
    """The labels of a panel's lines."""
    one = train and val
    for i, curve in enumerate(curves):
        if train:
            x, y = _last_mean(curve, unit)
            text = f"training, last mean {shown(y, 3)}" if one else f"{curve.name} {shown(y, 3)}"
            yield figures.End(x, y, text, figures.line(i) | ({} if one else figures.marks(i)))
        if val and (last := curve.last_evaluated):
            x, y, whole = last
            text = f"validation, last {shown(y, 4)}" if one else f"{curve.name} {shown(y, 4)}"
            look = VALIDATION | figures.marks(1) if one else figures.line(i) | figures.marks(i)
            yield figures.End(x / unit, y, text + ("" if whole else " (sampled)"), look)
