"""Cost of the checks in a train step: `python -m benchmarks.checks [--presets small tiny]`.

Compares the compiled step of a run with the same step traced without its checks: no gradient norm,
no test for non-finite values, no branch around the update. Both run in this process, start from the
same state and take turns.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import measure
from gptjax import cli
from gptjax.errors import UserError, one_line_errors
from gptjax.presets import PRESETS
from gptjax.programs import Programs

VOCABULARY = 65


@dataclass(frozen=True)
class ChecksCommand:
    """Time a train step with and without its checks."""

    presets: tuple[str, ...] = ("tiny", "small")
    """Presets to train."""
    rounds: int = 15
    """Number of turns per side."""
    seconds: float = 2.0
    """Duration of one turn in seconds, rounded up to whole calls."""
    out: Path | None = None
    """Results file (default: benchmarks/results/checks.json)."""


def unchecked() -> contextlib.ExitStack:
    """Context in which a step is traced without its checks."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch("jax.lax.cond", lambda _, move, stay, state: move(state)))
    stack.enter_context(mock.patch("optax.tree.norm", lambda grads: jnp.zeros(())))
    return stack


def trainer(preset: str, checked: bool) -> Callable[[], int]:
    """A function that trains some steps and returns how many."""
    config = replace(PRESETS[preset], steps=10**6)
    programs = Programs(config, VOCABULARY)
    tokens = programs.put(measure.random_tokens(VOCABULARY))
    state, n = programs.start(), config.steps_per_dispatch
    with contextlib.nullcontext() if checked else unchecked():
        program = programs.train_steps.lower(state, tokens, programs.seed_key, n).compile()

    def call() -> int:
        nonlocal state
        state, log = program(state, tokens, programs.seed_key, n)
        jax.block_until_ready(log)
        return n

    call()
    return call


def main(argv: list[str]) -> None:
    """Time both sides in turns and print the table."""
    command = cli.parse(ChecksCommand, ChecksCommand(), argv, "benchmarks.checks", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds)
    if unknown := set(command.presets) - set(PRESETS):
        raise UserError(f"unknown preset {min(unknown)!r}; presets: {', '.join(PRESETS)}")
    here = measure.begin("the cost of the checks in a train step")
    rows, table = [], []
    for preset in command.presets:
        sides = {checked: trainer(preset, checked) for checked in (True, False)}
        wall: dict[bool, list[float]] = {True: [], False: []}
        cpu: dict[bool, list[float]] = {True: [], False: []}
        for number in range(command.rounds):
            for checked in (True, False) if number % 2 else (False, True):
                visit = measure.work(sides[checked], command.seconds)
                wall[checked].append(visit.seconds / visit.count)
                cpu[checked].append(visit.cpu_seconds / visit.count)
        ratios = [measure.ratios(times[True], times[False]) for times in (wall, cpu)]
        rows.append({"preset": preset, "wall": list(wall.values()), "cpu": list(cpu.values())})
        milliseconds = 1e3 * measure.spread(wall[True]).median
        table.append([preset, measure.figure(milliseconds), *map(str, ratios)])
    measure.show("with the checks", ["preset", "ms per step", "time: ratio", "CPU: ratio"], table)
    measure.save(command.out, "checks", here, command, rows)


if __name__ == "__main__":
    with one_line_errors("benchmarks.checks"):
        main(sys.argv[1:])
