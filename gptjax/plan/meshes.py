"""What each mesh keeps and moves: `gptjax meshes` trains one small GPT on 1 to 8 simulated devices,
on every mesh of theirs, and compares with one device.

Trains one small GPT on each mesh and compares it with one device. The bytes are counted in the
compiled program and hold for real devices too; times do not, because simulated devices share a CPU.
"""

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from rich.box import MARKDOWN
from rich.table import Table

from gptjax.assembly import assemble
from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from gptjax.parallel import sharding
from gptjax.plan.hlo import Program
from gptjax.step import TrainState

STEPS, VOCAB = 20, 64
PLAIN = Config(
    steps=STEPS,
    steps_per_dispatch=STEPS,
    batch_size=16,
    model=ModelConfig(n_layer=2, n_head=8, n_embd=64, block_size=32),
    optim=OptimConfig(learning_rate=0.01),
)
MODERN = replace(
    PLAIN,
    model=replace(
        PLAIN.model,
        **{"n_kv_head": 2, "norm": "rms", "position": "rotary", "activation": "swiglu"},
        **{"tie_head": False, "dropout": 0.1},
    ),
    optim=replace(PLAIN.optim, kind="muon", ema=0.9, accumulate=2),
)


class Row(NamedTuple):
    """Results of one mesh, per device."""

    mesh: MeshConfig
    losses: np.ndarray  # (STEPS,)
    state: int  # bytes of parameters, moments and averages
    flops: float  # of the compiled program, which counts a loop's body once
    moved: dict[str, tuple[int, float]]  # count and bytes sent per step, by kind and axes


def meshes(devices: int = 8) -> list[MeshConfig]:
    """Every mesh of 1, 2, 4, ... devices, those with fewer devices and axes first."""
    sizes = [2**n for n in range(devices.bit_length())]
    found = [MeshConfig(d, f, t) for d in sizes for f in sizes for t in sizes]
    count = lambda m: m.data * m.fsdp * m.tensor
    order = lambda m: (count(m), -(m.data, m.fsdp, m.tensor).count(1), -m.data, -m.fsdp)
    return sorted((m for m in found if count(m) <= devices), key=order)


def measure(config: Config) -> Row:
    """Train on the config's mesh and measure its losses, memory and communication.

    Args:
        config: `steps` must not exceed `steps_per_dispatch`.
    """
    setup = assemble(config, VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 2000).astype(np.uint16)
    arguments = setup.start(), sharding.put(setup.mesh, tokens), setup.seed_key(), 0, config.steps
    compiled = setup.steps.lower(*arguments).compile()
    state, *rest = arguments
    kept = kept_bytes(state)
    _, log = compiled(state, *rest)
    moved: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for c in Program(compiled.as_text() or "").collectives():
        name = f"{c.kind} {'+'.join(c.axes(dict(setup.mesh.shape)))}"
        times, nbytes = moved[name]
        moved[name] = times + c.times, nbytes + c.times * c.wire
    flops = (compiled.cost_analysis() or {})["flops"]
    return Row(config.mesh, np.asarray(log["loss"]), kept, flops, dict(moved))


def kept_bytes(state: TrainState) -> int:
    """Bytes of a train state on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def table(rows: list[Row]) -> Table:
    """Table of the rows, each compared with the first, which is one device."""
    one = rows[0]
    shown = Table(box=MARKDOWN)
    for name in ("mesh", "loss difference", "state, KB", "FLOPs", "sent per step, KB (count)"):
        shown.add_column(name)
    for row in rows:
        sent = sorted(row.moved.items(), key=lambda item: -item[1][1])
        shown.add_row(
            described(row.mesh),
            f"{np.abs(row.losses - one.losses).max():.0e}",
            f"{row.state / 1e3:,.0f}",
            f"{row.flops / one.flops:.0%}",
            "; ".join(f"{name} {nbytes / 1e3:,.0f} ({times})" for name, (times, nbytes) in sent)
            or "nothing",
        )
    return shown


def described(mesh: MeshConfig) -> str:
    """The axes with more than one device."""
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"
