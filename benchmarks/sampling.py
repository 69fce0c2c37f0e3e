"""Sampling speed against PyTorch and a roofline: `python -m benchmarks.sampling`.

Two tasks: `window` fills the model's context from one token, which all sides support; `long` goes
past it, which transformers' GPT-2 does not support. The roofline of one decoding step reads all
weights and every stream's cache once, and multiplies every weight once per stream.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import measure
from benchmarks.step import SIZES, SizeName
from gptjax import cli
from gptjax.config import Config
from gptjax.errors import one_line_errors

SideName = Literal["gptjax", "nanogpt", "transformers", "transformers-uncached"]
CACHED = ("gptjax", "transformers")


@dataclass(frozen=True)
class SamplingCommand:
    """Measure tokens per second of gptjax and PyTorch, in turns, in separate processes."""

    sizes: tuple[SizeName, ...] = ("0.8M", "10.7M")
    """Models to compare."""
    sides: tuple[SideName, ...] = ("gptjax", "nanogpt", "transformers", "transformers-uncached")
    """gptjax; a plain GPT without a KV cache, like nanoGPT; transformers' generate, with a KV cache
    and without."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of streams sampled in parallel."""
    length: int = 500
    """Tokens per sample in the long task."""
    rounds: int = 5
    """Number of turns per side."""
    seconds: float = 2.0
    """Duration of one turn in seconds, rounded up to whole samples."""
    patience: float = 10.0
    """Skip a side without a cache where one sample would take longer than this many seconds."""
    out: Path | None = None
    """Results file (default: benchmarks/results/sampling.json)."""


def ours(config: Config, vocab_size: int, weights: Path) -> Callable[..., Any]:
    """The gptjax side."""
    from benchmarks import jax_gpt

    return jax_gpt.sampling(config, vocab_size, weights)


def theirs(name: str, config: Config, vocab_size: int, weights: Path) -> Callable[..., Any]:
    """A PyTorch side."""
    from benchmarks import torch_gpt

    kind = "plain" if name == "nanogpt" else "transformers"
    return torch_gpt.sampling(kind, name in CACHED, config, vocab_size, weights)


def compare(command: SamplingCommand, size: str) -> list[dict[str, Any]]:
    """Measure all sides on all tasks of one size: a row for each task and batch."""
    config, vocab_size = SIZES[size]
    window = config.model.block_size - 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        names = dict.fromkeys(("gptjax", *command.sides))  # it writes the weights for all sides
        made = {
            name: (ours, config, vocab_size, weights)
            if name == "gptjax"
            else (theirs, name, config, vocab_size, weights)
            for name in names
        }
        with measure.sides(made) as sides:
            texts = {name: side("greedy", window) for name, side in sides.items()}
            for name, text in texts.items():
                # In bfloat16 two logits that round to the same number may differ on one side.
                if config.model.dtype == "float32" and text != texts["gptjax"]:
                    raise RuntimeError(f"{size}: {name} samples another greedy text: {texts}")
            for task, length in (("window", window), ("long", command.length)):
                for batch in command.batches:
                    results.append(_row(command, size, task, length, batch, sides))
    return results


def _row(
    command: SamplingCommand,
    size: str,
    task: str,
    length: int,
    batch: int,
    sides: dict[str, measure.Side],
) -> dict[str, Any]:
    """Measure one task at one batch size."""
    floor = sides["gptjax"]("floor", batch, length)
    able = {}
    for name, side in sides.items():
        # Without a cache, each token recomputes the whole context before it.
        context = min(length, SIZES[size].config.model.block_size) / 2
        again = 1 if name in CACHED else context
        slow = length * again * floor.flops_per_step / floor.peak > command.patience
        if not slow and (task == "window" or not name.startswith("transformers")):
            able[name] = side
    for side in able.values():
        side("warm", batch, length)
    visits = measure.take_turns(able, command.rounds, "work", batch, length, command.seconds)
    rates = {name: [v.count / v.seconds for v in vs] for name, vs in visits.items()}
    return {
        "size": size,
        "task": task,
        "length": length,
        "batch": batch,
        "tokens_per_second": rates,
        "gptjax_over": {
            name: measure.ratios(rates["gptjax"], theirs)._asdict()
            for name, theirs in rates.items()
        },
        "floor": floor._asdict(),
        "share_of_floor": measure.spread(rates["gptjax"]).median / floor.tokens_per_second,
    }


def print_tables(results: list[dict[str, Any]], names: list[str]) -> None:
    """Print the tables of one size: rates and ratios, then the floor."""
    head = ["task", "streams", *names]
    rows, floors = [], []
    for result in results:
        rates, over = result["tokens_per_second"], result["gptjax_over"]
        cells = [result["task"], str(result["batch"])]
        for name in names:
            if name not in rates:
                cells.append("-")
                continue
            median = measure.spread(rates[name]).median
            cells.append(
                str(measure.spread(rates[name]))
                if name == "gptjax"
                else f"{measure.figure(median)}, 1/{measure.figure(over[name]['median'])}"
            )
        rows.append(cells)
        floor = result["floor"]
        floors.append(
            [
                result["task"],
                str(result["batch"]),
                f"{floor['bytes_per_step'] / 1e6:.1f}",
                f"{floor['bandwidth'] / 1e9:.0f}",
                f"{1e6 * floor['bytes_per_step'] / floor['bandwidth']:.0f}",
                f"{1e6 * floor['flops_per_step'] / floor['peak']:.0f}",
                measure.figure(floor["tokens_per_second"]),
                f"{result['share_of_floor']:.1%}",
            ]
        )
    size, first = results[0]["size"], results[0]["floor"]
    measure.show(f"{size}: tokens/s over all streams, and fraction of gptjax's", head, rows)
    measure.show(
        f"{size}: roofline; memory bandwidth {first['memory_bandwidth'] / 1e9:.0f} GB/s, matmul "
        f"peak {first['peak'] / 1e9:.0f} GFLOP/s",
        [
            "task",
            "streams",
            "MB per step",
            "GB/s",
            "us to read",
            "us to compute",
            "tokens/s",
            "gptjax",
        ],
        floors,
    )


def main(argv: list[str]) -> None:
    """Measure all sides and print the tables."""
    command = cli.parse(SamplingCommand, SamplingCommand(), argv, "benchmarks.sampling", "")
    measure.at_least(
        rounds=command.rounds,
        seconds=command.seconds,
        length=command.length,
        batches=min(command.batches),
    )
    if others := set(command.sides) - {"gptjax"}:
        packages = {"torch", *(n.partition("-")[0] for n in others - {"nanogpt"})}
        measure.need(*sorted(packages), instead="--sides gptjax")
    here = measure.begin("sampling")
    results = []
    for size in command.sizes:
        results += (rows := compare(command, size))
        print_tables(rows, list(dict.fromkeys(("gptjax", *command.sides))))
    measure.console.print(measure.LEGEND)
    measure.save(command.out, "sampling", here, command, results)


if __name__ == "__main__":
    with one_line_errors("benchmarks.sampling"):
        main(sys.argv[1:])
