"""Everything that is measured on a GPU, in one run of under nine minutes:

    python -m benchmarks.gpu --docs          # with a checkout of nanoGPT: --nanogpt FOLDER
    python -m benchmarks.gpu --toy           # toy sizes, to try the run itself on a CPU

Each part is a process of its own with a limit of its own, so that one that fails, or has no time
left, ends nothing else. A part's output is in its log; its figures are rows of gpu.jsonl.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks import measure
from gptjax import cli
from gptjax.errors import UserError, one_line_errors
from gptjax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
MARKERS = "<!-- made by benchmarks.gpu --docs -->", "<!-- end -->"
PartName = Literal[
    "facts", "correctness", "step", "nanogpt", "loss", "lecture", "sweep", "sampling"
]
LIMITS: dict[PartName, int] = {  # seconds
    "facts": 60,
    "correctness": 80,
    "step": 170,
    "nanogpt": 70,
    "loss": 75,
    "lecture": 75,
    "sweep": 60,
    "sampling": 80,
}


@dataclass(frozen=True)
class GpuCommand:
    """Measure gptjax on the GPU of this machine, part by part."""

    parts: tuple[PartName, ...] = tuple(LIMITS)
    """What to measure."""
    toy: bool = False
    """Use toy sizes, on any device: this tries the run itself, and its figures mean nothing."""
    nanogpt: Path | None = None
    """Folder with a checkout of nanoGPT and its prepared data, whose train.py runs beside."""
    text: str = "tiny_shakespeare"
    """Text to train on; the figures to compare with are of this one."""
    limit: float = 1.0
    """Factor on every part's limit of time."""
    docs: bool = False
    """Write the table into docs/speed.md."""
    out: Path = measure.RESULTS / "gpu"
    """Folder for gpu.jsonl and the logs."""
    only: PartName | None = None
    """Run this part in this process: what the command itself does with each part."""


class Row(NamedTuple):
    """One figure: a line of the table."""

    part: str
    name: str
    value: str


# ---------------------------------------------------------------------------------------------
# Parts: each prints, and returns its rows


def facts(command: GpuCommand) -> list[Row]:
    """What this machine is, and how fast at best."""
    missing = missing_packages()
    measure.console.print(f"not installed here: {' '.join(missing) or 'nothing'}")
    import jax

    from gptjax.parallel import kernels
    from gptjax.parallel.flops import matmul_peak, memory_rate

    device = jax.devices()[0]
    here = measure.machine()
    kernel = "not tried: no GPU"
    if device.platform == "gpu":
        kernel = kernels.failure(kernels.cudnn, PRESETS["shakespeare"].model) or "works"
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    return [
        Row("facts", "device", f"{device.device_kind}; {here['gpu'] or here['processor']}"),
        Row("facts", "versions", f"Python {here['python']}, {versions}"),
        Row("facts", "commit and date", f"{here['commit']}, {here['date']}"),
        Row("facts", "cuDNN attention", kernel),
        *(
            Row("facts", f"matmul peak, {dtype}", f"{matmul_peak(dtype) / 1e12:,.1f} TFLOP/s")
            for dtype in ("bfloat16", "float32")
        ),
        Row("facts", "memory", f"{memory_rate() / 1e9:,.0f} GB/s"),
    ]


def missing_packages() -> list[str]:
    """Requirements of gptjax that a bare machine lacks, as pip takes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for requirement in project["dependencies"]:
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def trained(
    preset: str, steps: tuple[int, ...], dtype: str, flags: str, device: str | None
) -> Callable[[], tuple[list[float], str]]:
    """A side: the losses of a run in calls of so many steps, and a hash of what it made."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax

    from gptjax.assembly import assemble
    from gptjax.parallel import sharding

    config = PRESETS[preset]
    model = replace(config.model, dtype=dtype, attention="auto", block_size=128)
    config = replace(config, model=model, steps_per_dispatch=max(steps))
    setup = assemble(config, 65, devices=jax.devices(device)[:1])
    tokens = sharding.put(setup.mesh, measure.random_tokens(65))

    def run() -> tuple[list[float], str]:
        state, key, losses = setup.start(), setup.seed_key(), []
        for n in steps:
            state, log = setup.steps(state, tokens, key, len(losses), n)
            losses += np.asarray(log["loss"])[:n].tolist()
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state.params):
            digest.update(np.asarray(leaf).tobytes())
        return losses, digest.hexdigest()

    return run


