"""Whether a run fits the memory that is here: asked before anything of it is made."""

import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.parallel import sharding
from gptjax.plan.estimate import bytes_of, estimate

GIB = 2**30
MARGIN = 1.5  # by which XLA may need less than the estimate
LOWER = {
    "parameters": "lower --model.n-layer, --model.n-embd or --model.vocab-size",
    "batch": "lower --batch-size",
    "evaluation": "lower --eval-batches",
    "calls of the device": "lower --steps-per-dispatch",
}


def memory_of_device() -> float:
    """Bytes of memory that one device of this machine has; infinity if nothing tells."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    limits = [float("inf")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # a container's
    if meminfo.exists() and (found := re.search(r"MemTotal: +(\d+) kB", meminfo.read_text())):
        limits.append(int(found[1]) * 1024)
    if group.exists() and (text := group.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits) / jax.local_device_count()


def check_training(
    config: Config, state: Any, mesh: Mesh, *, vocab_size: int, is_gpt: bool, streams: bool
) -> None:
    """Refuse a run whose state, batch or activations cannot fit.

    Args:
        config: of the run.
        state: shapes of its train state.
        mesh: its devices.
        vocab_size: of the tokenizer.
        is_gpt: of the config's own model, whose activations are known.
        streams: whether batches are made on the host.

    Raises:
        UserError: with the estimate, and what to lower.
    """
    sizes = MeshConfig(**{name: mesh.shape[name] for name in sharding.AXES})
    abstract = AbstractMesh(
        tuple(mesh.shape.values()), tuple(mesh.shape), axis_types=(AxisType.Auto,) * 3
    )
    params = bytes_of(state.params, abstract)
    needs = {"parameters": bytes_of(state, abstract) + params}  # and as much for the gradient
    window = 4 * (config.model.block_size + 1)
    needs["batch"] = window * config.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
    needs["evaluation"] = 8 * (config.eval_batches or 0) * config.batch_size
    needs["calls of the device"] = config.steps_per_dispatch * (16 + needs["batch"] * streams)
    if is_gpt:
        cost = estimate(config, state, sizes)
        known = ("parameters", "optimizer", "gradients")
        needs["batch"] = sum(size for name, size in cost.memory.items() if name not in known)
        needs["batch"] /= MARGIN
    else:
        logits = 4 * config.micro_batch_size * (config.loss_chunk or config.model.block_size)
        needs["batch"] += logits * vocab_size / mesh.size
    _refuse("this run", needs, "; --plan here tells more, and --plan h100:8 of other devices")


def check_sampling(model: Any, num_samples: int, vocab_size: int) -> None:
    """Refuse samples whose cache and logits cannot fit.

    Raises:
        UserError: with the estimate.
    """
    cache = jax.eval_shape(lambda: model.init_cache(num_samples))
    cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    _refuse(
        f"drawing {num_samples} samples at once",
        {"samples": cached + 4.0 * num_samples * vocab_size},
    )


def _refuse(what: str, needs: dict[str, float], more: str = "") -> None:
    total, there = sum(needs.values()), memory_of_device()
    if total <= there:
        return
    largest = max(needs, key=lambda name: needs[name])
    advice = LOWER.get(largest, "lower --num-samples")
    if largest == "batch":
        advice += ", --model.block-size or the model's sizes, or raise --optim.accumulate"
    raise UserError(
        f"{what} needs about {total / GIB:,.1f} GiB of a device's memory, of which "
        f"{needs[largest] / GIB:,.1f} GiB for the {largest}, and a device here has "
        f"{there / GIB:,.1f} GiB; {advice}{more}"
    )
