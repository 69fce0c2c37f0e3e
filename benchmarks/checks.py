"""Cost of the checks in a train step: `python -m benchmarks.checks [--presets small tiny]`.

Compares the compiled step of a run with the same step traced without its checks: no gradient norm,
no test for non-finite values, no choice between the new and the old state. Both run in this
process, start from the same state and take turns.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import measure
from gptjax import cli
from gptjax.assembly import assemble
from gptjax.errors import one_line_errors
from gptjax.parallel import sharding
from gptjax.step import Step

VOCABULARY = 65


@dataclass(frozen=True)
class ChecksCommand:
    """Time a train step with and without its checks."""

    presets: tuple[str, ...] = ("tiny", "small")
    """Presets or config files to train."""
    rounds: int = 15
    """Number of turns per side."""
    seconds: float = 2.0
    """Duration of one turn in seconds, rounded up to whole calls."""
    out: Path | None = None
    """Results file (default: benchmarks/results/checks.json)."""


def unchecked() -> contextlib.ExitStack:
    """Context in which a run is assembled and traced without its checks."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch("gptjax.assembly.skip_nonfinite", never_skip))
    stack.enter_context(mock.patch("optax.tree.norm", lambda grads: jnp.zeros(())))
    return stack


def never_skip(step: Step) -> Step:
    """Replacement for `skip_nonfinite` that treats every step as finite."""

    def unguarded(state: Any, batch: Any, key: jax.Array) -> Any:
        state, metrics = step(state, batch, key)
        return state, {**metrics, "finite": jnp.array(True)}

    return unguarded


def trainer(preset: str, checked: bool) -> Callable[[], int]:
    """A function that trains some steps and returns how many."""
    recipe = measure.recipe(preset)
    config = replace(recipe.config, steps=10**6)
    with contextlib.nullcontext() if checked else unchecked():
        setup = assemble(config, VOCABULARY, model=recipe.model)
        tokens = sharding.put(setup.mesh, measure.random_tokens(VOCABULARY))
        state, key, n = setup.start(), setup.seed_key(), config.steps_per_dispatch
        program = setup.steps.lower(state, tokens, key, 0, n).compile()
    step = 0

    def call() -> int:
        nonlocal state, step
        state, log = program(state, tokens, key, step, n)
        jax.block_until_ready(log)
        step += n
        return n

    call()
    return call


def main(argv: list[str]) -> None:
    """Time both sides in turns and print the table."""
    command = cli.parse(ChecksCommand, ChecksCommand(), argv, "benchmarks.checks", "")
    measure.at_least(rounds=command.rounds, seconds=command.seconds)
    for preset in command.presets:
        measure.recipe(preset)
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
