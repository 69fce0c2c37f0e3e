"""Time that training waits for batches: `python -m benchmarks.feed [--preset small]`.

The same training with the tokens on the device, which cuts the windows itself, and in a
memory-mapped file, from which the host prefetches batches. Stalled: fraction of the time that the
loop spends waiting for a batch.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from gptjax import cli
from gptjax.config import DataConfig
from gptjax.errors import one_line_errors

SIDES = {
    "on the device": DataConfig(),
    "on disk, random": DataConfig(resident_tokens=0),
    "on disk, shuffled": DataConfig(resident_tokens=0, order="shuffled"),
}


@dataclass(frozen=True)
class FeedCommand:
    """Time a train step and its wait for a batch, with tokens on the device and on disk."""

    preset: str = "small"
    """Preset or config file to train."""
    tokens: int = 100_000_000
    """Tokens in the file, two bytes each; it is read from the page cache."""
    rounds: int = 9
    """Number of turns per side."""
    seconds: float = 4.0
    """Duration of one turn in seconds, rounded up to whole calls."""
    out: Path | None = None
    """Results file (default: benchmarks/results/feed.json)."""


def trainer(preset: str, data: DataConfig) -> Callable[[float], tuple[measure.Visit, float]]:
    """A side that trains as `gptjax.training` does; returns a Visit and its seconds in the feed."""
    import jax

    from gptjax import assembly
    from gptjax.batches import Prefetched
    from gptjax.text.dataset import open_dataset
    from gptjax.text.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    recipe = measure.recipe(preset)
    config = replace(recipe.config, data=data, steps=10**6)
    dataset = open_dataset(config.data, config.model.block_size, tokenizer)
    batch_at = Prefetched.at if assembly.streams(config, dataset) else None
    setup = assembly.assemble(config, tokenizer.vocab_size, model=recipe.model, batch_at=batch_at)
    key, n = setup.seed_key(), config.steps_per_dispatch
    source = assembly.make_source(config, dataset, setup.mesh, key)
    state, before, step, stalled = setup.start(), None, 0, 0.0

    def call() -> int:
        """One call; as in `train`, its metrics are read while the next one runs."""
        nonlocal state, before, step, stalled
        began = time.perf_counter()
        data = source.data(step, then=step + n)
        stalled += time.perf_counter() - began
        state, out = setup.steps(state, data, key, step, n)
        jax.device_get(before)
        before, step = out, step + n
        return n

    def visit(seconds: float) -> tuple[measure.Visit, float]:
        nonlocal stalled
        stalled = 0.0
        return measure.work(call, seconds, lambda: jax.block_until_ready(state)), stalled

    visit(0.0)  # compiles
    return visit


def compare(command: FeedCommand) -> list[dict[str, Any]]:
    """Seconds per step and their fraction in the feed, for each side and round."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/train.bin"
        measure.random_tokens(256, command.tokens).tofile(path)
        settings = {name: replace(data, text=path) for name, data in SIDES.items()}
        made = {name: (trainer, command.preset, data) for name, data in settings.items()}
        with measure.sides(made) as sides:
            visits = measure.take_turns(sides, command.rounds, command.seconds)
    return [
        {
            "side": name,
            "seconds": [visit.seconds / visit.count for visit, _ in found],
            "cpu_seconds": [visit.cpu_seconds / visit.count for visit, _ in found],
            "stalled": [seconds / visit.seconds for visit, seconds in found],
        }
        for name, found in visits.items()
    ]


def main(argv: list[str]) -> None:
    """Time all sides in turns and print the table."""
    command = cli.parse(FeedCommand, FeedCommand(), argv, "benchmarks.feed", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds, tokens=command.tokens)
    measure.recipe(command.preset)
    here = measure.begin(f"batches of {command.preset} from {command.tokens:,} tokens")
    rows, table = compare(command), []
    for row in rows:
        ratios = [measure.ratios(row[of], rows[0][of]) for of in ("seconds", "cpu_seconds")]
        milliseconds = measure.spread([1e3 * s for s in row["seconds"]])
        stalled = measure.spread([100 * share for share in row["stalled"]])
        table.append([row["side"], *map(str, (milliseconds, *ratios, stalled))])
    head = ["tokens", "ms per step", "time: ratio", "CPU: ratio", "stalled, %"]
    measure.show("location of the tokens", head, table)
    measure.console.print(measure.LEGEND)
    measure.save(command.out, "feed", here, command, rows)


if __name__ == "__main__":
    with one_line_errors("benchmarks.feed"):
        main(sys.argv[1:])
