"""Start-up time to the first step and to the first sampled character.

`python -m benchmarks.startup` runs the real commands, each in a fresh process, first with an empty
compilation cache (cold) and then with a filled one (warm).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from gptjax import cli
from gptjax.cli.train import parse_train
from gptjax.console import Report
from gptjax.errors import UserError, one_line_errors
from gptjax.presets import PRESETS
from gptjax.runs.run import Record
from gptjax.text import sources

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600.0  # seconds after which a command counts as hanging
FOR_SCALE = {  # for comparison: imports that a PyTorch script waits for
    "python -c 'pass'": "pass",
    "python -c 'import torch, transformers'": "import torch, transformers",
    "python -c '... GPT2LMHeadModel'": "import torch; from transformers import GPT2LMHeadModel",
}


@dataclass(frozen=True)
class StartupCommand:
    """Measure the time from a command to its first step or first character."""

    config: str = "small"
    """Preset to train."""
    text: str | None = None
    """Text to train on (default: the preset's)."""
    rounds: int = 3
    """Number of runs of each command, cold and warm."""
    out: Path | None = None
    """Results file (default: benchmarks/results/startup.json)."""


@contextmanager
def _command(words: list[str], cache: Path):
    """Run a command of the repository with its compilation cache in `cache`."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
        _, stderr = process.communicate(timeout=PATIENCE)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {stderr.decode()[-2000:]}")
    finally:
        process.kill()


def first_step(command: StartupCommand, run: Path, cache: Path) -> float:
    """Seconds from `python train.py` to the line of step 1 in its metrics.

    That line is written after step 2, because a dispatch is read while the next one runs.
    """
    start, metrics = time.perf_counter(), run / "metrics.jsonl"
    words = [*_train_words(command), "--run", str(run)]
    with _command([str(ROOT / "train.py"), *words], cache) as process:
        while process.poll() is None and time.perf_counter() - start < PATIENCE:
            if metrics.exists() and '"step": 1,' in metrics.read_text():
                return time.perf_counter() - start
            time.sleep(0.005)
    raise RuntimeError("train.py ended without a first step")


def _train_words(command: StartupCommand) -> list[str]:
    words = ["--config", command.config, "--steps", "2", "--steps-per-dispatch", "1"]
    words += ["--optim.warmup-steps", "0"]
    return words + (["--data.text", command.text] if command.text else [])


def first_character(run: Path, cache: Path) -> float:
    """Seconds from `python sample.py` to its first output."""
    start = time.perf_counter()
    words = [str(ROOT / "sample.py"), "--run", str(run), "--max-new-tokens", "40"]
    with _command(words, cache) as process:
        assert process.stdout
        if not process.stdout.read(1):
            process.wait()
        seconds = time.perf_counter() - start
    return seconds


# ---------------------------------------------------------------------------------------------
# Where the time goes


class _Marks(Report):
    """A report that records when a run reaches each stage."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.times.setdefault(name, time.time())

    def summary(self, title: str, rows: dict[str, str]) -> None:
        self.mark("text read, parameters drawn")

    def evaluation(self, step: int, steps: int, record: Record) -> None:
        self.mark("evaluation before step 1")

    def step(self, step: int, loss: float, seconds: float) -> None:
        self.mark("first step")


def traced(started: float, argv: list[str], cache: str) -> Callable[[], dict[str, float]]:
    """In a fresh process, do what train.py does; returns the seconds of each part."""
    marks = _Marks()
    marks.mark("interpreter, arguments")  # this module's imports include train.py's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    import jax

    marks.mark("import jax")
    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.training import train

    marks.mark("import flax, optax, orbax")
    jax.devices()
    marks.mark("find devices")
    compiling = {}

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        compiling[event] = compiling.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(note)
    use_compilation_cache()
    command = parse_train(argv)
    train(command.settings, command.directory(), report=marks)
    parts, last = {}, started
    for name, when in marks.times.items():
        parts[name], last = when - last, when
    for name, event in {
        "all tracing": "/jax/core/compile/jaxpr_trace_duration",
        "all lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "all compiling or loading": "/jax/core/compile/backend_compile_duration",
    }.items():
        parts[name] = compiling.get(event, 0.0)
    return lambda: parts


def parts(command: StartupCommand, run: Path, cache: Path) -> dict[str, float]:
    """Seconds of each part of a start, from `traced`."""
    words = [*_train_words(command), "--run", str(run)]
    with measure.sides({"": (traced, time.time(), words, str(cache))}) as sides:
        return sides[""]()


def main(argv: list[str]) -> None:
    """Run all commands and print the tables."""
    command = cli.parse(StartupCommand, StartupCommand(), argv, "benchmarks.startup", "")
    measure.at_least(rounds=command.rounds)
    if command.config not in PRESETS:
        raise UserError(f"unknown preset {command.config!r}; presets: {', '.join(PRESETS)}")
    sources.read_text(command.text or PRESETS[command.config].data.text)  # fetched now, not timed
    here = measure.begin(f"start-up of {command.config}")
    times: dict[str, list[float]] = {}
    split: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for i in range(command.rounds):
            for heat in ("cold", "warm"):
                note = lambda name, seconds, heat=heat: times.setdefault(
                    f"{name}, {heat}" if heat else name, []
                ).append(seconds)
                run = home / f"run-{i}-{heat}"
                note("train.py to the first step", first_step(command, run, home / f"train-{i}"))
                note("sample.py to the first character", first_character(run, home / f"sample-{i}"))
                split[heat].append(parts(command, home / f"traced-{i}-{heat}", home / f"parts-{i}"))
            for name, code in FOR_SCALE.items():
                start = time.perf_counter()
                done = subprocess.run([sys.executable, "-c", code], capture_output=True)
                if done.returncode == 0:
                    note(name, time.perf_counter() - start, heat="")
    rows = [[name, str(measure.spread(seconds))] for name, seconds in times.items()]
    measure.show("seconds from the start of the command", ["", "seconds"], rows)
    middle = lambda heat, part: measure.spread([one[part] for one in split[heat]]).median
    measure.show(
        "seconds of each part until the first step",
        ["part", *split],
        [[part, *(f"{middle(heat, part):.2f}" for heat in split)] for part in split["cold"][0]],
    )
    measure.console.print("Rows named all ... overlap with the others. " + measure.LEGEND)
    measure.save(command.out, "startup", here, command, {"seconds": times, "parts": split})


if __name__ == "__main__":
    with one_line_errors("benchmarks.startup"):
        main(sys.argv[1:])
