"""What all benchmarks share: sides in processes of their own, turns, spread, tables, JSON.

Nothing here, and nothing at the top of a benchmark, imports jax or torch: every process loads its
own side only, so that neither memory nor thread pools are shared.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import runpy
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

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.parallel.flops import processor
from gptjax.presets import LECTURE_MODELS, PRESETS

RESULTS = Path("benchmarks") / "results"
BUSY = 0.25  # of the cores' load average, from where on the machine counts as busy
LEGEND = (
    "Medians, and in brackets the smallest and largest, over rounds in which the sides take turns; "
    "ratios are taken within a round."
)
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:  # a file or a pipe takes tables as wide as they are
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
    if name in PRESETS:
        if name not in LECTURE_MODELS:
            return Recipe(PRESETS[name])
        from gptjax.lecture import models

        return Recipe(PRESETS[name], models.STAGES[LECTURE_MODELS[name]])
    if not (name.endswith(".py") and Path(name).is_file()):
        raise UserError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}; or a FILE.py")
    sys.path.insert(0, str(Path(name).parent.resolve()))  # for the modules beside it
    try:
        found = runpy.run_path(name)
    finally:
        sys.path.pop(0)
    return Recipe(found["config"], found.get("model"))


# ---------------------------------------------------------------------------------------------
# Processes


class Side:
    """One side of a comparison, in a fresh process: `make(*args)` there gives a function.

    Calling the side calls that function in its process, and waits. A side that waits uses no
    cores, whatever its threads are.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, args), daemon=True)
        self._process.start()
        there.close()
        self.ready = False

    def __call__(self, *args: Any) -> Any:
        """What the function answers.

        Raises:
            UserError: the side's own.
            RuntimeError: it failed; the message is its traceback's last line.
        """
        self.wait()
        self._here.send(args)
        return self._answer()

    def wait(self) -> None:
        """Until the function is made, compiled or not as `make` decides."""
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
    """The life of a side's process."""
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
    """`{name: Side(*args)}`, each made after the one before is ready; all closed at the end."""
    with ExitStack() as stack:
        open_sides = {}
        for name, args in made.items():
            side = Side(*args)
            stack.callback(side.close)
            side.wait()
            open_sides[name] = side
        yield open_sides


def take_turns(sides: Mapping[str, Side], rounds: int, *args: Any) -> dict[str, list[Any]]:
    """Ask each side in turn (A B C, A B C, ...): what they answered, by name, one a round."""
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(side(*args))
    return answers


class Visit(NamedTuple):
    """What a side did when it was its turn."""

    count: int
    """Steps, or tokens."""
    seconds: float
    cpu_seconds: float
    """Of all its threads; far below seconds times threads: others had the cores."""


def work(
    unit: Callable[[], int], seconds: float, finish: Callable[[], Any] = lambda: None
) -> Visit:
    """Do units of work until the seconds are over; each answers how much it did."""
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() - start < seconds:
        count += unit()
    finish()
    return Visit(count, time.perf_counter() - start, time.process_time() - cpu)


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had when it started us
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Of a call that was warmed up by another."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def random_tokens(vocab_size: int, count: int = 1_000_000) -> np.ndarray:
    """(count,) uint16 ids; the speed of a step does not depend on what they say."""
    return np.random.default_rng(0).integers(vocab_size, size=count, dtype=np.uint16)


# ---------------------------------------------------------------------------------------------
# Figures


class Spread(NamedTuple):
    """Smallest, middle and largest of some measurements."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.min)} to {figure(self.max)})"


def spread(values: Sequence[float]) -> Spread:
    """Of one or more."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of each round's ours / theirs: what the machine did in that round, it did to both."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def figure(value: float) -> str:
    """Three digits, or all those before the point."""
    if not math.isfinite(value):
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


# ---------------------------------------------------------------------------------------------
# Telling


def need(*packages: str, instead: str) -> None:
    """Stop, with one line, where something to compare with is not installed.

    Raises:
        UserError: which, and what to do.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} to compare with: not installed; pip install "
            f"{' '.join(missing)}, or {instead}"
        )


def at_least(**flags: float | None) -> None:
    """Check flags that must be 1 (or, of seconds, 0) or more, if they are given.

    Raises:
        UserError: one is not.
    """
    for name, value in flags.items():
        least = 0 if name == "seconds" else 1
        if value is not None and not value >= least:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is too small; give {least} or more"
            )


def machine() -> dict[str, Any]:
    """What the figures are figures of: processor, load, versions, commit, day."""
    return {
        "processor": processor(),
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jax", "flax", "optax", "torch")},
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The repository's, short; with a + where files differ from it."""
    try:
        git = lambda *words: subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def begin(title: str) -> dict[str, Any]:
    """Say what runs where, and whether somebody else does too; the machine, for `save`."""
    here = machine()
    console.print(f"{title}; {here['processor']}; commit {here['commit']}")
    if here["load"] > BUSY * cores():
        console.print(
            f"the machine is busy (load {here['load']} on {cores()} cores): keep none of these "
            f"figures; PyTorch's threads above all wait for one another when a core is taken"
        )
    return here


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
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
    """What JSON does not know by itself."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
