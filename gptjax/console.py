"""The console output of a run: progress bars and tables on a terminal, plain lines elsewhere."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from gptjax import optim
from gptjax.assembly import Setup
from gptjax.config import Config
from gptjax.errors import visible
from gptjax.parallel.flops import count_params, flops_per_token, matmul_peak, will_memorise
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.text.dataset import Dataset
from gptjax.text.tokenizers import Tokenizer

ESTIMATE_AFTER = 3.0  # seconds of steps that are enough to tell the whole run's time
PLAIN_EVERY = 15.0  # seconds between progress lines where there is no terminal


class Output:
    """Standard output, as it is at each write. What its encoding lacks is written by its escape.
    Once it takes nothing more, the rest is dropped.

    Attributes:
        lost: why it takes nothing more; None: it does.
    """

    lost: OSError | None = None

    @property
    def _stream(self) -> Any:
        """None: there is none. While rich shows a bar, it puts itself in its place."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def write(self, text: str) -> int:
        encoding = self.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._unless_lost("write", text)
        return len(text)

    def flush(self) -> None:
        self._unless_lost("flush")

    def _unless_lost(self, method: str, *args: str) -> None:
        if self._stream is not None and self.lost is None:
            try:
                getattr(self._stream, method)(*args)
            except OSError as error:
                self.lost = error

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table without a frame; outside of a terminal, in lines as long as they need to be
    and without blanks at their ends, for other programs to read."""
    console = console or Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(file=io.StringIO(), width=10_000, force_terminal=False)
    with wide.capture() as captured:
        wide.print(table)
    lines = captured.get().splitlines()
    console.print(Text("\n".join(line.rstrip() for line in lines)), soft_wrap=True)


class Report:
    """Prints the progress of a training run. Strangers' texts and names are shown as they are:
    neither markup nor control characters in them have an effect.

    Args:
        console: where to; None: standard output.
        quiet: print nothing at all.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self._output = Output()
        to: Any = self._output  # all that rich uses of a file
        self.console = console or Console(file=to, quiet=quiet, highlight=False)
        self._bar: tuple[Progress, TaskID] | None = None

    @property
    def lost(self) -> OSError | None:
        """Why the output takes nothing more, as when its reader or the disk's space is gone."""
        return self._output.lost

    def say(self, text: str) -> None:
        """Lines above the bar."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def summary(self, title: str, rows: dict[str, str]) -> None:
        """A small table of names and values."""
        self.say(title)
        table = Table(show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(visible(name)), Text(visible(value)))
        print_table(table, self.console)

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
                    self.say(f"{name}: {done / total:.0%}, {duration(left)} left")

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
        # The words come first, and whole: a narrow terminal has no room left for the bar.
        words = TextColumn("{task.completed}/{task.total}  {task.fields[words]}")
        with Progress(words, BarColumn(), console=self.console) as progress:
            task = progress.add_task("", total=config.steps, completed=start, words="compiling")
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
        rate = f"{rounded(self._tokens_per_step / per_step)} tokens/s"
        to_go = f"  {duration(left)} left" if step < self._steps else ""
        if not self._estimated and seconds - since > ESTIMATE_AFTER:
            self._estimated = True
            self.say(
                f"{rounded(per_step * 1e3)} ms a step: about {duration(left)} to go, and the "
                f"evaluations"
            )
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, words=f"loss {loss:.3f}{to_go}  {rate}")
        elif time.perf_counter() - self._last_line > PLAIN_EVERY:
            self._last_line = time.perf_counter()
            self.say(f"step {step}/{self._steps}  loss {loss:.3f}{to_go}  {rate}")

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


def rounded(x: float) -> str:
    """A number of at least three digits, without an exponent: 0.0123, 4.56, 1,830."""
    if not math.isfinite(x) or x == 0:
        return f"{x:g}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def duration(seconds: float) -> str:
    """A time to be read: `under 1 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 1:
        return "under 1 s"
    if not seconds < 3600 * 24 * 365:
        return "more than a year"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


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


def before(
    setup: Setup, tokenizer: Tokenizer, dataset: Dataset | None, start: int
) -> dict[str, str]:
    """A summary of the run that starts, or continues at step `start`."""
    config, mesh, layout = setup.config, setup.mesh, setup.layout
    trained = count_params(layout.params)
    count = trained + count_params(layout.frozen)
    some = f" ({trained:,} of them trained)" if trained < count else ""
    tokens = config.steps * config.batch_size * config.model.block_size
    leaves = jax.tree.leaves((layout, layout.params))  # the gradient is as large as these
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    size = f"{config.batch_size} x {config.model.block_size} tokens"
    rows = {
        "model": f"{_shape(setup)}: {count:,} parameters{some}",
        "training": f"{config.steps - start:,} steps of {size}",
        "memory": f"{state / 2**20:,.0f} MB for parameters, gradients and optimizer state; "
        f"activations come on top",
        "devices": f"{mesh.size} of {jax.device_count()} {jax.devices()[0].device_kind}"
        + (f" ({axes})" if axes else ""),
    }
    if dataset is None:
        return rows
    n_train = dataset.n_train
    rows["model"] += f", {n_train / count:,.2f} tokens per parameter"
    rows["training"] += f": {tokens / n_train:.1f} epochs"
    text = (
        f"{config.data.text}: {n_train:,} training and {len(dataset.val):,} validation tokens, "
        f"vocabulary size {tokenizer.vocab_size}"
    )
    return {"text": text, **dataset.notes, **rows}


def _shape(setup: Setup) -> str:
    m, name = setup.config.model, type(setup.model).__name__
    sizes = f"{m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, context {m.block_size}"
    return sizes if name == "GPT" else f"{name} ({sizes})"


def warning(setup: Setup, dataset: Dataset | None) -> str | None:
    """A warning before the run starts, if there is one."""
    if dataset is None:
        return None
    config, layout = setup.config, setup.layout
    count = count_params((layout.params, layout.frozen))
    epochs = config.steps * config.batch_size * config.model.block_size / dataset.n_train
    if not will_memorise(dataset.n_train, count, epochs):
        return None
    return (
        f"this model will memorise its text: it has more parameters than the text has tokens and "
        f"trains for {epochs:.0f} epochs (rule of thumb: over 16); the best checkpoint is kept; "
        f"more text, a smaller model, fewer --steps or more --model.dropout help"
    )


def after(setup: Setup, run: Run, record: Record) -> dict[str, str]:
    """The results of a finished run, with its model FLOPs utilisation (MFU) for a `GPT`.

    Args:
        setup: of the run.
        run: its folder.
        record: of its last step.
    """
    config, seconds = setup.config, record.get("seconds") or math.nan
    tokens_per_second = config.steps * config.batch_size * config.model.block_size / seconds
    best = run.best_step(Checkpoints(run.checkpoints_path).steps())
    rows = {}
    if "val_bits_per_byte" in record:
        rows["validation loss"] = (
            f"{record['val_loss']:.4f} after step {record['step']}, over the whole split, "
            f"{record['val_bits_per_byte']:.4f} bits per byte"
        )
    rows["training"] = (
        f"{seconds / 60:.2f} minutes, {rounded(seconds / config.steps * 1e3)} ms a step, "
        f"{tokens_per_second:,.0f} tokens/s, compilation included"
    )
    rows["kept"] = str(run.directory)
    if best is not None:
        key = "val_loss" if config.eval_batches is None else "val_sampled_loss"
        rows["kept"] += f"; sample.py uses the checkpoint of step {best}, of the lowest {key}"
    if "model" not in run.parts:
        rate = _flops_per_token(setup) * tokens_per_second
        peak = matmul_peak(config.model.dtype) * setup.mesh.size
        rows["arithmetic"] = (
            f"{rate / 1e9:,.0f} GFLOP/s, an MFU of {rate / peak:.0%} of the {peak / 1e9:,.0f} that "
            f"a large matmul reaches here"
        )
    return rows


def peak_tokens_per_second(setup: Setup, run: Run) -> float | None:
    """Tokens per second at an MFU of 1, by a measured matmul; None if the model is no `GPT`."""
    flops = 0 if "model" in run.parts else _flops_per_token(setup)
    return matmul_peak(setup.config.model.dtype) * setup.mesh.size / flops if flops else None


def _flops_per_token(setup: Setup) -> int:
    params = optim.unite(setup.layout.params, setup.layout.frozen)
    return flops_per_token(setup.config.model, params)
