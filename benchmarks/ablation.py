"""Ablation of the model and optimizer options: `python -m benchmarks.ablation [--seeds 2]`.

One option at a time is added to the classic recipe, or removed from the modern one, that of
examples/speedrun/fast.py. All runs make the same number of updates on the same number of tokens,
and are evaluated on the whole validation split.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure, time_to_loss
from gptjax import cli
from gptjax.config import Config, DataConfig
from gptjax.errors import UserError, one_line_errors

# nanoGPT's CPU setting, with a learning rate for short runs.
CLASSIC = replace(
    time_to_loss.NANOGPT,
    optim=replace(time_to_loss.NANOGPT.optim, learning_rate=6e-3, warmup_steps=30),
)
# Fields that each option changes, of the model's config and of the optimizer's.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rotary": ({"position": "rotary", "rope_base": 1000.0}, {}),
    "rms": ({"norm": "rms"}, {}),
    "qk_norm": ({"qk_norm": True}, {}),
    "relu2": ({"activation": "relu2"}, {}),
    "untied": ({"tie_head": False}, {}),
    "zero": ({"init": "zero"}, {}),
    "ngram": ({}, {}),
    "pairs": ({}, {}),
    "recall": ({}, {}),
    "muon": ({}, {"kind": "muon", "muon_learning_rate": 0.03, "muon_weight_decay": 0.05}),
    "wsd": ({}, {"schedule": "wsd", "final_lr_ratio": 0.0}),
    "swiglu": ({"activation": "swiglu", "n_inner": 344}, {}),
    "grouped": ({"n_kv_head": 2}, {}),
    "softcap": ({"softcap": 15.0}, {}),
    "window": ({"window": 4}, {}),
    "context": ({"block_size": 256}, {}),
    "ema": ({}, {"ema": 0.98}),
}
# Fields of an `NGramGPT`, the model of the runs that have one of these.
TABLES = {"ngram": {"ngram": 3}, "pairs": {"pair_rows": 65 * 65}, "recall": {"recall": 4}}
MODERN = (
    *("rotary", "rms", "qk_norm", "relu2", "untied", "zero", "context", "window", "pairs"),
    *("recall", "muon", "wsd"),
)


@dataclass(frozen=True)
class AblationCommand:
    """Train the classic recipe with each option and the modern recipe without it."""

    options: tuple[str, ...] = tuple(OPTIONS)
    """Options to ablate."""
    steps: int = 300
    """Number of updates per run."""
    seeds: int = 2
    """Number of runs per recipe, with seeds 1337, 1338, ..."""
    text: str = "tiny_shakespeare"
    """Text to train on."""
    out: Path | None = None
    """Results file (default: benchmarks/results/ablation.json)."""


def with_options(names: tuple[str, ...], steps: int, text: str) -> Config:
    """The classic recipe with some options and the same number of tokens per update."""
    model, optim = CLASSIC.model, CLASSIC.optim
    for name in names:
        of_model, of_optim = OPTIONS[name]
        model, optim = replace(model, **of_model), replace(optim, **of_optim)
    optim = replace(optim, warmup_steps=min(optim.warmup_steps, steps))
    return replace(
        CLASSIC,
        steps=steps,
        batch_size=CLASSIC.batch_size * CLASSIC.model.block_size // model.block_size,
        eval_every=steps,
        model=model,
        optim=optim,
        data=DataConfig(text=text),
    )


def tables(names: tuple[str, ...]) -> dict[str, int]:
    """Fields of an `NGramGPT` that the options set; empty for a GPT."""
    return {key: n for name in names if name in TABLES for key, n in TABLES[name].items()}


def train(config: Config, tables: dict[str, int]) -> Callable[[int], list[dict[str, float]]]:
    """A side that trains one run."""
    from examples.speedrun.ngrams import NGramGPT

    return time_to_loss.train_ours(config, partial(NGramGPT, **tables) if tables else None)


def recipes(options: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Options of each recipe, by row name.

    Raises:
        UserError: an unknown option.
    """
    if unknown := set(options) - set(OPTIONS):
        raise UserError(f"unknown option {min(unknown)!r}; options: {', '.join(OPTIONS)}")
    added = {f"classic + {name}": (name,) for name in options}
    less = {
        f"modern - {name}": tuple(other for other in MODERN if other != name)
        for name in options
        if name in MODERN
    }
    return {"classic": (), **added, "modern": MODERN, **less}


def main(argv: list[str]) -> None:
    """Train all recipes and print the table."""
    command = cli.parse(AblationCommand, AblationCommand(), argv, "benchmarks.ablation", "")
    measure.at_least(steps=command.steps, seeds=command.seeds)
    rows_of = recipes(command.options)
    here = measure.begin(f"ablation: validation loss after {command.steps} updates")
    rows: list[dict[str, Any]] = []
    for name, options in rows_of.items():
        config = with_options(options, command.steps, command.text)
        last = []
        for seed in range(1337, 1337 + command.seeds):
            with measure.sides({name: (train, config, tables(options))}) as sides:
                *_, end = sides[name](seed)
            last.append(end)
        rows.append({"recipe": name, "options": options, "ends": last})
        losses = [end["val_loss"] for end in last]
        measure.console.print(f"{name}: {sum(losses) / len(losses):.4f}")
    show(rows)
    measure.save(command.out, "ablation", here, command, rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print each recipe's loss and its difference from the base recipe."""
    mean = {
        row["recipe"]: sum(end["val_loss"] for end in row["ends"]) / len(row["ends"])
        for row in rows
    }
    table = []
    for row in rows:
        losses = [end["val_loss"] for end in row["ends"]]
        name = row["recipe"]
        base = name.split(" ")[0]
        change = f"{mean[name] - mean[base]:+.4f}" if name != base else ""
        table.append([name, f"{mean[name]:.4f}", change, f"{max(losses) - min(losses):.4f}"])
    measure.show(
        f"mean of {len(rows[0]['ends'])} seeds",
        ["recipe", "loss", "change", "seed range"],
        table,
    )


if __name__ == "__main__":
    with one_line_errors("benchmarks.ablation"):
        main(sys.argv[1:])
