"""Train step against PyTorch: `python -m benchmarks.step [--sizes 0.8M 10.7M 124M]`.

One step is: cut a batch, forward, backward, clip, AdamW. All sides start from the same weights and
batches, and their first losses must agree before anything is timed.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import measure
from gptjax import cli
from gptjax.config import Config, ModelConfig, OptimConfig
from gptjax.errors import one_line_errors

SizeName = Literal["0.8M", "10.7M", "124M", "tiny", "gpu-char", "gpu-124M", "gpu-tiny"]
SideName = Literal["gptjax", "plain", "plain-compiled", "transformers", "transformers-compiled"]
# Relative, for the first losses. In float32 they differ by less than 1e-6 on a CPU, where matmuls
# are not of TF32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
TOLERANCE_TF32 = 2e-3


class Size(NamedTuple):
    """A model and its batch."""

    config: Config
    vocab_size: int


def _size(
    layers: int, heads: int, width: int, block: int, batch: int, vocab: int, n: int, **model: Any
) -> Size:
    sizes: Any = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": block}
    optim = OptimConfig(schedule="constant")
    made = ModelConfig(**sizes, **model)
    return Size(Config(batch_size=batch, steps_per_dispatch=n, model=made, optim=optim), vocab)


GPU: Any = {"dtype": "bfloat16", "attention": "auto"}


# Steps per dispatch: the default, or as many as take ten seconds.
SIZES = {
    "0.8M": _size(4, 4, 128, 64, 12, 65, 8),  # nanoGPT's CPU setting
    "10.7M": _size(6, 6, 384, 256, 8, 65, 8),  # nanoGPT's character model; its batch is 64
    "124M": _size(12, 12, 768, 256, 2, 50257, 4),  # GPT-2 with a shorter context
    "tiny": _size(2, 2, 32, 16, 4, 65, 4),  # smoke test
    "gpu-char": _size(6, 6, 384, 256, 64, 65, 50, **GPU, bias=False),  # nanoGPT's, without dropout
    "gpu-124M": _size(12, 12, 768, 1024, 16, 50304, 10, **GPU),  # GPT-2
    "gpu-tiny": _size(2, 2, 32, 16, 4, 65, 4, **GPU),
}


@dataclass(frozen=True)
class StepCommand:
    """Time a train step of gptjax and of PyTorch, in turns, in separate processes."""

    sizes: tuple[SizeName, ...] = ("0.8M", "10.7M", "124M")
    """Models to compare."""
    sides: tuple[SideName, ...] = (
        "gptjax",
        "plain",
        "plain-compiled",
        "transformers",
        "transformers-compiled",
    )
    """gptjax, and a plain GPT and transformers' GPT-2 in PyTorch, eager or with torch.compile."""
    rounds: int = 7
    """Number of turns per side."""
    seconds: float = 3.0
    """Duration of one turn in seconds, rounded up to whole steps."""
    batch: int | None = None
    """Batch size (default: 12, 8 and 2, by size)."""
    out: Path | None = None
    """Results file (default: benchmarks/results/step.json)."""


def ours(config: Config, vocab_size: int, start: Path) -> Callable[..., Any]:
    """The gptjax side."""
    from benchmarks import jax_gpt

    return jax_gpt.training(config, vocab_size, measure.random_tokens(vocab_size), start)


def theirs(name: str, config: Config, vocab_size: int, start: Path) -> Callable[..., Any]:
    """A PyTorch side."""
    from benchmarks import torch_gpt

    kind, _, compiled = name.partition("-")
    tokens = measure.random_tokens(vocab_size)
    return torch_gpt.training(kind, bool(compiled), config, vocab_size, tokens, start)


