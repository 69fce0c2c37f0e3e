"""`--plan`: estimate a run's memory, time and communication on accelerators before using them.

The train step is compiled for them if their compiler is installed (`aot.py`), and otherwise
estimated analytically (`estimate.py`). Nothing is run, no weights are allocated, no folder is made.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from gptjax.assembly import assemble
from gptjax.config import Config, MeshConfig
from gptjax.console import rounded
from gptjax.errors import UserError
from gptjax.parallel import sharding
from gptjax.parallel.flops import matmul_peak, memory_rate, processor
from gptjax.parallel.switches import pinned
from gptjax.plan import aot, chips, estimate
from gptjax.plan.chips import GIB, Chip
from gptjax.plan.estimate import Cost
from gptjax.plan.room import memory_of_device
from gptjax.text.dataset import open_dataset

TRIES = 3  # proposals to compile until one fits


class Plan(NamedTuple):
    """Cost per device of a step of `config`; `compiled` is None for an analytical estimate."""

    config: Config
    cost: Cost
    compiled: aot.Compiled | None

    @property
    def refused(self) -> str | None:
        """The compiler's out-of-memory message, if any."""
        return self.compiled.refused if self.compiled else None

    def fits(self, chip: Chip) -> bool:
        return self.refused is None and self.cost.total <= chip.usable * chip.memory


@pinned()
def plan(config: Config, text: str, console: Console | None = None) -> Plan:
    """Print the plan of a run on the accelerators named by `text`.

    Args:
        config: the run's config.
        text: `v5e:4x4`, `h100:8`, ... (`chips.CHIPS`), or `here`.
        console: output; None: standard output.

    Raises:
        UserError: unknown chips, sizes that the mesh does not divide, or a step that does not fit
            (the message then gives flags of one that does).
    """
    console = console or Console(highlight=False)
    devices: Sequence[Any] | None
    if text == "here":
        devices = jax.devices()
        chip, count = _here(config), len(devices)
    else:
        target = chips.read_target(text)
        chip, count, devices = target.chip, target.count, aot.topology(target)
    vocab_size = (
        config.model.vocab_size
        or open_dataset(config.data, config.model.block_size).tokenizer.vocab_size
    )
    state = _shapes(config, vocab_size)

    def planned(config: Config) -> Plan:
        return make_plan(config, vocab_size, state, count, devices)

    requested = planned(config)
    show(requested, chip, text, console)
    if requested.fits(chip):
        return requested
    among = estimate.meshes(count, chip)
    for candidate, _ in estimate.proposals(config, state, chip, among)[:TRIES]:
        better = planned(candidate)
        if better.fits(chip):
            console.print()
            show(better, chip, f"{text}, a plan that fits", console)
            raise UserError(
                f"{_refusal(requested, chip)}; this fits: {flags(better.config, config)}"
            )
    raise UserError(
        f"{_refusal(requested, chip)}, and no mesh, accumulation or rematerialisation that fits "
        f"was found; use more devices"
    )


def make_plan(
    config: Config, vocab_size: int, state: Any, count: int, devices: Sequence[Any] | None
) -> Plan:
    """Plan a config: compiled for `devices`, or analytically for `count` of them.

    Args:
        config: the run's config.
        vocab_size: the tokenizer's.
        state: shapes of its train state.
        count: number of devices.
        devices: see `aot.compile_step`; None: no compiler is installed.

    Raises:
        UserError: the mesh does not divide a size.
    """
    rows = config.batch_size // config.optim.accumulate
    mesh = replace(config.mesh, data=sharding.data_ways(config.mesh, rows, count))
    config = replace(config, mesh=mesh)
    cost = estimate.estimate(config, state, mesh)
    if devices is None:
        return Plan(config, cost, None)
    compiled = aot.compile_step(config, vocab_size, devices)
    if compiled.refused:
        return Plan(config, cost, compiled)
    parameters, optimizer = cost.memory["parameters"], cost.memory["optimizer"]
    memory = {
        "parameters": parameters,
        "optimizer": optimizer,
        "gradients": parameters,
        "activations, workspace": compiled.temporaries - parameters,
        "tokens, results, program": compiled.arguments - parameters - optimizer + compiled.rest,
    }
    found = [c for c in compiled.collectives if len(c.group) > 1]
    return Plan(
        config, Cost(memory, compiled.flops, compiled.traffic, found, cost.useful), compiled
    )


