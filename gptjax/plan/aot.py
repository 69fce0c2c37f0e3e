"""The train step compiled ahead of time, for devices that need not be here.

TPUs by libtpu, GPUs by the CUDA plug-in: the extra `plan`. Nothing is allocated or run.
"""

import importlib.util
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from gptjax.assembly import assemble, trace
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.plan import chips, hlo
from gptjax.plan.chips import Target

CORPUS = 2**20  # tokens of the compiled step; a run's own lie on every device besides


class Compiled(NamedTuple):
    """What a compiler made of a train step, on each device.

    Attributes:
        seconds: that it took.
        refused: what it said if the memory does not suffice; None, and the rest is filled.
        arguments: bytes of the state and the tokens.
        temporaries: bytes of what lives during the step only.
        rest: bytes of results that take no argument's place, and of the program.
        flops: of matmuls, as traced, an even share of them.
        traffic: bytes, see `hlo.Program.traffic`.
        collectives: see `hlo.Program.collectives`.
        plain: whether plain attention took the place of cuDNN's, which JAX lowers only where it
            finds cuDNN and the GPU itself.
    """

    seconds: float
    refused: str | None
    plain: bool
    arguments: int = 0
    temporaries: int = 0
    rest: int = 0
    flops: float = 0.0
    traffic: int = 0
    collectives: Sequence[hlo.Collective] = ()


def compile_step(config: Config, vocab_size: int, devices: Sequence[Any]) -> Compiled:
    """Compile the step that a run of `config` would make on the devices.

    Args:
        config: of the run.
        vocab_size: the tokenizer's.
        devices: of this machine, or from `topology`.

    Raises:
        UserError: sizes that the mesh does not divide.
    """
    absent = getattr(devices[0], "client", None) is None or devices[0] not in jax.local_devices()
    plain = absent and devices[0].platform == "gpu" and config.model.attention != "plain"
    if plain:
        config = replace(config, model=replace(config.model, attention="plain"))
    setup = assemble(config, vocab_size, devices=devices)
    start = time.perf_counter()
    traced = trace(setup, CORPUS)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(time.perf_counter() - start, str(error), plain)
    seconds = time.perf_counter() - start
    program, memory = hlo.Program(compiled.as_text() or ""), _memory(compiled)
    return Compiled(
        seconds,
        None,
        plain,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes,
        count_flops(traced.jaxpr.jaxpr) / setup.mesh.size,
        program.traffic(),
        program.collectives(),
    )


def _memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def topology(target: Target) -> list[Any] | None:
    """Stand-ins of devices that are not here, to compile for; None: their compiler is missing.

    Raises:
        UserError: a shape that these chips do not come in.
    """
    from jax.experimental import topologies

    compiler = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}[target.chip.kind]
    if importlib.util.find_spec(compiler) is None:
        return None
    jax.config.update("jax_platforms", "cpu")  # what is here is not asked for
    # libtpu asks the network which TPU it is on, unless it is told.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        if target.chip.kind == "tpu":
            # One device a chip, as JAX has it on real ones; v4 has two cores that could be apart.
            options = {"chip_config_name": "megacore"} if target.name == "v4" else {}
            return topologies.get_topology_desc(str(target), "tpu", **options).devices
        each = min(target.count, target.chip.joined)
        return topologies.get_topology_desc(
            platform="cuda",
            target_config=chips.gpu_target(target.chip),
            topology=f"1x{target.count // each}x{each}",
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--plan {target}: its compiler refuses the shape: {reason}") from None


def count_flops(jaxpr: Any) -> int:
    """FLOPs of the matmuls of a traced function, on all devices; loops count as often as they go
    round, and once where that is not known."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [count_flops(j) for j in _inner(eqn)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += 2 * eqn.outvars[0].aval.size * math.prod(shape[n] for n in contracted)
            case "scan":
                total += eqn.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "shard_map":
                total += eqn.params["mesh"].size * sum(inner)
            case "pallas_call":
                total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
            case _:
                total += sum(inner)
    return total


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [v for v in eqn.params.values()]
    parts = [p for v in values for p in (v if isinstance(v, tuple | list) else (v,))]
    return [j for p in parts if hasattr(j := getattr(p, "jaxpr", p), "eqns")]