def correctness(command: GpuCommand) -> list[Row]:
    """Losses on the device against those on the CPU, and which runs are equal to the last bit."""
    from gptjax.parallel.switches import DETERMINISTIC

    preset, n = ("tiny", 4) if command.toy else ("small", 20)
    made = {
        "cpu": (trained, preset, (n,), "float32", "", "cpu"),
        "here": (trained, preset, (n,), "float32", "", None),
        "bfloat16": (trained, preset, (2 * n,), "bfloat16", "", None),
        "again": (trained, preset, (2 * n,), "bfloat16", "", None),
        "in two": (trained, preset, (n, n), "bfloat16", "", None),
        "fixed": (trained, preset, (2 * n,), "bfloat16", DETERMINISTIC, None),
        "fixed again": (trained, preset, (n, n), "bfloat16", DETERMINISTIC, None),
    }
    found = {}
    for name, args in made.items():  # one after the other, so that they share no memory
        with measure.sides({name: args}) as sides:
            found[name] = sides[name]()
    off = lambda a, b: np.abs(np.subtract(found[a][0][:n], found[b][0][:n])).max()
    same = lambda a, b: "yes" if found[a][1] == found[b][1] else "no"
    return [
        Row("correctness", f"{n} losses against the CPU, float32", f"{off('here', 'cpu'):.1e}"),
        Row("correctness", f"{n} losses against the CPU, bfloat16", f"{off('again', 'cpu'):.1e}"),
        Row("correctness", "another process: same bits", same("bfloat16", "again")),
        Row("correctness", "stopped halfway: same bits", same("bfloat16", "in two")),
        Row("correctness", f"the same with {DETERMINISTIC}", same("fixed", "fixed again")),
    ]


def step(command: GpuCommand) -> list[Row]:
    """A train step against PyTorch's, compiled."""
    from benchmarks import step as benchmark

    out = command.out / "step.json"
    sizes = "gpu-tiny" if command.toy else "gpu-char gpu-124M"
    sides = "gptjax plain-compiled" if importlib.util.find_spec("torch") else "gptjax"
    rounds = "--rounds 1 --seconds 0" if command.toy else "--rounds 5 --seconds 2"
    benchmark.main(f"--sizes {sizes} --sides {sides} {rounds} --out {out}".split())
    rows = []
    for size in json.loads(out.read_text())["rows"]:
        for name, side in size["sides"].items():
            seconds = measure.spread(side["seconds_per_step"])
            rate = size["batch"] * size["block"] / seconds.median
            figures = (
                f"{1e3 * seconds.median:.2f} ms a step, {rate:,.0f} tokens/s, "
                f"{size['flops_per_step'] / seconds.median / 1e12:.0f} TFLOP/s "
                f"({side['share_of_peak']:.0%} of the measured peak), "
                f"{side['peak_memory'] / 1e9:.1f} GB, first call {side['compile_seconds']:.0f} s"
            )
            rows.append(Row("step", f"{size['size']}, {name}", figures))
        for name, side in size["sides"].items():
            if name != "gptjax":
                ratio = measure.Spread(**side["gptjax_over_this"])
                rows.append(Row("step", f"{size['size']}, gptjax / {name}", str(ratio)))
    return rows


