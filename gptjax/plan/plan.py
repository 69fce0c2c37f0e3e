"""`train.py --plan`: what a run would take on accelerators, before one is paid for.

The run's own step is compiled for them where the compiler is at hand (`aot.py`), and else told by
arithmetic (`estimate.py`). Nothing is run, no weights are allocated, no folder is made.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from gptjax.assembly import assemble
from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.parallel import sharding
from gptjax.parallel.flops import matmul_peak, memory_rate, processor
from gptjax.plan import aot, chips, estimate
from gptjax.plan.chips import GIB, Chip
from gptjax.plan.estimate import Cost
from gptjax.text.dataset import open_dataset

TRIES = 3  # proposals that are compiled, until one fits


class Plan(NamedTuple):
    """What a step of a config would take on each of the devices; `compiled`: None by arithmetic."""

    config: Config
    cost: Cost
    compiled: aot.Compiled | None

    @property
    def refused(self) -> str | None:
        """What the compiler said of memory that does not suffice."""
        return self.compiled.refused if self.compiled else None

    def fits(self, chip: Chip) -> bool:
        return self.refused is None and self.cost.total <= chip.usable * chip.memory


def plan(config: Config, text: str, console: Console | None = None) -> Plan:
    """Print what a run would take on the accelerators that `text` names.

    Args:
        config: of the run.
        text: `v5e:4x4`, `h100:8`, ... (`chips.CHIPS`), or `here`.
        console: where to; None: standard output.

    Raises:
        UserError: unknown chips, sizes that do not divide, or a step that does not fit; then the
            message says what does.
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

    def made(config: Config) -> Plan:
        return make(config, vocab_size, state, count, devices)

    asked = made(config)
    tell(asked, chip, text, console)
    if asked.fits(chip):
        return asked
    among = estimate.meshes(count, chip)
    for candidate, _ in estimate.proposals(config, state, chip, among)[:TRIES]:
        better = made(candidate)
        if better.fits(chip):
            console.print()
            tell(better, chip, f"{text}, what fits", console)
            raise UserError(f"{_refusal(asked, chip)}; this does: {flags(better.config, config)}")
    raise UserError(
        f"{_refusal(asked, chip)}, and no mesh, accumulation or rematerialisation that does was "
        f"found; take more devices"
    )


