"""What a person sees of a run. Bars and tables on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from gptjax.config import Config
from gptjax.runs.records import Record

ESTIMATE_AFTER = 3.0  # seconds of steps that are enough to tell the whole run's time
PLAIN_EVERY = 15.0  # seconds between progress lines where there is no terminal


class Report:
    """Prints the story of a training run.

    Args:
        console: where to; None: standard output.
        quiet: print nothing at all.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet, highlight=False)
        self._bar: tuple[Progress, TaskID] | None = None

    def say(self, text: str) -> None:
        """Lines above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def summary(self, title: str, rows: dict[str, str]) -> None:
        """A small table of names and values."""
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, escape(value))
        self.console.print(table)

    @contextmanager
    def work(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """While this lasts, the function it gives says how much of `total` is done: bytes, or
        characters."""
        if not self.console.is_terminal:
            start = last = time.perf_counter()

            def tell(done: int) -> None:
                nonlocal last
                if (now := time.perf_counter()) - last > PLAIN_EVERY:
                    last = now
                    left = (total - done) * (now - start) / done
                    self.say(f"{name}: {done / total:.0%}, {left:.0f} s left")

            yield tell
            return
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        rate = TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, *rate, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def progress(self, start: int, config: Config) -> Iterator[None]:
        """While this lasts, `step` moves the bar."""
        self._steps = config.steps
        self._tokens_per_step = config.batch_size * config.model.block_size
        self._timed: tuple[int, float] | None = None
        self._estimated = False
        self._last_line = time.perf_counter()
        if not self.console.is_terminal:
            yield
            return
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
        ) as progress:
            task = progress.add_task("", total=config.steps, completed=start, loss="-", rate="-")
            self._bar = progress, task
            yield
            self._bar = None

    def step(self, step: int, loss: float, seconds: float) -> None:
        """Some steps are made, after `seconds` of training: move the bar, tell the time to go."""
        if self._timed is None:  # what came before was mostly compilation
            self._timed = step, seconds
            return
        first, since = self._timed
        per_step = (seconds - since) / (step - first)
        left = per_step * (self._steps - step)
        rate = f"{self._tokens_per_step / per_step:,.0f}"
        if not self._estimated and seconds - since > ESTIMATE_AFTER:
            self._estimated = True
            self.say(
                f"{per_step * 1e3:.3g} ms a step: about {left / 60:.1f} minutes to go, and the "
                f"evaluations"
            )
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, loss=f"{loss:.3f}", rate=rate)
        elif time.perf_counter() - self._last_line > PLAIN_EVERY:
            self._last_line = time.perf_counter()
            self.say(
                f"step {step}/{self._steps}  loss {loss:.3f}  {rate} tokens/s  {left:.0f} s left"
            )

    def evaluation(self, step: int, steps: int, record: Record) -> None:
        """The losses of an evaluation."""
        losses = "  ".join(
            f"{name.removesuffix('_loss').replace('_', ' ')} {value:.4f}"
            for name, value in record.items()
            if name.endswith("_loss")
        )
        bits = record.get("val_bits_per_byte")
        per_byte = "" if bits is None else f"  ({bits:.4f} bits per byte)"
        self.say(f"step {step:>{len(str(steps))}}  loss: {losses}{per_byte}")


class Clock:
    """Seconds of training over all sessions of a run; evaluations and saves are outside it."""

    def __init__(self, before: float):
        self._seconds = before
        self._since = math.nan

    def start(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self._seconds = self.read()
        yield
        self.start()