def nanogpt(command: GpuCommand) -> list[Row]:
    """nanoGPT's own train.py, character model, compiled; its own milliseconds and losses."""
    if command.nanogpt is None or not (command.nanogpt / "train.py").is_file():
        raise UserError(f"--nanogpt {command.nanogpt}: no train.py there; give a checkout")
    steps = 10 if command.toy else 2500
    words = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    words += [f"--max_iters={steps}", "--eval_iters=20", f"--eval_interval={steps}"]
    if command.toy:
        words += [
            "--device=cpu",
            "--compile=False",
            "--n_layer=1",
            "--n_embd=48",
            "--block_size=16",
        ]
    done = subprocess.run(words, cwd=command.nanogpt, capture_output=True, text=True)
    measure.console.print(done.stdout[-3000:], markup=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    times = [float(x) for x in re.findall(r"time ([\d.]+)ms", done.stdout)][-20:]
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    return [
        Row("nanogpt", f"its val loss after {steps} iterations", losses[-1]),
        Row("nanogpt", "its ms an iteration", str(measure.spread(times))),
    ]


def loss(command: GpuCommand) -> list[Row]:
    """Seconds to nanoGPT's figure, compilation apart."""
    from benchmarks import time_to_loss

    out = command.out / "time_to_loss.json"
    what = "--config tiny --steps 20 --target 4.2" if command.toy else "--config shakespeare"
    target = "" if command.toy else "--target 1.4697 --eval-every 100 --steps 2500"
    time_to_loss.main(f"{what} {target} --seeds 1 --text {command.text} --out {out}".split())
    rows = []
    for row in json.loads(out.read_text())["rows"]:
        for figure in ("seconds_to_target", "compile_seconds", "seconds", "lowest_val_loss"):
            [value] = row[figure]
            shown = "not reached" if value is None else measure.figure(value)
            name = f"{row['recipe']}, target {row['target']}: {figure.replace('_', ' ')}"
            rows.append(Row("loss", name, shown))
    return rows


def lecture(command: GpuCommand) -> list[Row]:
    """The lecture's last stage to its end, beside its figure of 1.4873."""
    from gptjax.console import Report
    from gptjax.lecture.models import STAGES
    from gptjax.presets import LECTURE_MODELS
    from gptjax.training import train

    name = "lecture/7-layernorm" if command.toy else "lecture/8-scale"
    config = PRESETS[name]
    config = replace(
        config,
        data=replace(config.data, text=command.text),
        model=replace(config.model, dtype="bfloat16"),
        eval_batches=None,
        **({"steps": 20} if command.toy else {}),
    )
    began = time.perf_counter()
    directory = command.out / "lecture"
    record = train(
        config,
        directory,
        model=STAGES[LECTURE_MODELS[name]],
        resume=directory.exists(),
        report=Report(quiet=True),
    )
    seconds = time.perf_counter() - began
    rows = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("val_loss") for line in rows]
    best = min(x for x in losses if x is not None)
    return [
        Row("lecture", f"{name}: val loss at the end", f"{record['val_loss']:.4f}"),
        Row("lecture", f"{name}: lowest val loss; the lecture has 1.4873", f"{best:.4f}"),
        Row("lecture", f"{name}: seconds in all", f"{seconds:.0f}"),
    ]


def sweep(command: GpuCommand) -> list[Row]:
    """Eight seeds at once by `jax.vmap`, against one."""
    import jax
    import jax.numpy as jnp

    from gptjax.batches import windows_at
    from gptjax.model import GPT
    from gptjax.optim import make_optimizer
    from gptjax.step import init_state, repeat, skip_nonfinite, train_step

    def seconds(name: str, n: int, seeds: int) -> float:
        """Of n steps of so many runs at once, after one call that compiles."""
        config = PRESETS[name]
        model = GPT(replace(config.model, dropout=0.0, attention="plain"), 65)
        optimizer = make_optimizer(config.optim, config.steps)
        tokens = jnp.asarray(measure.random_tokens(65))
        sizes = {"batch_size": config.batch_size, "block_size": config.model.block_size}
        once = skip_nonfinite(partial(train_step, model=model, optimizer=optimizer))
        steps = repeat(once, partial(windows_at, **sizes), n)

        def run(seed: jax.Array) -> jax.Array:
            key = jax.random.key(seed)
            return steps(init_state(model, optimizer, key), tokens, key, 0, n)[1]["loss"]

        function = jax.jit(jax.vmap(run))
        return measure.best_seconds(lambda: np.asarray(function(jnp.arange(seeds))), 3)

    rows = []
    for name in ("tiny",) if command.toy else ("small", "shakespeare"):
        n = 4 if command.toy else 100
        one, eight = seconds(name, n, 1), seconds(name, n, 8)
        value = f"{1e3 * one / n:.2f} and {1e3 * eight / n:.2f} ms a step, ratio {eight / one:.2f}"
        rows.append(Row("sweep", f"{name}: one seed, and eight at once", value))
    return rows