def make(
    config: Config, vocab_size: int, state: Any, count: int, devices: Sequence[Any] | None
) -> Plan:
    """The plan of a config: compiled for devices, or by arithmetic for so many if there are none.

    Args:
        config: of the run.
        vocab_size: the tokenizer's.
        state: shapes of its train state.
        count: of devices.
        devices: see `aot.compile_step`; None: no compiler is here.

    Raises:
        UserError: sizes that the mesh does not divide.
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


def tell(plan: Plan, chip: Chip, title: str, console: Console) -> None:
    """Print a plan's tables."""
    config, mesh = plan.config, plan.config.mesh
    m, sizes = config.model, {"data": mesh.data or 1, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    count = mesh.fsdp * mesh.tensor * (mesh.data or 1)
    rows = config.batch_size // config.optim.accumulate // (sizes["data"] * mesh.fsdp)
    how = "by arithmetic alone: pip install -e '.[plan]' compiles the step itself"
    if plan.compiled:
        how = f"the step compiled in {plan.compiled.seconds:.0f} s; nothing was run"
        if plan.compiled.refused:
            how = "refused by the compiler for its memory; these figures are by arithmetic"
    console.print(
        f"{title}: {count} x {chip.title}, "
        f"{' x '.join(f'{name} {n}' for name, n in sizes.items())}; each {config.optim.accumulate} "
        f"x {rows} windows of {m.block_size} tokens; rematerialisation "
        f"{m.remat_saves + ' kept' if m.remat else 'off'}\n{how}",
        markup=False,
        soft_wrap=True,
    )
    if plan.compiled and plan.compiled.plain:
        console.print(
            "with plain attention: cuDNN's kernel would hold and move less",
            markup=False,
            soft_wrap=True,
        )

    table = Table("memory of a device", title_justify="left", box=None, pad_edge=False)
    table.add_column("GiB", justify="right")
    for kind, size in [*plan.cost.memory.items(), ("in all", plan.cost.total)]:
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_row("there is", f"{chip.usable * chip.memory / GIB:.2f}")
    console.print(table)
    if plan.refused:
        return

    times = estimate.times(plan.cost, chip)
    sent = sum(c.wire * c.times for c in plan.cost.collectives)
    table = Table("a step of a device", box=None, pad_edge=False)
    for column in ("needs", "at peak", "seconds"):
        table.add_column(column, justify="right")
    for name, amount, unit, peak, seconds in (
        ("compute", plan.cost.flops, "TFLOP", chip.flops, times.compute),
        ("memory", plan.cost.traffic, "TB", chip.bandwidth, times.memory),
        ("network", sent, "TB", chip.links, times.network),
    ):
        rate = f"{peak / 1e12:,.3g} {unit}/s"
        table.add_row(name, f"{amount / 1e12:,.3g} {unit}", rate, f"{seconds:.3g}")
    console.print(table)
    if plan.cost.collectives:
        console.print(_collectives(plan, chip, sizes))

    tokens = config.batch_size * m.block_size
    useful = plan.cost.useful / chip.flops
    slowest = max(times._asdict(), key=lambda name: getattr(times, name))
    for words, seconds in (
        ("at the least", times.least),
        ("if nothing overlaps", times.most),
    ):
        console.print(
            f"{words}: {seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s, "
            f"{useful / seconds:.0%} of the compute peak, {config.steps * seconds / 86400:,.1f} "
            f"days for {config.steps * tokens / 1e9:,.3g} B tokens",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"limited by {slowest}; peaks: {chip.source}", markup=False, soft_wrap=True)


def _collectives(plan: Plan, chip: Chip, sizes: dict[str, int]) -> Table:
    """The table of what devices send to one another, kind by kind and axis by axis."""
    sums: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for c in plan.cost.collectives:
        total = sums[c.kind, " ".join(c.axes(sizes))]
        total[0] += c.times
        total[1] += c.wire * c.times
        total[2] += c.wire * c.times / estimate.rate(c, chip)
    table = Table("collectives of a step", "along", box=None, pad_edge=False)
    for column in ("times", "GB sent", "seconds"):
        table.add_column(column, justify="right")
    for (kind, axes), (n, size, seconds) in sorted(sums.items(), key=lambda kv: -kv[1][1]):
        table.add_row(kind, axes, f"{n:,.0f}", f"{size / 1e9:,.2f}", f"{seconds:.3g}")
    return table


def flags(config: Config, than: Config) -> str:
    """The flags that turn one config into the other, of those that `estimate.proposals` sets."""
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
    """That a plan does not fit, and by how much."""
    needs = f"{plan.cost.total / GIB:.1f} GiB"
    if said := re.search(r"([\d.]+)([GMK])\)? (?:exceeds|of)", plan.refused or ""):
        needs = f"{said[1]} {said[2]}iB"
    room = chip.usable * chip.memory / GIB
    return f"it does not fit: a device needs {needs}, and {chip.title} gives {room:.1f} GiB"


def _shapes(config: Config, vocab_size: int) -> Any:
    """Shapes of the train state, whatever the devices."""
    one = replace(config, mesh=MeshConfig(1), model=replace(config.model, attention="plain"))
    return assemble(one, vocab_size).layout


def _here(config: Config) -> Chip:
    """This machine's devices: an accelerator that is known, or what can be measured of others."""
    device = jax.devices()[0]
    if known := chips.called(device.device_kind):
        return known
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemTotal: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    count, bandwidth = jax.device_count(), memory_rate()
    return Chip(
        title=processor() if device.platform == "cpu" else device.device_kind,
        kind=device.platform,
        flops=matmul_peak(config.model.dtype) / count,
        memory=(int(found[1]) * 1024 if found else float("inf")) / count,
        usable=1.0,
        bandwidth=bandwidth / count,
        links=bandwidth / count,
        joined=count,
        network=None,
        source="a large matmul and a large addition, measured just now",
    )
