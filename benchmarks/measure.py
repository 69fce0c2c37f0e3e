"""Shared by all benchmarks: sides in separate processes, turns, statistics, tables, JSON.

Each process loads only its own side, so that sides share neither memory nor thread pools.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from gptjax.cli.recipe import starting_point
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.parallel.flops import processor
from gptjax.presets import LECTURE_MODELS

# Several sides share a GPU, so that none may take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

RESULTS = Path("benchmarks") / "results"
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "torch"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "transformers"),
)
BUSY = 0.25  # load average per core above which the machine counts as busy
LEGEND = (
    "Medians (smallest to largest) over rounds in which the sides take turns; ratios are taken "
    "within a round."
)
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:  # do not wrap tables in a file or a pipe
    console.width = 140


class Recipe(NamedTuple):
    """What to train."""

    config: Config
    model: Any = None  # as `gptjax.train` takes it


def recipe(name: str) -> Recipe:
    """A preset, or a config file such as examples/speedrun/fast.py.

    Raises:
        UserError: no such preset or file.
    """
    config, file = starting_point(name)
    if name in LECTURE_MODELS:
        from gptjax.lecture.models import STAGES

        return Recipe(config, STAGES[LECTURE_MODELS[name]])
    return Recipe(config, file and file.model)


# ---------------------------------------------------------------------------------------------
# Processes


class Side:
    """One side of a comparison, in a fresh process that runs the function `make(*args)`.

    Calling the side calls that function in its process and waits for the result. A waiting side
    uses no CPU time.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, args), daemon=True)
        self._process.start()
        there.close()
        self.ready = False

    def __call__(self, *args: Any) -> Any:
        """Call the function and return its result.

        Raises:
            UserError: raised by the function.
            RuntimeError: any other failure; the message is the last line of its traceback.
        """
        self.wait()
        self._here.send(args)
        return self._answer()

    def wait(self) -> None:
        """Wait until `make` has returned the function."""
        if not self.ready:
            self._answer()
            self.ready = True

    def close(self) -> None:
        self._here.close()
        self._process.join(5)
        self._process.kill()

    def _answer(self) -> Any:
        try:
            good, answer = self._here.recv()
        except EOFError:
            self._process.join(5)
            code = self._process.exitcode
            raise RuntimeError(f"a side's process died with exit code {code}") from None
        if not good:
            raise answer
        return answer


def _serve(there: Any, make: Callable[..., Callable[..., Any]], args: tuple) -> None:
    """Main loop of a side's process."""
    try:
        function = make(*args)
        there.send((True, None))
        while True:
            there.send((True, function(*there.recv())))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except UserError as error:
        there.send((False, error))
    except Exception as error:
        import traceback

        traceback.print_exc()
        there.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


@contextmanager
def sides(made: Mapping[str, tuple]):
    """`{name: Side(*args)}`, started one after the other and closed at the end."""
    with ExitStack() as stack:
        open_sides = {}
        for name, args in made.items():
            side = Side(*args)
            stack.callback(side.close)
            side.wait()
            open_sides[name] = side
        yield open_sides


def take_turns(sides: Mapping[str, Side], rounds: int, *args: Any) -> dict[str, list[Any]]:
    """Call the sides in turn (A B C, A B C, ...); their results by name, one per round."""
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(side(*args))
    return answers


class Visit(NamedTuple):
    """Work that a side did in one turn."""

    count: int
    """Steps, or tokens."""
    seconds: float
    cpu_seconds: float
    """Of all threads; much less than seconds times threads means that the cores were shared."""


def work(
    unit: Callable[[], int], seconds: float, finish: Callable[[], Any] = lambda: None
) -> Visit:
    """Repeat `unit`, which returns how much it did, until the time is over."""
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() - start < seconds:
        count += unit()
    finish()
    return Visit(count, time.perf_counter() - start, time.process_time() - cpu)


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the parent's memory at the fork
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Shortest duration of a call, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def random_tokens(vocab_size: int, count: int = 1_000_000) -> np.ndarray:
    """(count,) random uint16 ids; the speed of a step does not depend on their values."""
    return np.random.default_rng(0).integers(vocab_size, size=count, dtype=np.uint16)


# ---------------------------------------------------------------------------------------------
# Figures


class Spread(NamedTuple):
    """Minimum, median and maximum of some measurements."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.min)} to {figure(self.max)})"


def spread(values: Sequence[float]) -> Spread:
    """Spread of one or more values."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of ours / theirs, round by round, so that the machine's load affects both alike."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def figure(value: float) -> str:
    """Format with three significant digits, or all digits of the integer part."""
    if not math.isfinite(value):
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


# ---------------------------------------------------------------------------------------------
# Checks and output


def need(*packages: str, instead: str) -> None:
    """Check that the packages to compare with are installed.

    Raises:
        UserError: some are missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the comparison needs {' and '.join(missing)}, not installed here; pip install "
            f"{' '.join(missing)}, or {instead}"
        )


def at_least(**flags: float | None) -> None:
    """Check that flags are at least 1 (seconds: 0), if they are given.

    Raises:
        UserError: one is smaller.
    """
    for name, value in flags.items():
        least = 0 if name == "seconds" else 1
        if value is not None and not value >= least:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is too small; give {least} or more"
            )


def machine() -> dict[str, Any]:
    """Conditions of the measurement: processor, GPU, load, versions, commit, date."""
    return {
        "processor": processor(),
        "gpu": gpu(),
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def gpu() -> str | None:
    """Name, memory and driver of each NVIDIA GPU; None: there is none."""
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        words = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the repository's commit, with a + if files differ from it."""
    try:
        git = lambda *words: subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def begin(title: str) -> dict[str, Any]:
    """Print the benchmark and the machine, warn if it is busy; the machine, for `save`."""
    here = machine()
    device = f"{here['gpu']}; " if here["gpu"] else ""
    console.print(f"{title}; {device}{here['processor']}; commit {here['commit']}")
    if here["load"] > BUSY * cores():
        console.print(
            f"warning: the machine is busy (load {here['load']} on {cores()} cores), so these "
            f"figures are unreliable; PyTorch's threads suffer most when a core is taken"
        )
    return here


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left", box=None)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def save(out: Path | None, name: str, here: dict[str, Any], command: Any, rows: Any) -> Path:
    """Write the results as JSON: to `out`, or to benchmarks/results/NAME.json.

    Raises:
        UserError: it cannot be written.
    """
    path = out or RESULTS / f"{name}.json"
    content = {"benchmark": name, "machine": here, "settings": command, "rows": rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None
    console.print(f"{path}")
    return path


def _plain(value: Any) -> Any:
    """Convert a value that JSON does not support."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