def sampling(command: GpuCommand) -> list[Row]:
    """Tokens per second against transformers with a static cache, and the floor."""
    from benchmarks import sampling as benchmark

    out = command.out / "sampling.json"
    size, batches = ("gpu-tiny", "1 4") if command.toy else ("gpu-124M", "1 64 256")
    sides = "gptjax"
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        sides += " transformers"
    rounds = "--rounds 1 --seconds 0" if command.toy else "--rounds 3 --seconds 1"
    words = f"--sizes {size} --sides {sides} --batches {batches} --length 15 {rounds} --out {out}"
    benchmark.main(words.split())
    rows = []
    for row in json.loads(out.read_text())["rows"]:
        for name, rates in row["tokens_per_second"].items():
            value = f"{measure.spread(rates)} tokens/s"
            if name == "gptjax":
                value += f", {row['share_of_floor']:.0%} of the floor"
            what = f"{row['size']}, {row['length']} tokens, {row['batch']} streams, {name}"
            rows.append(Row("sampling", what, value))
    return rows


PARTS: dict[PartName, Callable[[GpuCommand], list[Row]]] = {
    "facts": facts,
    "correctness": correctness,
    "step": step,
    "nanogpt": nanogpt,
    "loss": loss,
    "lecture": lecture,
    "sweep": sweep,
    "sampling": sampling,
}


# ---------------------------------------------------------------------------------------------
# The run


def run_part(command: GpuCommand, name: PartName, argv: list[str]) -> list[Row]:
    """Run a part in a process of its own; a row that says why, if it has no figures."""
    limit = command.limit * LIMITS[name]
    result, log = command.out / f"{name}.json", command.out / f"{name}.log"
    result.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.gpu", *argv, "--only", name]
    began = time.perf_counter()
    with log.open("w") as output:
        try:
            subprocess.run(words, stdout=output, stderr=output, timeout=limit)
        except subprocess.TimeoutExpired:
            output.write(f"stopped after its limit of {limit:.0f} s\n")
    seconds = time.perf_counter() - began
    if result.exists():
        rows = [Row(*row) for row in json.loads(result.read_text())]
    else:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        rows = [Row(name, "failed", last[:300])]
    for row in rows:
        measure.console.print(f"{row.part}: {row.name}: {row.value}", markup=False)
    measure.console.print(f"{name} took {seconds:.0f} s of {limit:.0f}")
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = "| part | figure | value |\n| --- | --- | --- |\n"
    clean = lambda text: text.replace("|", "/").replace("\n", " ")
    return head + "".join(f"| {' | '.join(map(clean, row))} |\n" for row in rows)


def write_page(rows: list[Row], page: Path) -> None:
    """Put the table between the page's markers.

    Raises:
        UserError: it has none.
    """
    text = page.read_text()
    start, end = MARKERS
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise UserError(f"{page} lacks the lines {start} and {end}")
    page.write_text(f"{before}{start}\n{table(rows)}{end}{rest.partition(end)[2]}")


def main(argv: list[str]) -> None:
    """Run all parts, one after the other, and keep their rows."""
    command = cli.parse(GpuCommand, GpuCommand(), argv, "benchmarks.gpu", "")
    command.out.mkdir(parents=True, exist_ok=True)
    if command.only:
        rows = PARTS[command.only](command)
        (command.out / f"{command.only}.json").write_text(json.dumps(rows))
        return
    if command.docs and command.toy:
        raise UserError("--docs takes no figures of toy sizes; leave out --toy")
    rows: list[Row] = []
    for name in command.parts:
        rows += run_part(command, name, argv)
        lines = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
        (command.out / "gpu.jsonl").write_text(lines)
    if command.docs:
        write_page(rows, PAGE)
        measure.console.print(str(PAGE))


if __name__ == "__main__":
    with one_line_errors("benchmarks.gpu"):
        main(sys.argv[1:])
