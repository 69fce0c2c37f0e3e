"""Parameter and FLOP counts of a model; measured matmul and memory rates of this machine."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig


def count_params(params: Any) -> int:
    """Number of parameters in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, params: Any) -> int:
    """FLOPs of the forward and backward pass, per token of a full context.

    6 per parameter of a matmul, and 12 L H D T for attention's two products including the masked
    half (12 L H D window with a sliding window). Lookups (wpe, an untied wte) cost nothing. 0 for
    models other than a GPT.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    if "h" not in params:
        return 0
    kernels = count_params({"h": params["h"], "head": params.get("lm_head", {})})
    tied = params["wte"]["embedding"].size if config.tie_head else 0
    seen = min(config.window or config.block_size, config.block_size)
    attention = 12 * config.n_layer * config.n_head * config.head_size * seen
    return 6 * (kernels + tied) + attention


def will_memorise(n_tokens: int, n_params: int, passes: float) -> bool:
    """Whether a model is likely to memorise its training data: a rule of thumb.

    Args:
        n_tokens: training tokens.
        n_params: parameters of the model.
        passes: epochs.

    Source: Muennighoff et al. 2023: up to 4 epochs repeated data is worth nearly as much as new
    data, beyond about 16 next to nothing. The second condition, at least one parameter per token,
    is our addition.
    """
    return passes > 16 and n_params > n_tokens


def processor() -> str:
    """Name and core count of this machine's CPU."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matmul on one device, best of eight; about 0.2 s on a CPU.

    Of random numbers: a GPU multiplies constant ones with less power, and so faster.
    """
    n, calls = (1024, 1) if jax.default_backend() == "cpu" else (8192, 20)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    return calls * 2 * n**3 / _best_seconds(jax.jit(jnp.matmul), a, a, calls=calls)


def memory_rate() -> float:
    """Bytes/s that one device reads and writes when it adds 1 to 256 MB, best of eight."""
    x = jax.random.normal(jax.random.key(0), (2**26,))
    calls = 1 if jax.default_backend() == "cpu" else 20
    return calls * 2 * x.nbytes / _best_seconds(jax.jit(lambda x: x + 1), x, calls=calls)


def _best_seconds(function: Any, *arguments: jax.Array, calls: int) -> float:
    """Shortest time of so many calls in flight at once, of eight, after one that compiles."""
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        seconds.append(time.perf_counter() - start)
    return min(seconds)
