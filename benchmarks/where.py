"""Where the time of a train step goes: `python -m benchmarks.where [--presets small]`.

A few steps are traced with JAX's profiler; each operation is looked up in the compiled program,
whose metadata names the part of the model that it belongs to. Operations may run in parallel, so
shares are of the sum of their times.
"""

import itertools
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from gptjax import cli
from gptjax.errors import UserError, one_line_errors
from gptjax.plan.hlo import Program

VOCABULARY = 65
CONTAINERS = {"while", "conditional", "call"}  # their time is that of their bodies
# The first pattern found in an operation's name gives its part.
PARTS = {
    # What `train_step` does itself, outside the model and the loss.
    "optimizer": r"/while/body/(?!jit\(_(randint|threefry))(jit\(\w+\)/)?\w+$|/optimizer/",
    "attention: linear layers": r"/attn/c_",
    "attention: the rest": r"/attn",
    "MLP: linear layers": r"/mlp/c_",
    "MLP: the rest": r"/mlp",
    "norms": r"/ln_",
    "head and loss": r"head|softmax|log",
    "embeddings, residual stream": r"/w[tpsbr]e|features",
    "batch and random numbers": r"threefry|randint|random|gather|dynamic",
}


@dataclass(frozen=True)
class WhereCommand:
    """Trace a train step and print the time of each part of the model."""

    presets: tuple[str, ...] = ("small",)
    """Presets or config files to train."""
    steps: int = 5
    """Number of steps to trace."""
    out: Path | None = None
    """Results file (default: benchmarks/results/where.json)."""


def instructions(hlo: str) -> dict[str, tuple[str, str]]:
    """Opcode and source name of each instruction of a compiled program, by instruction name."""
    found = {}
    for instruction in itertools.chain(*Program(hlo).computations.values()):
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        found[instruction.name] = instruction.opcode, source[1] if source else ""
    return found


def part(source: str) -> str:
    """Part of the model that an operation belongs to."""
    found = (name for name, pattern in PARTS.items() if re.search(pattern, source))
    return next(found, "copies and the rest")


def durations(events: Iterable[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """(name, start, end) of operations; one in the thread pool ends with its `end:` event."""
    running: dict[str, list[int]] = {}
    found: list[tuple[str, float, float]] = []
    for name, start, end in sorted(events, key=lambda event: event[1]):
        if name.startswith("end: "):
            if begun := running.get(name[5:]):
                i = begun.pop(0)
                found[i] = found[i][0], found[i][1], max(found[i][2], start)
        else:
            running.setdefault(name, []).append(len(found))
            found.append((name, start, end))
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def trace(preset: str, steps: int) -> dict[str, Any]:
    """Milliseconds per step, in total and by part."""
    import jax

    from gptjax.assembly import assemble
    from gptjax.parallel import sharding

    recipe = measure.recipe(preset)
    config = replace(recipe.config, steps=10**6, steps_per_dispatch=steps)
    setup = assemble(config, VOCABULARY, model=recipe.model)
    tokens = sharding.put(setup.mesh, measure.random_tokens(VOCABULARY))
    state, key = setup.start(), setup.seed_key()
    program = setup.steps.lower(state, tokens, key, 0, steps).compile()
    of = instructions(program.as_text() or "")
    state, log = program(state, tokens, key, 0, steps)
    jax.block_until_ready(log)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, log = program(state, tokens, key, steps, steps)
            jax.block_until_ready(log)
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [
            (event.name, event.start_ns / 1e6, event.end_ns / 1e6)
            for plane in planes
            for line in plane.lines
            for event in line.events
            if event.name.removeprefix("end: ") in of
        ]
    found = [e for e in durations(events) if of[e[0]][0] not in CONTAINERS]
    if not found:
        raise UserError("the profiler recorded no operation of the program; run this on a CPU")
    spans = [(start, end) for _, start, end in found]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    parts: dict[str, float] = {}
    for name, start, end in found:
        which = part(of[name][1])
        parts[which] = parts.get(which, 0.0) + (end - start) / steps
    return {
        "preset": preset,
        "milliseconds": wall / steps,
        "covered": covered(spans) / wall,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
    }


def main(argv: list[str]) -> None:
    """Trace all presets and print the tables."""
    command = cli.parse(WhereCommand, WhereCommand(), argv, "benchmarks.where", "")
    measure.at_least(steps=command.steps)
    for preset in command.presets:
        measure.recipe(preset)
    here = measure.begin("where the time of a train step goes")
    rows = [trace(preset, command.steps) for preset in command.presets]
    for row in rows:
        total = sum(row["parts"].values())
        table = [
            [name, measure.figure(ms), f"{ms / total:.0%}"] for name, ms in row["parts"].items()
        ]
        measure.show(
            f"{row['preset']}: {measure.figure(row['milliseconds'])} ms per step when "
            f"profiled, {row['covered']:.0%} of it in operations",
            ["part", "ms", "share"],
            table,
        )
    measure.save(command.out, "where", here, command, rows)


if __name__ == "__main__":
    with one_line_errors("benchmarks.where"):
        main(sys.argv[1:])
