"""Ahead-of-time compilation of the train step, for devices that need not be present.

The extra `plan` installs the compilers: libtpu for TPUs, a CUDA plug-in for GPUs. Nothing is
allocated or run.
"""

import importlib.util
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import Any, NamedTuple
from unittest import mock

import jax

from gptjax.assembly import assemble, trace
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.plan import chips, hlo
from gptjax.plan.chips import Target

CORPUS = 2**20  # tokens of the compiled step; a run also keeps its own corpus on every device
CUDNN = 91000  # the version of cuDNN that is assumed where there is none
# The first one that is installed compiles.
COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
}


class Compiled(NamedTuple):
    """Costs of a compiled train step, per device.

    Attributes:
        seconds: compile time.
        by: the package that compiled for devices that are absent; None: they are present.
        refused: the compiler's out-of-memory message; None if it compiled. The fields with
            defaults are set only then.
        arguments: bytes of the state and the tokens.
        temporaries: bytes allocated during the step only.
        rest: bytes of the program and of results that reuse no argument's buffer.
        flops: matmul FLOPs as traced, divided evenly among the devices.
        traffic: bytes, see `hlo.Program.traffic`.
        collectives: see `hlo.Program.collectives`.
    """

    seconds: float
    by: str | None
    refused: str | None
    arguments: int = 0
    temporaries: int = 0
    rest: int = 0
    flops: float = 0.0
    traffic: int = 0
    collectives: Sequence[hlo.Collective] = ()


def compile_step(config: Config, vocab_size: int, devices: Sequence[Any]) -> Compiled:
    """Compile the train step of a config for the given devices.

    Args:
        config: the run's config.
        vocab_size: the tokenizer's.
        devices: this machine's, or those of `topology`.

    Raises:
        UserError: the mesh does not divide a size.
    """
    absent = devices[0] not in jax.devices()
    by = compiler(devices[0].platform) if absent else None
    setup = assemble(config, vocab_size, devices=devices)
    start = time.perf_counter()
    try:
        with _assumed_cudnn() if absent else nullcontext():
            traced = trace(setup, CORPUS)
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(time.perf_counter() - start, by, str(error))
    seconds = time.perf_counter() - start
    program, memory = hlo.Program(compiled.as_text() or ""), _memory(compiled)
    return Compiled(
        seconds,
        by,
        None,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes,
        count_flops(traced.jaxpr.jaxpr) / setup.mesh.size,
        program.traffic(),
        program.collectives(),
    )


@contextmanager
def _assumed_cudnn() -> Iterator[None]:
    """JAX asks for the machine's cuDNN and GPU before it lowers cuDNN's attention; these are the
    answers for an absent GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with (
        mock.patch.object(fused, "check_cudnn_version", lambda: CUDNN),
        mock.patch.object(fused, "check_compute_capability", lambda _: True),
        mock.patch.object(fused, "is_cuda_compute_capability_equal", lambda _: False),
    ):
        yield


def _memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def compiler(kind: str) -> str | None:
    """The installed package, with its version, that compiles for "tpu" or "gpu", if any."""
    for name in COMPILERS[kind]:
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            return f"{name} {metadata.version(name)}"
    return None


def topology(target: Target) -> list[Any] | None:
    """Descriptions of absent devices to compile for; None: their compiler is not installed.

    Raises:
        UserError: the compiler rejects the topology.
    """
    from jax.experimental import topologies

    if compiler(target.chip.kind) is None:
        return None
    jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are not needed
    # Without these, libtpu queries the network for the TPU that it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        if target.chip.kind == "tpu":
            # One device per chip, as on real TPUs; v4's two cores would otherwise count separately.
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
        raise UserError(f"--plan {target}: the compiler rejects this topology: {reason}") from None


def count_flops(jaxpr: Any) -> int:
    """Matmul FLOPs of a traced function, summed over all devices.

    A scan's body counts once per iteration; a while loop's, whose trip count is unknown, once.
    """
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
            case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper" as name:
                # cuDNN's: 2 products forward and 5 backward, of the half that is not masked.
                (B, T, H, D), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
                total += (2 if "fwd" in name else 5) * B * H * T * S * D
            case _:
                total += sum(inner)
    return total


def _inner(eqn: Any) -> list[Any]:
    """Jaxprs among an equation's parameters."""
    values = [v for v in eqn.params.values()]
    parts = [p for v in values for p in (v if isinstance(v, tuple | list) else (v,))]
    return [j for p in parts if hasattr(j := getattr(p, "jaxpr", p), "eqns")]