def show(plan: Plan, chip: Chip, title: str, console: Console) -> None:
    """Print a plan's tables."""
    config, mesh = plan.config, plan.config.mesh
    m, sizes = config.model, {"data": mesh.data or 1, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    count = mesh.fsdp * mesh.tensor * (mesh.data or 1)
    rows = config.batch_size // config.optim.accumulate // (sizes["data"] * mesh.fsdp)
    how = "estimated analytically; pip install -e '.[plan]' to compile the step itself"
    if plan.compiled:
        by = f" by {plan.compiled.by}" if plan.compiled.by else ""
        how = f"the step compiled in {plan.compiled.seconds:.0f} s{by}; nothing was run"
        if plan.compiled.refused:
            how = "the compiler ran out of device memory; these figures are analytical"
    console.print(
        f"{title}: {count} x {chip.title}, "
        f"{' x '.join(f'{name} {n}' for name, n in sizes.items())}; per device "
        f"{config.optim.accumulate} x {rows} sequences of {m.block_size} tokens; rematerialisation "
        f"{f'on, saving {m.remat_saves}' if m.remat else 'off'}\n{how}",
        markup=False,
        soft_wrap=True,
    )
    table = Table("memory per device", title_justify="left", box=None, pad_edge=False)
    table.add_column("GiB", justify="right")
    for kind, size in [*plan.cost.memory.items(), ("total", plan.cost.total)]:
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_row("available", f"{chip.usable * chip.memory / GIB:.2f}")
    console.print(table)
    if plan.refused:
        return

    times = estimate.times(plan.cost, chip)
    sent = sum(c.wire * c.times for c in plan.cost.collectives)
    table = Table("step, per device", box=None, pad_edge=False)
    for column in ("amount", "peak rate", "seconds"):
        table.add_column(column, justify="right")
    for name, amount, unit, peak, seconds in (
        ("compute", plan.cost.flops, "TFLOP", chip.flops, times.compute),
        ("memory", plan.cost.traffic, "TB", chip.bandwidth, times.memory),
        ("network", sent, "TB", chip.links, times.network),
    ):
        rate = f"{rounded(peak / 1e12)} {unit}/s"
        table.add_row(name, f"{rounded(amount / 1e12)} {unit}", rate, rounded(seconds))
    console.print(table)
    if plan.cost.collectives:
        console.print(_collectives(plan, chip, sizes))

    tokens = config.batch_size * m.block_size
    useful = plan.cost.useful / chip.flops
    slowest = max(times._asdict(), key=lambda name: getattr(times, name))
    for words, seconds in (
        ("lower bound", times.least),
        ("without overlap", times.most),
    ):
        console.print(
            f"{words}: {rounded(seconds)} s per step, {tokens / seconds:,.0f} tokens/s, "
            f"{useful / seconds:.0%} MFU, {config.steps * seconds / 86400:,.1f} "
            f"days for {rounded(config.steps * tokens / 1e9)} B tokens",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"limited by {slowest}; peaks: {chip.source}", markup=False, soft_wrap=True)


def _collectives(plan: Plan, chip: Chip, sizes: dict[str, int]) -> Table:
    """Table of collectives, by kind and mesh axis."""
    sums: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for c in plan.cost.collectives:
        total = sums[c.kind, " ".join(c.axes(sizes))]
        total[0] += c.times
        total[1] += c.wire * c.times
        total[2] += c.wire * c.times / estimate.rate(c, chip)
    table = Table("collectives per step", "axis", box=None, pad_edge=False)
    for column in ("count", "GB sent", "seconds"):
        table.add_column(column, justify="right")
    for (kind, axes), (n, size, seconds) in sorted(sums.items(), key=lambda kv: -kv[1][1]):
        table.add_row(kind, axes, f"{n:,.0f}", f"{size / 1e9:,.2f}", rounded(seconds))
    return table


def flags(config: Config, than: Config) -> str:
    """Flags that turn `than` into `config`, for the fields that `estimate.proposals` sets."""
    m = config.mesh
    words = [f"--mesh.data {m.data} --mesh.fsdp {m.fsdp} --mesh.tensor {m.tensor}"]
    if config.optim.accumulate != than.optim.accumulate:
        words.append(f"--optim.accumulate {config.optim.accumulate}")
    if config.model.remat != than.model.remat:
        words.append("--model.remat" if config.model.remat else "--model.no-remat")
    if config.model.remat_saves != than.model.remat_saves:
        words.append(f"--model.remat-saves {config.model.remat_saves}")
    return " ".join(words)


def _refusal(plan: Plan, chip: Chip) -> str:
    """Say that a plan does not fit, and by how much."""
    needs = f"{plan.cost.total / GIB:.1f} GiB"
    if said := re.search(r"([\d.]+)([GMK])\)? (?:exceeds|of)", plan.refused or ""):
        needs = f"{said[1]} {said[2]}iB"
    available = chip.usable * chip.memory / GIB
    return f"it does not fit: a device needs {needs}, and {chip.title} has {available:.1f} GiB"


def _shapes(config: Config, vocab_size: int) -> Any:
    """Shapes of the train state, which do not depend on the devices."""
    one = replace(config, mesh=MeshConfig(1), model=replace(config.model, attention="plain"))
    return assemble(one, vocab_size).layout


def _here(config: Config) -> Chip:
    """This machine's devices: published figures if known, otherwise measured."""
    device = jax.devices()[0]
    if known := chips.by_device_kind(device.device_kind):
        return known
    count, bandwidth = jax.device_count(), memory_rate()
    return Chip(
        title=processor() if device.platform == "cpu" else device.device_kind,
        kind=device.platform,
        flops=matmul_peak(config.model.dtype) / count,
        memory=memory_of_device(),
        usable=1.0,
        bandwidth=bandwidth / count,
        links=bandwidth / count,
        joined=count,
        network=None,
        source="measured now with a large matmul and a large addition",
    )
