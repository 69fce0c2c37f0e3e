"""Training time to a validation loss: `python -m benchmarks.time_to_loss --config NAME`.

Rules: the first 90 % of Tiny Shakespeare trains, the rest validates, all of it, in windows of the
model's own context. The clock runs during training, including compilation without a cache; reading
the text, initialising the weights, evaluating and saving are not timed. Every seed counts. The time
to the target is that of the first evaluation at or below it.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from gptjax import cli
from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError, one_line_errors
from gptjax.runs.run import Run

LEADERBOARD = Path("docs") / "leaderboard.md"
BASELINE = "nanoGPT's, PyTorch"
# nanoGPT's README, "I only have a macbook": its figure there is 1.88.
NANOGPT = Config(
    steps=2000,
    batch_size=12,
    eval_every=250,
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
)


@dataclass(frozen=True)
class TimeToLossCommand:
    """Train a preset with several seeds; report the time to a target loss and the final loss."""

    config: str = "small"
    """Preset or config file to train."""
    target: float = 1.8857
    """Target validation loss (default: nanoGPT's CPU figure; 1.4697 is its A100 figure)."""
    seeds: int = 3
    """Number of runs, with seeds 1337, 1338, ..."""
    baseline: bool = False
    """After each run, train nanoGPT's CPU setting with PyTorch and the same seed."""
    steps: int | None = None
    """Number of updates per run (default: the preset's)."""
    eval_every: int | None = None
    """Steps between evaluations, which are not timed (default: the preset's)."""
    baseline_steps: int = NANOGPT.steps
    """Number of updates per run of the baseline."""
    text: str | None = None
    """Text to train on (default: the preset's)."""
    docs: bool = False
    """Append the rows to docs/leaderboard.md."""
    out: Path | None = None
    """Results file (default: benchmarks/results/time_to_loss.json)."""


def configs(command: TimeToLossCommand) -> dict[str, Config]:
    """Configs to train, by recipe name.

    Raises:
        UserError: an unknown preset or file.
    """
    preset = measure.recipe(command.config).config
    steps = command.steps or preset.steps
    ours = replace(
        preset,
        steps=steps,
        eval_every=command.eval_every or preset.eval_every,
        eval_batches=None,  # the whole split
        optim=replace(preset.optim, warmup_steps=min(preset.optim.warmup_steps, steps)),
        data=replace(preset.data, text=command.text or preset.data.text),
    )
    recipe = Path(command.config).stem if command.config.endswith(".py") else command.config
    recipe += f", {steps} steps" if steps != preset.steps else ""
    if not command.baseline:
        return {recipe: ours}
    steps = command.baseline_steps
    theirs = replace(
        NANOGPT,
        steps=steps,
        optim=replace(NANOGPT.optim, warmup_steps=min(NANOGPT.optim.warmup_steps, steps)),
        data=DataConfig(ours.data.text),
    )
    name = BASELINE + (f", {steps} steps" if steps != NANOGPT.steps else "")
    return {recipe: ours, name: theirs}


def train_recipe(config: Config, name: str) -> Callable[[int], list[dict[str, float]]]:
    """`train_ours`, with the model of a preset or config file."""
    return train_ours(config, measure.recipe(name).model)


def train_ours(config: Config, model: Any = None) -> Callable[[int], list[dict[str, float]]]:
    """Our side, in its process: from a seed to the records with an evaluation."""
    import jax

    from gptjax.training import train

    jax.config.update("jax_enable_compilation_cache", False)

    def run(seed: int) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            report = Report(quiet=True)
            train(replace(config, seed=seed), directory, model=model, report=report)
            records = Run(directory).metrics()
        return _evaluations(records, config.steps_per_dispatch)

    return run


def _evaluations(records: list[dict[str, float]], dispatch: int) -> list[dict[str, float]]:
    """The evaluation records; the first also has `compile_seconds`.

    That is the duration of the first call minus the median of the later ones.
    """
    ends = [r["seconds"] for r in records if r["step"] and r["step"] % dispatch == 0]
    compiling = ends[0] if ends else records[-1]["seconds"]
    if len(ends) > 1:
        calls = [b - a for a, b in itertools.pairwise(ends)]
        compiling -= measure.spread(calls).median
    evaluations = [r for r in records if "val_loss" in r]
    evaluations[0]["compile_seconds"] = compiling
    return evaluations


def train_theirs(config: Config) -> Callable[[int], list[dict[str, float]]]:
    """The baseline side."""
    from benchmarks import torch_gpt
    from gptjax.text import sources
    from gptjax.text.tokenizers import CharTokenizer

    text = sources.read_text(config.data.text)
    tokenizer = CharTokenizer.fit(text)
    tokens = tokenizer.encode(text)
    split = int((1 - config.data.val_fraction) * len(tokens))
    return torch_gpt.time_to_loss(config, tokenizer.vocab_size, tokens[:split], tokens[split:])


def seconds_to(records: list[dict[str, float]], target: float) -> float | None:
    """Training time to the first evaluation at or below the target; None: never reached."""
    return next((r["seconds"] for r in records if r["val_loss"] <= target), None)


def summary(recipe: str, target: float, histories: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Results of one recipe, a list entry per seed."""
    times = [seconds_to(history, target) for history in histories]
    return {
        "recipe": recipe,
        "target": target,
        "seconds_to_target": times,
        "seconds": [history[-1]["seconds"] for history in histories],
        "compile_seconds": [history[0].get("compile_seconds", 0.0) for history in histories],
        "val_loss": [history[-1]["val_loss"] for history in histories],
        "lowest_val_loss": [min(r["val_loss"] for r in history) for history in histories],
        "histories": histories,
    }


def _mean(values: list[Any], form: str) -> str:
    """Mean (smallest to largest), or how many seeds have a value."""
    if any(value is None for value in values):
        return f"reached by {sum(v is not None for v in values)} of {len(values)}"
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


HEAD = [
    "recipe",
    "target",
    "seconds to target",
    "compile seconds",
    "total seconds",
    "final loss",
]


def cells(result: dict[str, Any]) -> list[str]:
    """A recipe's row, with the columns of HEAD."""
    return [
        result["recipe"],
        f"{result['target']:.4f}",
        _mean(result["seconds_to_target"], ".1f"),
        _mean(result["compile_seconds"], ".1f"),
        _mean(result["seconds"], ".1f"),
        _mean(result["val_loss"], ".4f"),
    ]


def append(page: Path, lines: list[list[str]]) -> None:
    """Append rows to the leaderboard's table, which is at the end of the page.

    Raises:
        UserError: the page does not exist or cannot be written.
    """
    try:
        text = page.read_text(encoding="utf-8")
        with page.open("a", encoding="utf-8") as file:
            file.write("" if text.endswith("\n") else "\n")
            file.writelines(f"| {' | '.join(line)} |\n" for line in lines)
    except OSError as error:
        raise UserError(
            f"cannot write {page}: {error.strerror}; run this from the repository's root"
        ) from None


def main(argv: list[str]) -> None:
    """Train all recipes and print the results."""
    command = cli.parse(TimeToLossCommand, TimeToLossCommand(), argv, "benchmarks.time_to_loss", "")
    measure.at_least(
        seeds=command.seeds,
        steps=command.steps,
        eval_every=command.eval_every,
        baseline_steps=command.baseline_steps,
    )
    recipes = configs(command)
    if command.baseline:
        measure.need("torch", instead="omit --baseline")
    here = measure.begin(f"time to a validation loss of {command.target}")
    histories: dict[str, list[list[dict[str, float]]]] = {recipe: [] for recipe in recipes}
    for seed in range(1337, 1337 + command.seeds):
        for recipe, config in recipes.items():  # each run in a fresh process, one after the other
            theirs = recipe.startswith(BASELINE)
            side = (train_theirs, config) if theirs else (train_recipe, config, command.config)
            with measure.sides({recipe: side}) as sides:
                history = sides[recipe](seed)
            histories[recipe].append(history)
            reached = seconds_to(history, command.target)
            measure.console.print(
                f"{recipe}, seed {seed}: {history[-1]['val_loss']:.4f} after "
                f"{history[-1]['seconds']:.1f} s; "
                + (f"target after {reached:.1f} s" if reached is not None else "target not reached")
            )
    results = [summary(recipe, command.target, runs) for recipe, runs in histories.items()]
    measure.show(
        f"training time, mean of {command.seeds} seeds (range)",
        HEAD,
        [cells(result) for result in results],
    )
    if command.baseline:
        reached, whole = results[0]["seconds_to_target"], results[1]["seconds"]
        if None not in reached:
            measure.console.print(
                f"gptjax to the target / whole run of {BASELINE}, seed by seed: "
                f"{measure.ratios(reached, whole)}"
            )
    if command.docs:
        where = [here["date"], here["commit"], f"{here['processor']}, load {here['load']}"]
        append(LEADERBOARD, [[*where, *cells(result), str(command.seeds)] for result in results])
        measure.console.print(f"{LEADERBOARD}")
    measure.save(command.out, "time_to_loss", here, command, results)


if __name__ == "__main__":
    with one_line_errors("benchmarks.time_to_loss"):
        main(sys.argv[1:])