def compare(command: StepCommand, size: str) -> dict[str, Any]:
    """Measure all sides at one size, and the matmul peak."""
    config, vocab_size = SIZES[size]
    config = replace(config, batch_size=command.batch or config.batch_size)
    names = dict.fromkeys(("gptjax", *command.sides))  # it writes the weights for all sides
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.npz"
        made = {
            name: (ours, config, vocab_size, start)
            if name == "gptjax"
            else (theirs, name, config, vocab_size, start)
            for name in names
        }
        with measure.sides(made) as sides:
            facts = {name: side("facts") for name, side in sides.items()}
            losses = {name: fact["first_losses"] for name, fact in facts.items()}
            check_losses(losses, tolerance(config))
            peaks = {name: side("peak") for name, side in sides.items()}
            visits = measure.take_turns(sides, command.rounds, "work", command.seconds)
            for name, side in sides.items():
                peaks[name] = max(peaks[name], side("peak"))
                facts[name]["peak_memory"] = side("facts")["peak_memory"]
    flops, peak = facts["gptjax"]["flops"], max(peaks.values())
    times = {name: [v.seconds / v.count for v in vs] for name, vs in visits.items()}
    return {
        "size": size,
        "batch": config.batch_size,
        "block": config.model.block_size,
        "params": facts["gptjax"]["params"],
        "flops_per_step": flops,
        "matmul_peak": peaks,
        "sides": {
            name: {
                "seconds_per_step": seconds,
                "gptjax_over_this": measure.ratios(times["gptjax"], seconds)._asdict(),
                "fastest_over_fastest": min(times["gptjax"]) / min(seconds),
                "share_of_peak": flops / measure.spread(seconds).median / peak,
                "cores_used": sum(v.cpu_seconds for v in visits[name])
                / sum(v.seconds for v in visits[name]),
                **{k: v for k, v in facts[name].items() if k not in ("params", "flops")},
            }
            for name, seconds in times.items()
        },
    }


def tolerance(config: Config) -> float:
    """Largest relative difference of equal first losses."""
    if config.model.dtype == "float32" and measure.gpu():
        return TOLERANCE_TF32
    return TOLERANCE[config.model.dtype]


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Check that the first losses of all sides equal those of gptjax.

    Raises:
        RuntimeError: a side computes something else, so a comparison would be meaningless.
    """
    for name, values in losses.items():
        for a, b in zip(values, losses["gptjax"], strict=True):
            if not abs(a - b) <= tolerance * abs(b):
                raise RuntimeError(f"{name} computes something else than gptjax: {losses}")


def print_tables(result: dict[str, Any]) -> None:
    """Print the table of one size."""
    peak = max(result["matmul_peak"].values())
    rows = []
    for name, side in result["sides"].items():
        times = measure.spread([1e3 * s for s in side["seconds_per_step"]])
        rows.append(
            [
                name,
                str(times),
                str(measure.Spread(**side["gptjax_over_this"])),
                measure.figure(side["fastest_over_fastest"]),
                f"{side['share_of_peak']:.0%}",
                f"{side['cores_used']:.2f}",
                measure.megabytes(side["peak_memory"]),
                f"{side['compile_seconds']:.1f}",
            ]
        )
    measure.show(
        f"{result['size']}: {result['params']:,} parameters, batch {result['batch']} x "
        f"{result['block']}, {result['flops_per_step'] / 1e9:.3g} GFLOP per step, matmul peak "
        f"{peak / 1e9:.0f} GFLOP/s",
        [
            "side",
            "ms per step",
            "gptjax / side",
            "fastest",
            "of peak",
            "cores",
            "MB",
            "first call s",
        ],
        rows,
    )


def main(argv: list[str]) -> None:
    """Measure all sides and print the tables."""
    command = cli.parse(StepCommand, StepCommand(), argv, "benchmarks.step", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds, batch=command.batch)
    if others := {name.partition("-")[0] for name in command.sides} - {"gptjax"}:
        measure.need(*sorted({"torch"} | (others & {"transformers"})), instead="--sides gptjax")
    here = measure.begin("train step")
    results = []
    for size in command.sizes:
        results.append(compare(command, size))
        print_tables(results[-1])
    measure.console.print(measure.LEGEND)
    measure.save(command.out, "step", here, command, results)


if __name__ == "__main__":
    with one_line_errors("benchmarks.step"):
        main(sys.argv[1:])
