"""A train step against PyTorch's: `python -m benchmarks.step [--sizes 0.8M 10.7M 124M]`.

One step is: cut a batch, forward, backward, clip, AdamW. All sides begin with the same weights and
the same batches; their first losses must agree before anything is timed.
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

SideName = Literal["gptjax", "plain", "plain-compiled", "transformers", "transformers-compiled"]
TOLERANCE = 1e-4  # of the losses of the first steps, which differ by less than 1e-6


class Size(NamedTuple):
    """A model and its batch."""

    config: Config
    vocab_size: int


def _size(layers: int, heads: int, width: int, block: int, batch: int, vocab: int, n: int) -> Size:
    model = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=block)
    optim = OptimConfig(schedule="constant")
    return Size(Config(batch_size=batch, steps_per_dispatch=n, model=model, optim=optim), vocab)


# Steps per dispatch: the default, or as many as make ten seconds.
SIZES = {
    "0.8M": _size(4, 4, 128, 64, 12, 65, 8),  # nanoGPT's CPU setting
    "10.7M": _size(6, 6, 384, 256, 8, 65, 8),  # nanoGPT's character model; its batch is 64
    "124M": _size(12, 12, 768, 256, 2, 50257, 4),  # GPT-2, of a shorter context
    "tiny": _size(2, 2, 32, 16, 4, 65, 4),  # to see whether this works
}


@dataclass(frozen=True)
class StepCommand:
    """Time a train step of gptjax and of PyTorch, in turns, each in a process of its own."""

    sizes: tuple[Literal["0.8M", "10.7M", "124M", "tiny"], ...] = ("0.8M", "10.7M", "124M")
    """Models to compare."""
    sides: tuple[SideName, ...] = (
        "gptjax",
        "plain",
        "plain-compiled",
        "transformers",
        "transformers-compiled",
    )
    """gptjax, and PyTorch in eager mode or by torch.compile: a plain GPT, transformers' GPT-2."""
    rounds: int = 7
    """Turns of each side."""
    seconds: float = 3.0
    """Of one turn, and whole steps."""
    batch: int | None = None
    """Another batch size (default: 12, 8 and 2)."""
    out: Path | None = None
    """Where to write the results (default: benchmarks/results/step.json)."""


def ours(config: Config, vocab_size: int, start: Path) -> Callable[..., Any]:
    """Our side, in its process."""
    from benchmarks import jax_gpt

    return jax_gpt.training(config, vocab_size, measure.random_tokens(vocab_size), start)


def theirs(name: str, config: Config, vocab_size: int, start: Path) -> Callable[..., Any]:
    """A side of PyTorch's, in its process."""
    from benchmarks import torch_gpt

    kind, _, compiled = name.partition("-")
    tokens = measure.random_tokens(vocab_size)
    return torch_gpt.training(kind, bool(compiled), config, vocab_size, tokens, start)


def compare(command: StepCommand, size: str) -> dict[str, Any]:
    """All sides at one size: a row of figures for each, and the matmul peak."""
    config, vocab_size = SIZES[size]
    config = replace(config, batch_size=command.batch or config.batch_size)
    names = dict.fromkeys(("gptjax", *command.sides))  # it has the weights of all
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
            check_losses(losses)
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


def check_losses(losses: dict[str, list[float]]) -> None:
    """All sides must compute the same: the losses of their first steps are those of gptjax.

    Raises:
        RuntimeError: a comparison with this side would say nothing.
    """
    for name, values in losses.items():
        for a, b in zip(values, losses["gptjax"], strict=True):
            if not abs(a - b) <= TOLERANCE * abs(b):
                raise RuntimeError(f"{name} computes something else than gptjax: {losses}")


def tell(result: dict[str, Any]) -> None:
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
        f"{result['block']}, {result['flops_per_step'] / 1e9:.3g} GFLOP a step, matmul peak "
        f"{peak / 1e9:.0f} GFLOP/s",
        ["side", "ms a step", "gptjax / it", "at best", "of peak", "cores", "MB", "first s"],
        rows,
    )


def main(argv: list[str]) -> None:
    """Compare, and tell."""
    command = cli.parse(StepCommand, StepCommand(), argv, "benchmarks.step", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds, batch=command.batch)
    if others := {name.partition("-")[0] for name in command.sides} - {"gptjax"}:
        measure.need(*sorted({"torch"} | (others & {"transformers"})), instead="--sides gptjax")
    here = measure.begin("train step")
    results = []
    for size in command.sizes:
        results.append(compare(command, size))
        tell(results[-1])
    measure.console.print(measure.LEGEND)
    measure.save(command.out, "step", here, command, results)


if __name__ == "__main__":
    with one_line_errors("benchmarks.step"):
        main(sys.argv[1:])
